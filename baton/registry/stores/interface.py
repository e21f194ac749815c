"""What a registry needs of the place where it lies; the same for a folder and for an object store."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple


class Entry(NamedTuple):
    """A stored file: its path in the store, its size in bytes, and when it was written (seconds since 1970)."""

    path: str
    size: int
    modified: float


class Store(ABC):
    """Write-once files under relative paths with forward slashes.

    Every method raises FileNotFoundError where it needs a file that is not there, and UserError where the store itself
    cannot be reached or refuses; the message names the store.
    """

    location: str
    """How a person writes it: a folder, or `s3://bucket/prefix`."""

    @abstractmethod
    def describe(self, path: str) -> str:
        """Where `path` lies, in full, for messages."""

    @abstractmethod
    def require_conditional_writes(self) -> None:
        """Raise UserError unless of two writers of one path just the first wins; called before a registry is made."""

    @abstractmethod
    def get(self, path: str) -> bytes:
        """The bytes of one record."""

    @abstractmethod
    def get_many(self, paths: Sequence[str]) -> dict[str, bytes]:
        """The bytes of those records that are there; on an object store, many at a time."""

    @abstractmethod
    def stat(self, path: str) -> Entry | None:
        """Size and time of one file; None when it is not there."""

    @abstractmethod
    def list(self, folder: str) -> list[str]:
        """The names directly under `folder`, files and folders, sorted; empty when there is no such folder."""

    @abstractmethod
    def walk(self, folder: str) -> Iterator[Entry]:
        """Every file at any depth under `folder`, sorted by path."""

    def paths(self, folder: str) -> Sequence[str]:
        """The path of every file at any depth under `folder`, in any order."""
        return [entry.path for entry in self.walk(folder)]

    def see_latest(self, folder: str) -> None:  # noqa: B027 - most stores have nothing to do
        """Make the next listing of `folder` complete, where a client remembers listings for a while, as NFS's does."""

    def abort_unfinished(self, older_than_s: float, dry_run: bool = False) -> Sequence[str]:
        """Give up uploads that nobody has gone on with for this long; returns what they were. For `gc`."""
        return []

    @abstractmethod
    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write `path` durably and at once, unless it exists. True when this call wrote it.

        A write whose answer was lost is recognised: True as well when the very same bytes lie there. Records carry a
        nonce, so that two writers never write the same bytes.
        """

    @abstractmethod
    def replace(self, path: str, data: bytes) -> None:
        """Write `path` durably and at once over what lies there: for damaged records alone, which thus never lack."""

    @abstractmethod
    def put_blob(self, file: Path, sha256: str) -> None:
        """Store a file of `workspace()`, already hashed and synced, as the blob `sha256`, and may consume it.

        A blob that is there and whole is not sent again; a damaged one is replaced.
        """

    @abstractmethod
    def fetch_blob(self, sha256: str, target: Path) -> str:
        """Copy a blob to a new file, synced to disk; returns the hex digest of what was written, for comparison."""

    @abstractmethod
    def hash_blob(self, sha256: str) -> tuple[str, int]:
        """Read a blob through: (hex digest, bytes) as found."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove a file; nothing happens when it is not there."""

    @abstractmethod
    def workspace(self) -> AbstractContextManager[Path]:
        """A fresh local folder for work in progress, removed at the end whatever happens."""

    def exists(self, path: str) -> bool:
        """Whether `path` has been put."""
        return self.stat(path) is not None


def blob_path(sha256: str) -> str:
    """Where the blob with this hex digest lies in a store."""
    return f"blobs/sha256/{sha256}"
