"""Files on this machine: hashed while they are written, synced to disk, cloned where the file system can."""

import errno
import fcntl
import hashlib
import io
import os
import stat
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from baton.errors import UserError

CHUNK_BYTES = 1 << 20
BUFFERS = 8
"""How many chunks the writing may be ahead of the hashing."""
_FULL = ("no space left on the disk", "Nothing half-done is left; free some space and try again.")
_FORBIDDEN = ("permission denied", "Ask its owner for the permission to do so, or use another place.")
_REFUSALS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: ("the file system is read-only", "Mount it for writing, or use another place."),
    errno.ENAMETOOLONG: ("a name is too long for the file system", "Use a shorter one."),
}
_FICLONE = 0x40049409  # Linux: share a file's extents until one side is written


def file_sha256(path: Path) -> str:
    """The hex digest of a file's bytes, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_hashed(source: Path | bytes, target: Path, written: threading.Event | None = None) -> tuple[str, int]:
    """Write a new file from a file or bytes, synced to disk; returns (hex digest, bytes) of what was written.

    written: set as soon as the bytes can be read at `target`, which is before they are hashed and on the disk.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "xb", buffering=0) as out:
        if isinstance(source, bytes):
            found = _copy_hashing(io.BytesIO(source), out, written)
        else:
            # O_NOFOLLOW: the folder was checked for links, and must not gain one in between.
            descriptor = os.open(source, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
            with io.FileIO(descriptor) as file:
                assert stat.S_ISREG(os.fstat(descriptor).st_mode), source
                found = _copy_hashing(file, out, written)
        # the file's bytes and size; nobody relies on its times
        os.fsync(out.fileno())
    return found


def _copy_hashing(source: io.FileIO | io.BytesIO, out: io.FileIO, written: threading.Event | None) -> tuple[str, int]:
    """Copy to an empty file, by reflink where the file system can; a second thread hashes beside the writing."""
    digest, size = hashlib.sha256(), 0
    if isinstance(source, io.FileIO) and _reflink(out.fileno(), source.fileno()):
        if written:
            written.set()
        return file_sha256(Path(out.name)), os.fstat(out.fileno()).st_size
    # The same few buffers again and again: at most these are in memory, however large the file, and none is allocated
    # anew, which would cost more than the copying.
    buffers = deque([bytearray(CHUNK_BYTES)])
    hashed: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as hashing:
        while count := source.readinto(buffers[0]):
            chunk = memoryview(buffers[0])[:count]
            hashed.append(hashing.submit(digest.update, chunk))
            _write_all(out, chunk)
            size += count
            if len(buffers) < BUFFERS:
                buffers.appendleft(bytearray(CHUNK_BYTES))
            else:
                hashed.popleft().result()  # the oldest buffer's, which is filled next
                buffers.rotate(1)
        if written:
            written.set()
    return digest.hexdigest(), size


def _write_all(out: io.FileIO, data: memoryview) -> None:
    while data:
        data = data[out.write(data) or 0 :]


def clone_or_copy(source: Path, target: Path) -> str:
    """Reflink or copy a file to a new one, synced, never linked; returns the hex digest of what was written."""
    with open(source, "rb", buffering=0) as blob, open(target, "xb", buffering=0) as out:
        found, _ = _copy_hashing(blob, out, None)
        os.fsync(out.fileno())  # a stamp must not outlive the content that it vouches for
    return found


def _reflink(target: int, source: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class StorageError(UserError):
    """A place that is full or refuses; `told` says so without saying what was being done."""

    def __init__(self, doing: str, told: str) -> None:
        """doing: begins the message."""
        super().__init__(f"{doing}: {told}")
        self.told = told


def storage_error(error: BaseException) -> str | None:
    """What a person is told of a disk that is full or a place that refuses, and what to do; None for another error."""
    if isinstance(error, StorageError):
        return error.told  # whoever is further out knows better what was being done
    number = error.errno if isinstance(error, OSError) else None
    # safetensors reports the system's error as text inside an exception of its own.
    if number is None and "No space left on device" in str(error):
        number = errno.ENOSPC
    if number not in _REFUSALS:
        return None
    found, advice = _REFUSALS[number]
    return f"{found} ({error}). {advice}"


@contextmanager
def storage_errors_are_user_errors(doing: str) -> Iterator[None]:
    """Turn a full disk, a missing permission, a read-only or a too long place into a UserError that begins so."""
    try:
        yield
    except Exception as error:
        told = storage_error(error)
        if told is not None:
            raise StorageError(doing, told) from error
        raise
