"""What every store promises, asked of each: a folder, S3 over HTTP, and the path that Google and Azure take."""

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from baton.registry.stores import Store, blob_path, open_store
from baton.registry.stores.files import write_hashed
from tests.baton.registry.conftest import all_at_once

SOME = random.Random(0).randbytes(300_000)


@pytest.fixture(params=["folder", "s3", "gs in memory"])
def store(request: pytest.FixtureRequest, new_location: Callable[[str], str]) -> Iterator[Store]:
    """An empty store of each kind."""
    if request.param == "gs in memory":
        yield in_memory(request.getfixturevalue("monkeypatch"))
    else:
        store = open_store(new_location(request.param))
        store.require_conditional_writes()
        yield store


def in_memory(monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store that believes to be on Google's; obstore keeps it in memory."""
    from obstore.store import MemoryStore

    from baton.registry.stores.connection import Connection

    monkeypatch.setattr(Connection, "_open", lambda self: MemoryStore())
    return open_store(f"gs://bucket/{os.urandom(8).hex()}")


def put_blob(store: Store, data: bytes) -> str:
    with store.workspace() as folder:
        sha256, size = write_hashed(data, folder / "file")
        assert (sha256, size) == (hashlib.sha256(data).hexdigest(), len(data))
        store.put_blob(folder / "file", sha256)
    return sha256


@pytest.mark.parametrize("data", [b"", b"\0\xff\n{}", SOME])
def test_the_first_of_two_writers_stays(store: Store, data: bytes) -> None:
    assert store.put_if_absent("models/a/b/0000001.json", data)
    assert not store.put_if_absent("models/a/b/0000001.json", b"second")
    assert not store.put_if_absent("models/a/b/0000001.json", b"") or data == b""
    assert store.get("models/a/b/0000001.json") == data
    # As when the answer to the first was lost, and it is repeated.
    assert store.put_if_absent("models/a/b/0000001.json", data)


def test_reading_what_is_not_there(store: Store, tmp_path: Path) -> None:
    store.put_if_absent("models/a/1.json", b"x")
    for path in ("absent", "models/a/2.json", "models/a", "models/a/1.json/deeper"):
        assert store.stat(path) is None and not store.exists(path), path
        assert store.list(path) == (["1.json"] if path == "models/a" else [])
    for path in ("absent", "models/a/2.json"):
        with pytest.raises(FileNotFoundError):
            store.get(path)
    assert store.get_many(["absent"]) == {} and list(store.walk("absent")) == []
    with pytest.raises(FileNotFoundError):
        store.hash_blob("0" * 64)
    with pytest.raises(FileNotFoundError):
        store.fetch_blob("0" * 64, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_listing(store: Store) -> None:
    begun = time.time()
    paths = ["registry.json", "models/a/b/1.json", "models/a/b/2.json", "models/a/bb.json", "models/a-b/c/1.json"]
    for path in paths:
        store.put_if_absent(path, path.encode())
    assert [name for name in store.list("") if name != "tmp"] == ["models", "registry.json"]
    assert store.list("models") == ["a", "a-b"]
    assert store.list("models/a") == ["b", "bb.json"]
    assert store.list("models/a/b") == ["1.json", "2.json"]
    found = list(store.walk("models"))
    # Folder by folder: `a` before `a-b`, although "-" comes before "/".
    assert [entry.path for entry in found] == [*paths[1:4], paths[4]]
    assert [entry.size for entry in found] == [len(path) for path in [*paths[1:4], paths[4]]]
    assert [entry.path for entry in store.walk("models/a")] == paths[1:4]
    assert {entry.path for entry in store.walk("")} == set(paths)
    entry = store.stat("registry.json")
    assert entry is not None and (entry.path, entry.size) == ("registry.json", 13)
    assert begun - 2 < entry.modified < time.time() + 2


def test_many_at_once(store: Store) -> None:
    paths = [f"models/a/b/versions/{number:07d}.json" for number in range(1, 61)]
    for path in paths:
        store.put_if_absent(path, path.encode())
    found = store.get_many([*paths, "models/a/b/versions/0000061.json"])
    assert list(found) == paths and all(data == path.encode() for path, data in found.items())
    assert store.list("models/a/b/versions") == [path.rpartition("/")[2] for path in paths]


def test_deleting(store: Store) -> None:
    store.put_if_absent("leases/1.json", b"x")
    for _ in range(2):
        store.delete("leases/1.json")
        assert not store.exists("leases/1.json") and store.list("leases") == []
    assert store.put_if_absent("leases/1.json", b"y") and store.get("leases/1.json") == b"y"


def test_replacing(store: Store) -> None:
    for data in (b"damaged", b"whole", b"whole", b""):
        store.replace("models/a/b/0000001.json", data)
        assert store.get("models/a/b/0000001.json") == data
        assert not store.put_if_absent("models/a/b/0000001.json", b"other")
    assert [entry.path for entry in store.walk("")] == ["models/a/b/0000001.json"]


def test_all_paths(store: Store) -> None:
    paths = ["models/a/b/1.json", "models/a/bb.json", "models/a-b/c/1.json", "registry.json"]
    for path in paths:
        store.put_if_absent(path, b"x")
    assert sorted(store.paths("")) == sorted(paths)
    assert sorted(store.paths("models/a")) == paths[:2]
    assert list(store.paths("absent")) == []


@pytest.mark.parametrize("data", [b"", b"weights", SOME])
def test_blobs(store: Store, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.registry.stores.cloud.RANGE_BYTES", 70_000)  # more ranges than are read at a time
    sha256 = put_blob(store, data)
    assert store.get(blob_path(sha256)) == data
    assert store.hash_blob(sha256) == (sha256, len(data))
    assert store.fetch_blob(sha256, tmp_path / "new") == sha256 and (tmp_path / "new").read_bytes() == data
    with pytest.raises(FileExistsError):
        store.fetch_blob(sha256, tmp_path / "new")
    before = store.stat(blob_path(sha256))
    assert put_blob(store, data) == sha256 and store.stat(blob_path(sha256)) == before
    assert store.list("blobs/sha256") == [sha256] and store.list("tmp") == []


@pytest.mark.parametrize("damaged", [b"", b"weighty", b"weights and more"])
def test_a_damaged_blob_is_seen_and_mended_by_the_next_put(store: Store, damaged: bytes, tmp_path: Path) -> None:
    sha256 = put_blob(store, b"weights")
    store.delete(blob_path(sha256))
    assert store.put_if_absent(blob_path(sha256), damaged)
    found = hashlib.sha256(damaged).hexdigest()
    assert store.hash_blob(sha256) == (found, len(damaged))
    assert store.fetch_blob(sha256, tmp_path / "new") == found and (tmp_path / "new").read_bytes() == damaged
    put_blob(store, b"weights")
    assert store.hash_blob(sha256) == (sha256, 7)


def test_the_workspace_is_local_and_goes_away(store: Store) -> None:
    with store.workspace() as first, store.workspace() as second:
        assert first != second and first.is_dir() and list(first.iterdir()) == []
        (first / "deep").mkdir()
        (first / "deep" / "file").write_text("x")
        assert store.list("models") == []
    assert not first.exists() and not second.exists()
    with pytest.raises(KeyError), store.workspace() as third:
        raise KeyError
    assert not third.exists()


def test_it_says_where_things_lie(store: Store) -> None:
    assert store.describe("models/a/1.json") == f"{store.location}/models/a/1.json"


def test_the_probe_for_conditional_writes_leaves_nothing(store: Store) -> None:
    store.require_conditional_writes()
    assert list(store.walk("")) == []


def test_one_of_eight_threads_wins(store: Store) -> None:
    for number in range(12):
        won: list[bytes] = []
        barrier = threading.Barrier(8)

        def write(
            mine: bytes,
            number: int = number,
            barrier: threading.Barrier = barrier,
            won: list[bytes] = won,
        ) -> None:
            barrier.wait()
            if store.put_if_absent(f"models/a/b/{number}.json", mine):
                won.append(mine)

        threads = [threading.Thread(target=write, args=(str(writer).encode(),)) for writer in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won == [store.get(f"models/a/b/{number}.json")]


def test_eight_threads_put_one_blob(store: Store) -> None:
    threads = [threading.Thread(target=put_blob, args=(store, SOME)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sha256 = hashlib.sha256(SOME).hexdigest()
    assert store.hash_blob(sha256) == (sha256, len(SOME)) and store.list("blobs/sha256") == [sha256]


def append_many(location: str, writer: int, count: int) -> None:
    """Take the next free number, again and again, as publishing does."""
    store = open_store(location)
    for _ in range(count):
        number = len(store.list("numbers"))
        while not store.put_if_absent(f"numbers/{number:04d}", f"{writer} {os.urandom(8).hex()}".encode()):
            number += 1


def test_processes_at_once_lose_nothing(store_kind: str, new_location: Callable[[str], str]) -> None:
    location, writers, count = new_location(store_kind), 3, 25
    open_store(location).require_conditional_writes()
    all_at_once(store_kind, append_many, [(location, writer, count) for writer in range(writers)])
    store = open_store(location)
    names = store.list("numbers")
    assert names == [f"{number:04d}" for number in range(writers * count)]
    found: dict[str, int] = {}
    for data in store.get_many([f"numbers/{name}" for name in names]).values():
        writer = data.decode().split()[0]
        found[writer] = found.get(writer, 0) + 1
    assert found == {str(writer): count for writer in range(writers)}


def test_a_large_file_goes_in_parts_and_comes_in_ranges(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.registry.stores.cloud.PART_BYTES", 5 << 20)  # S3 allows no smaller ones
    monkeypatch.setattr("baton.registry.stores.cloud.RANGE_BYTES", 3 << 20)
    data: Any = random.Random(1).randbytes((10 << 20) + 5)
    sha256 = put_blob(store, data)
    assert store.hash_blob(sha256) == (sha256, len(data))
    assert store.fetch_blob(sha256, tmp_path / "new") == sha256
    assert (tmp_path / "new").read_bytes() == data
    put_blob(store, data)  # there: not sent again
