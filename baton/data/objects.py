"""Data files in an object store: found by URL, prefix or pattern, and read in ranges as they are needed."""

from __future__ import annotations

import hashlib
import io
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

from baton.errors import UserError

if TYPE_CHECKING:
    from baton.registry.stores.connection import Connection

SCHEMES = ("s3", "gs", "az")
_RANGE_BYTES = 4 << 20


@dataclass(frozen=True)
class ObjectFile:
    """One object, with what of a Path the readers of data files use."""

    connection: Connection
    key: str
    size: int
    mark: str  # the store's own name for the content: its ETag, or where there is none, when it was written

    def __str__(self) -> str:
        return f"{self.connection.url}/{self.key}"

    @property
    def name(self) -> str:
        """The last part of the key."""
        return PurePosixPath(self.key).name

    @property
    def suffix(self) -> str:
        """The last suffix of the name."""
        return PurePosixPath(self.key).suffix

    def open(self) -> IO[bytes]:
        """The content as a buffered file that can seek."""
        return io.BufferedReader(_Ranges(self), _RANGE_BYTES)


class _Ranges(io.RawIOBase):
    """An object read by ranges. A store that fails is a UserError, which no reader takes for damage of the file."""

    def __init__(self, file: ObjectFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Bytes from the start."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place; nothing is read."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read at most the buffer's length; 0 at the end."""
        import obstore

        stop = min(self._at + len(buffer), self._file.size)
        if stop <= self._at:
            return 0
        with self._file.connection.errors(self._file.key):
            found = bytes(obstore.get_range(self._file.connection.objects, self._file.key, start=self._at, end=stop))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


def is_object_url(path: str) -> bool:
    """Whether a recipe's path names an object store."""
    return "://" in path


def locate_objects(url: str) -> list[ObjectFile]:
    """The objects of a URL, sorted: one object, all below a prefix, or those that match a pattern (`*`, `?`, `**`).

    Raises UserError for another scheme, where obstore is not installed, and where nothing is found.
    """
    from baton.registry.stores.connection import Connection

    parts = urlsplit(url, allow_fragments=False)
    if parts.scheme not in SCHEMES or not parts.netloc:
        raise UserError(f"{url} is not read; expected a file, a hub id, or {', '.join(f'{s}://…' for s in SCHEMES)}")
    connection = Connection(f"{parts.scheme}://{parts.netloc}")
    import obstore  # after what says how to install it

    key = url.split("://", 1)[1].partition("/")[2].strip("/")
    fixed = re.split(r"[*?]", key, maxsplit=1)[0]
    is_pattern = fixed != key
    prefix = fixed.rpartition("/")[0] if is_pattern else key
    found: list[Any] = []
    with suppress(FileNotFoundError), connection.errors(key):
        found = [meta for page in obstore.list(connection.objects, prefix or None) for meta in page]
        if not is_pattern and key and not any(meta["path"].startswith(f"{key}/") for meta in found):
            # a listing's prefix is a whole folder's name: it does not show the object of that very name
            found = [obstore.head(connection.objects, key)]
    wanted = re.compile(_expression(key) if is_pattern else ".*", re.DOTALL)
    files = [
        ObjectFile(connection, meta["path"], meta["size"], str(meta.get("e_tag") or meta["last_modified"]))
        for meta in found
        if wanted.fullmatch(meta["path"]) and meta["size"]
    ]
    if not files:
        raise UserError(f"{url}: nothing lies there")
    return sorted(files, key=lambda file: file.key)


def digest_objects(files: list[ObjectFile]) -> tuple[str, int]:
    """(digest of the names, sizes and the store's own marks of the contents, size in bytes): nothing is read."""
    content = sorted((str(file), file.size, file.mark) for file in files)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest(), sum(file.size for file in files)


def _expression(pattern: str) -> str:
    """The regular expression of a pattern: `*` and `?` stay within a folder, `**/` is any number of them."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(known.get(part) or re.escape(part) for part in parts)
