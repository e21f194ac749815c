"""A strict tar archive: regular files in a known order, each header byte for byte as it must be."""

import hashlib
from collections.abc import Iterator
from typing import BinaryIO

from baton.errors import UserError
from baton.registry.stores.files import CHUNK_BYTES

BLOCK = 512
END = bytes(2 * BLOCK)
_OCTAL_LIMIT = 8 << 30  # eleven octal digits; above it the size is written in base 256, as GNU and BSD tar read it
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"7z\xbc\xaf": "7z",
}
_TYPES = {
    b"\0": "a file as tar wrote it before ustar",
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a folder",
    b"6": "a fifo",
    b"7": "a contiguous file",
    b"D": "a GNU folder listing",
    b"K": "a GNU long link",
    b"L": "a GNU long name",
    b"M": "a part of another volume",
    b"S": "a sparse file",
    b"X": "a pax header",
    b"g": "a global pax header",
    b"x": "a pax header",
}


def header(path: str, size: int) -> bytes:
    """The one header of a file: ustar, mode 644, nobody's, of 1970, so that equal content gives equal bytes."""
    prefix, name = "", path
    if len(path) > 100:
        prefix, _, name = path.rpartition("/")
    assert path.isascii() and len(name) <= 100 and len(prefix) <= 155, path
    octal = b"%011o\0" % size if size < _OCTAL_LIMIT else b"\x80" + size.to_bytes(11, "big")
    fields = [
        name.encode().ljust(100, b"\0"),
        b"0000644\0" + b"0000000\0" + b"0000000\0",
        octal,
        b"%011o\0" % 0,
        b" " * 8,
        b"0" + bytes(100),
        b"ustar\x0000" + bytes(64),
        b"0000000\0" + b"0000000\0",
        prefix.encode().ljust(155, b"\0") + bytes(12),
    ]
    block = b"".join(fields)
    assert len(block) == BLOCK
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padding(size: int) -> int:
    """How many zero bytes follow a file of `size` bytes."""
    return -size % BLOCK


class Writer:
    """Writes an archive to a stream, and knows the digest and size of all that was written."""

    def __init__(self, stream: BinaryIO) -> None:
        """stream: open for writing; it need not be seekable."""
        self._stream = stream
        self._digest = hashlib.sha256()
        self.size = 0

    @property
    def sha256(self) -> str:
        """The hex digest of everything so far."""
        return self._digest.hexdigest()

    def add(self, path: str, size: int, content: Iterator[bytes]) -> None:
        """Add a file; `content` must be as long as `size` says."""
        self._write(header(path, size))
        written = 0
        for chunk in content:
            self._write(chunk)
            written += len(chunk)
        assert written == size, (path, written, size)
        self._write(bytes(padding(size)))

    def end(self) -> None:
        """Say that the archive is complete."""
        self._write(END)

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self.size += len(data)


