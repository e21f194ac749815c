"""Copying: what is written is what is hashed, at any size, within a few buffers."""

import hashlib
import os
import threading
import tracemalloc
from pathlib import Path

import pytest

from baton.registry.stores.files import BUFFERS, CHUNK_BYTES, clone_or_copy, write_hashed

SIZES = [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, BUFFERS * CHUNK_BYTES, 3 * BUFFERS * CHUNK_BYTES + 7]


@pytest.mark.parametrize("size", SIZES)
def test_what_is_written_is_what_is_hashed(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    wanted = hashlib.sha256(content).hexdigest()
    (tmp_path / "source").write_bytes(content)
    written = threading.Event()
    assert write_hashed(tmp_path / "source", tmp_path / "deep" / "a", written) == (wanted, size)
    assert write_hashed(content, tmp_path / "b") == (wanted, size)
    assert clone_or_copy(tmp_path / "source", tmp_path / "c") == wanted
    assert written.is_set()
    for name in ("deep/a", "b", "c"):
        assert (tmp_path / name).read_bytes() == content


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"")
    os.truncate(tmp_path / "source", 10 * BUFFERS * CHUNK_BYTES)
    tracemalloc.start()
    write_hashed(tmp_path / "source", tmp_path / "target")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (BUFFERS + 2) * CHUNK_BYTES
