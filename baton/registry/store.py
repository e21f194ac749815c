"""The local folder store: blobs and records that are written once, by os.link, and never changed."""

import errno
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from baton.errors import UserError

CHUNK_BYTES = 4 << 20
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class LocalStore:
    """Files under one folder, local or NFS. Paths are relative, with forward slashes."""

    def __init__(self, root: Path) -> None:
        """root: the registry's folder; absolute, so that a later change of directory does no harm."""
        self.root = root.absolute()

    def path(self, path: str) -> Path:
        """Where `path` lies on this file system."""
        return self.root / path

    def get(self, path: str) -> bytes:
        """The bytes of one record; raises FileNotFoundError."""
        return self.path(path).read_bytes()

    def exists(self, path: str) -> bool:
        """Whether `path` has been put."""
        return self.path(path).exists()

    def list(self, folder: str) -> list[str]:
        """The names directly under `folder`, sorted; empty when there is no such folder."""
        try:
            return sorted(os.listdir(self.path(folder)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write `path` durably and at once, unless it exists. True when this call wrote it."""
        aside = self.path(f"tmp/{uuid.uuid4().hex}")
        aside.parent.mkdir(exist_ok=True)
        try:
            with open(aside, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.chmod(0o444)
            return self._link(aside, self.path(path))
        finally:
            aside.unlink(missing_ok=True)

    def put_blob(self, file: Path, sha256: str) -> None:
        """Adopt a file of this store's `tmp/`, already hashed and synced, as the blob `sha256`.

        A blob of that name that has been damaged since is replaced: its good copy is at hand.
        """
        file.chmod(0o444)
        target = self.path(blob_path(sha256))
        if not self._link(file, target) and file_sha256(target) != sha256:
            aside = self.path(f"tmp/{uuid.uuid4().hex}")
            os.link(file, aside)
            os.replace(aside, target)
            sync_folder(target.parent)

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A fresh folder under `tmp/`, removed at the end whatever happens."""
        folder = self.path(f"tmp/{uuid.uuid4().hex}")
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _link(self, source: Path, target: Path) -> bool:
        self._make_folder(target.parent)
        try:
            os.link(source, target)
        except FileExistsError:
            # NFS repeats a request whose answer was lost and then reports a conflict with itself.
            try:
                is_ours = os.path.samestat(os.stat(source), os.stat(target))
            except FileNotFoundError:
                is_ours = False
            if not is_ours:
                return False
        except OSError as error:
            if error.errno in _NO_LINKS:
                raise UserError(
                    f"the file system of {self.root} has no hard links, which a registry needs to write "
                    "without locks. Put the registry on ext4, XFS, Btrfs, ZFS, APFS or NFS."
                ) from error
            raise
        sync_folder(target.parent)
        return True

    def _make_folder(self, folder: Path) -> None:
        if folder.is_dir():
            return
        self._make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        # Without this a crash can lose the new folder and, with it, a record reported as written.
        sync_folder(folder.parent)


def blob_path(sha256: str) -> str:
    """Where the blob with this hex digest lies in a store."""
    return f"blobs/sha256/{sha256}"


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
