"""The store: one winner, nothing half-written, and its own success recognised."""

import errno
import hashlib
import os
import threading
from pathlib import Path

import pytest

from baton.errors import UserError
from baton.registry.stores.files import write_hashed
from baton.registry.stores.interface import blob_path
from baton.registry.stores.local import LocalStore


def test_put_if_absent_keeps_the_first(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert store.put_if_absent("a/b/1.json", b"first")
    assert not store.put_if_absent("a/b/1.json", b"second")
    assert store.get("a/b/1.json") == b"first" and store.list("a/b") == ["1.json"]
    assert store.list("tmp") == [] and store.list("absent") == []
    assert not os.stat(tmp_path / "a/b/1.json").st_mode & 0o222


def test_one_of_many_writers_wins(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for round_number in range(20):
        won: list[int] = []
        barrier = threading.Barrier(8)

        def write(writer: int, number: int = round_number, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            if store.put_if_absent(f"{number}.json", str(writer).encode()):
                won.append(writer)  # noqa: B023 - joined below, before `won` is replaced

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [str(writer).encode() for writer in won] == [store.get(f"{round_number}.json")]


def test_a_link_reported_as_conflict_with_itself_is_a_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def link_with_lost_answer(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "as NFS says when it repeats the request")

    monkeypatch.setattr(os, "link", link_with_lost_answer)
    assert LocalStore(tmp_path).put_if_absent("1.json", b"mine")


def test_a_file_system_without_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UserError, match="no hard links"):
        LocalStore(tmp_path).put_if_absent("1.json", b"x")


def test_a_damaged_blob_is_mended_by_the_next_publish(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    sha256 = hashlib.sha256(b"weights").hexdigest()
    for _ in range(2):
        with store.workspace() as folder:
            assert write_hashed(b"weights", folder / "file") == (sha256, 7)
            store.put_blob(folder / "file", sha256)
        assert store.get(blob_path(sha256)) == b"weights"
        blob = store.path(blob_path(sha256))
        assert not blob.stat().st_mode & 0o222
        blob.chmod(0o644)
        blob.write_bytes(b"weighty")
    assert store.list("tmp") == []


def test_a_link_is_not_followed_while_copying(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError):
        write_hashed(tmp_path / "link", tmp_path / "copy")
