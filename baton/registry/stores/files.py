"""Files on this machine: hashed while they are written, synced to disk, cloned where the file system can."""

import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from baton.errors import UserError

CHUNK_BYTES = 4 << 20
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_FICLONE = 0x40049409  # Linux: share a file's extents until one side is written


def file_sha256(path: Path) -> str:
    """The hex digest of a file's bytes, read in chunks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_hashed(source: Path | bytes, target: Path) -> tuple[str, int]:
    """Write a new file from a file or bytes, synced to disk; returns (hex digest, bytes)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with open(target, "xb") as out:
        for chunk in _chunks(source):
            out.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest(), size


def _chunks(source: Path | bytes) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    # O_NOFOLLOW: the folder was checked for links, and must not gain one in between.
    descriptor = os.open(source, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(descriptor, "rb") as file:
        assert stat.S_ISREG(os.fstat(descriptor).st_mode), source
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def clone_or_copy(source: Path, target: Path) -> str:
    """Reflink or copy a file to a new one, synced, never linked; returns the hex digest of what was written."""
    digest = hashlib.sha256()
    with open(source, "rb") as blob, open(target, "xb") as out:
        if _reflink(out.fileno(), blob.fileno()):
            found = file_sha256(target)
        else:
            while chunk := blob.read(CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
            found = digest.hexdigest()
        out.flush()
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


@contextmanager
def full_disk_is_user_error(doing: str) -> Iterator[None]:
    """Turn "no space left" into a UserError that begins with `doing`."""
    try:
        yield
    except Exception as error:
        # safetensors reports the system's error as text inside an exception of its own.
        is_full = isinstance(error, OSError) and error.errno in _FULL_DISK
        if is_full or "No space left on device" in str(error):
            raise UserError(
                f"{doing}: no space left on the disk ({error}). "
                "Nothing half-done is left; free some space and try again."
            ) from error
        raise
