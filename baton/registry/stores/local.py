"""The local folder store: blobs and records that are written once, by os.link, and never changed."""

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from baton.errors import UserError
from baton.registry.stores.files import clone_or_copy, file_sha256, storage_errors_are_user_errors, sync_folder
from baton.registry.stores.interface import Entry, Store, blob_path

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class LocalStore(Store):
    """Files under one folder, local or NFS."""

    def __init__(self, root: Path) -> None:
        """root: the registry's folder; absolute, so that a later change of directory does no harm."""
        self.root = root.absolute()
        self.location = str(root)

    def path(self, path: str) -> Path:
        """Where `path` lies on this file system."""
        return self.root / path

    def describe(self, path: str) -> str:
        """The file's absolute path."""
        return str(self.path(path))

    def require_conditional_writes(self) -> None:
        """Write one record twice: the first must win. Raises UserError where hard links do not work."""
        with self._writing():
            self.root.mkdir(parents=True, exist_ok=True)
        path = f"tmp/{uuid.uuid4().hex}.conditional"
        try:
            if not self.put_if_absent(path, b"first") or self.put_if_absent(path, b"second"):
                raise UserError(f"{self.root} lets a second writer replace the first; put the registry elsewhere.")
        finally:
            self.delete(path)

    def get(self, path: str) -> bytes:
        """The bytes of one record."""
        with self._reading():
            return self.path(path).read_bytes()

    def get_many(self, paths: Sequence[str]) -> dict[str, bytes]:
        """The bytes of those records that are there."""
        found = {}
        for path in paths:
            with suppress(FileNotFoundError):
                found[path] = self.get(path)
        return found

    def stat(self, path: str) -> Entry | None:
        """Size and time of one file; None when it is not there."""
        try:
            with self._reading():
                status = self.path(path).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return None if stat.S_ISDIR(status.st_mode) else Entry(path, status.st_size, status.st_mtime)

    def list(self, folder: str) -> list[str]:
        """The names directly under `folder`, sorted; empty when there is no such folder."""
        try:
            with self._reading():
                return sorted(os.listdir(self.path(folder)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self, folder: str) -> Iterator[Entry]:
        """Every file at any depth under `folder`, sorted by path."""
        for name in self.list(folder):
            path = f"{folder}/{name}" if folder else name
            if self.path(path).is_dir():
                yield from self.walk(path)
            elif entry := self.stat(path):
                yield entry

    def paths(self, folder: str) -> Sequence[str]:
        """The path of every file at any depth under `folder`, in any order, without asking for each one's size."""
        top = self.path(folder)
        found = ((Path(at).relative_to(self.root).as_posix(), names) for at, _, names in os.walk(top))
        return [name if at == "." else f"{at}/{name}" for at, names in found for name in names]

    def see_latest(self, folder: str) -> None:
        """Touch a folder: an NFS client then asks the server for it, where it would remember a listing for a minute."""
        # Absent, or somebody's who may only read: what hangs on the latest state, writes.
        with suppress(OSError):
            os.utime(self.path(folder))

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write `path` durably and at once, unless it exists. True when this call wrote it."""
        with self._writing(), self._aside(data) as aside:
            return self._link(aside, self.path(path)) or self.get_many([path]).get(path) == data

    def replace(self, path: str, data: bytes) -> None:
        """Write `path` durably and at once over what lies there."""
        target = self.path(path)
        with self._writing(), self._aside(data) as aside:
            self._make_folder(target.parent)
            os.replace(aside, target)
            sync_folder(target.parent)

    @contextmanager
    def _aside(self, data: bytes) -> Iterator[Path]:
        """A new file under `tmp/`, synced and read-only, removed at the end if it is still there."""
        aside = self.path(f"tmp/{uuid.uuid4().hex}")
        aside.parent.mkdir(exist_ok=True)
        try:
            with open(aside, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.chmod(0o444)
            yield aside
        finally:
            aside.unlink(missing_ok=True)

    def put_blob(self, file: Path, sha256: str) -> None:
        """Adopt a file of this store's `tmp/`, already hashed and synced, as the blob `sha256`.

        A blob of that name that has been damaged since is replaced: its good copy is at hand.
        """
        target = self.path(blob_path(sha256))
        with self._writing():
            file.chmod(0o444)
            if not self._link(file, target) and file_sha256(target) != sha256:
                aside = self.path(f"tmp/{uuid.uuid4().hex}")
                os.link(file, aside)
                os.replace(aside, target)
                sync_folder(target.parent)

    def fetch_blob(self, sha256: str, target: Path) -> str:
        """Reflink or copy a blob to a new file; returns the hex digest of what was written."""
        return clone_or_copy(self.path(blob_path(sha256)), target)

    def hash_blob(self, sha256: str) -> tuple[str, int]:
        """Read a blob through: (hex digest, bytes) as found."""
        path = self.path(blob_path(sha256))
        with self._reading():
            return file_sha256(path), path.stat().st_size

    def delete(self, path: str) -> None:
        """Remove a file; nothing happens when it is not there."""
        target = self.path(path)
        with suppress(FileNotFoundError, NotADirectoryError), self._writing():
            target.unlink()
        # Work in progress has folders of its own, which nobody but its maker writes to.
        while path.count("/") > 1 and path.startswith("tmp/"):
            path = path.rpartition("/")[0]
            with suppress(OSError):
                self.path(path).rmdir()

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A fresh folder under `tmp/`, removed at the end whatever happens."""
        folder = self.path(f"tmp/{uuid.uuid4().hex}")
        with self._writing():
            folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _reading(self) -> AbstractContextManager[None]:
        return storage_errors_are_user_errors(f"reading the registry {self.location} failed")

    def _writing(self) -> AbstractContextManager[None]:
        return storage_errors_are_user_errors(f"writing to the registry {self.location} failed")

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