class Reader:
    """Reads an archive from a stream that may be hostile: everything unexpected is a UserError that says where."""

    def __init__(self, stream: BinaryIO, where: str) -> None:
        """stream: open for reading; it need not be seekable. where: its name, for messages."""
        self._stream = stream
        self._digest = hashlib.sha256()
        self._seen: set[str] = set()
        self.where = where
        self.position = 0

    @property
    def sha256(self) -> str:
        """The hex digest of everything so far."""
        return self._digest.hexdigest()

    def first(self, path: str, limit: int) -> int:
        """Read the header of the first file, which must be `path`; returns its size, at most `limit`."""
        block = self._read(BLOCK, path)
        for magic, name in _COMPRESSED.items():
            if block.startswith(magic):
                raise UserError(f"{self.where} is compressed by {name}; a bundle is a plain tar file. Unpack it first.")
        if block[257:263] != b"ustar\0":
            if block[257:262] == b"ustar":
                self._explain(block, path)
            raise UserError(f"{self.where} is not a bundle: expected a ustar archive that begins with {path}.")
        size = _number(block[124:136])
        if size > limit:
            raise UserError(f"{self.where}: {path} would have {size} bytes; {limit} is the most that is read.")
        self._require(block, path, size)
        if size < 0:  # spelled as a number below zero is
            raise UserError(f"{self.where}: the header of {path} says {size} bytes.")
        return size

    def next(self, path: str, size: int) -> None:
        """Read a header, which must be the one of `path` with `size` bytes."""
        self._require(self._read(BLOCK, path), path, size)

    def content(self, path: str, size: int) -> Iterator[bytes]:
        """The bytes of the file whose header was just read, in chunks, and the zeros after it."""
        left = size
        while left:
            chunk = self._read(min(left, CHUNK_BYTES), path)
            left -= len(chunk)
            yield chunk
        if self._read(padding(size), path).strip(b"\0"):
            raise UserError(f"{self.where}: bytes are hidden after the end of {path}, where zeros must be.")

    def end(self) -> None:
        """Require the end of the archive, and of the stream."""
        block = self._read(BLOCK, "the end of the archive")
        if block.strip(b"\0"):
            self._explain(block, "the end of the archive")
            raise UserError(f"{self.where}: a file more than its index names: {_name(block)!r}.")
        if self._read(BLOCK, "the end of the archive").strip(b"\0") or self._stream.read(1):
            raise UserError(f"{self.where} goes on after its end, at byte {self.position}; a bundle does not.")

    def _read(self, count: int, what: str) -> bytes:
        parts = []
        left = count
        while left:
            try:
                part = self._stream.read(left)
            except OSError as error:
                raise UserError(f"{self.where} cannot be read: {error}.") from error
            if not part:
                raise UserError(
                    f"{self.where} is cut off at byte {self.position}, within or before {what}. Copy it again."
                )
            parts.append(part)
            left -= len(part)
            self.position += len(part)
            self._digest.update(part)
        return b"".join(parts)

    def _require(self, block: bytes, path: str, size: int) -> None:
        if block != header(path, size):
            self._explain(block, path)
            found = _number(block[124:136])
            if _name(block) == path and found != size:
                raise UserError(f"{self.where}: {path} has {found} bytes; its index says {size}.")
            raise UserError(
                f"{self.where}: the header of {path} is not the one that Baton writes (mode, owner, time or spelling)."
            )
        self._seen.add(path)

    def _explain(self, block: bytes, expected: str) -> None:
        """Raise the UserError that says best what is wrong with a header, if it is one of the plain cases."""
        at = f"{self.where}, byte {self.position - BLOCK}"
        if not block.strip(b"\0"):
            raise UserError(f"{at}: the archive ends before {expected}.")
        if block[257:262] == b"ustar" and _checksum(block) != _number(block[148:156]):
            raise UserError(f"{at}: the header has a wrong checksum; expected the one of {expected}. Copy it again.")
        name = _name(block)
        if block[257:265] == b"ustar  \0" or block[156:157] != b"0":
            kind = _TYPES.get(block[156:157], "in the format of GNU tar or of an unknown type")
            raise UserError(f"{at}: {name!r} is {kind}; a bundle holds regular files only, as ustar.")
        if name.startswith(("/", "\\")) or name[1:2] == ":":
            raise UserError(f"{at}: {name!r} is an absolute name; a bundle holds none.")
        if ".." in name.replace("\\", "/").split("/"):
            raise UserError(f"{at}: {name!r} leads out of the bundle.")
        if name in self._seen:
            raise UserError(f"{at}: {name} occurs twice.")
        if name.casefold() in self._seen or name != expected and name.casefold() == expected.casefold():
            raise UserError(f"{at}: {name!r} differs from another name in capitals only.")
        if name != expected:
            raise UserError(f"{at}: found {name!r}, expected {expected} by the index.")


def _name(block: bytes) -> str:
    name, prefix = (part.split(b"\0")[0].decode("ascii", "backslashreplace") for part in (block[:100], block[345:500]))
    return f"{prefix}/{name}" if prefix else name


def _number(field: bytes) -> int:
    """A number of a header, octal or base 256; -1 for what is neither."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.rstrip(b"\0 ")
    return int(digits, 8) if digits and not digits.strip(b"01234567") else -1


def _checksum(block: bytes) -> int:
    return sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
