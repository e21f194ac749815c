"""Recognise pickles by their content, whatever the file is called."""

import bz2
import gzip
import lzma
import pickletools
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

_HEAD_BYTES = 1 << 16
_MAX_DEPTH = 4
_MAX_OPERAND_BYTES = 64 << 20
_MAX_DECOMPRESSED_BYTES = 256 << 20
_MAX_IN_MEMORY_BYTES = 16 << 20
_MAX_OPERATIONS = 1_000_000
_CALLS = {"INST", "OBJ", "REDUCE", "BUILD", "NEWOBJ", "NEWOBJ_EX"}
_IMPORTS = {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}
_NAMES = re.compile(r"[^\W\d][\w.]* [^\W\d][\w.]*")
_RUNS_CODE = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "REDUCE", "BUILD", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
_UNREADABLE: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, RuntimeError, MemoryError)
_UNREADABLE += (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error)
_LZ4 = b"\x04\x22\x4d\x18"


def why_pickle(path: Path) -> str | None:
    """Say in a few words why the file is a pickle or holds one, compressed or in an archive; None when it does not."""
    with open(path, "rb") as file:
        return _why(file, 0)


def _why(file: BinaryIO, depth: int) -> str | None:
    """As `why_pickle`, for something that can be read and sought, at its beginning."""
    head = file.read(_HEAD_BYTES)
    if _starts_pickle(head, file):
        return "a pickle"
    if head.startswith(b"\x93NUMPY") and _has_objects(head):
        return "a NumPy file of pickled objects"
    file.seek(0)
    if _is_text_pickle(file):
        return "a pickle (protocol 0 or 1)"
    for looks, look in _CONTAINERS:
        file.seek(0)
        if looks(head, file, depth):
            if depth == _MAX_DEPTH:
                return "an archive in an archive in an archive, too deep to look into"
            file.seek(0)
            return look(file, depth + 1)
    return None


def _in_compressed(opener: Callable[[BinaryIO], Any], kind: str) -> Callable[[BinaryIO, int], str | None]:
    def look(file: BinaryIO, depth: int) -> str | None:
        with tempfile.SpooledTemporaryFile(_MAX_IN_MEMORY_BYTES) as content:
            if not _decompressed(opener, file, content):
                size = _MAX_DECOMPRESSED_BYTES >> 20
                return f"{kind}-compressed and larger than {size} MiB when decompressed, too much to look through"
            found = _why(content, depth)  # type: ignore[arg-type]
        return found and f"{kind}-compressed: {found}"

    return look


def _decompressed(opener: Callable[[BinaryIO], Any], file: BinaryIO, content: Any) -> bool:
    """Write what a file decompresses to, as far as it does; False when that is too much."""
    count = 0
    # Bytes that are no such stream by chance decompress to nothing; but what was cut off may be loaded up to its end.
    try:
        with opener(file) as source:
            read = getattr(source, "read1", source.read)  # what comes before an error, `read` would lose with it
            while data := read(1 << 20):
                count += len(data)
                if count > _MAX_DECOMPRESSED_BYTES:
                    return False
                content.write(data)
    except _UNREADABLE:
        pass
    content.seek(0)
    return True


def _in_zip(file: BinaryIO, depth: int) -> str | None:
    if depth == 1:
        return _in_zip_at_hand(file, depth)
    # A member of another archive: its own directory is at its end, and each step back would unpack it again.
    with tempfile.SpooledTemporaryFile(_MAX_IN_MEMORY_BYTES) as content:
        if not _decompressed(nullcontext, file, content):
            return f"a zip archive of more than {_MAX_DECOMPRESSED_BYTES >> 20} MiB in an archive"
        return _in_zip_at_hand(content, depth)  # type: ignore[arg-type]


def _in_zip_at_hand(file: BinaryIO, depth: int) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if member.filename.endswith((".pkl", ".pickle")):
                    return f"a zip archive with {member.filename}, as torch.save writes"
                with archive.open(member) as content:
                    found = _why(content, depth)  # type: ignore[arg-type]
                if found:
                    return f"a zip archive with {member.filename}, {found}"
    except _UNREADABLE:
        return "a zip archive that cannot be read through"
    return None


def _in_tar(file: BinaryIO, depth: int) -> str | None:
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isreg() else None
                if member.name.endswith((".pkl", ".pickle")) or member.name == "pickle":
                    return f"a tar archive with {member.name}, as old torch.save wrote"
                found = _why(content, depth) if content else None  # type: ignore[arg-type]
                if found:
                    return f"a tar archive with {member.name}, {found}"
    except _UNREADABLE:
        return "a tar archive that cannot be read through"
    return None


def _open_zlib(file: BinaryIO) -> Any:
    return nullcontext(_Inflated(file))


class _Inflated:
    """What a zlib stream holds (joblib's own format), in pieces."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._stream = file, zlib.decompressobj()

    def read(self, size: int) -> bytes:
        while not self._stream.eof:
            data = self._stream.unconsumed_tail or self._file.read(size)
            found = self._stream.decompress(data, size)
            if found or not data:
                return found
        return b""


def _open_zstd(file: BinaryIO) -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().stream_reader(file, closefd=False)


def _unreadable_lz4(file: BinaryIO, depth: int) -> str:
    return "LZ4-compressed, which cannot be looked into"


def _starting(*magics: bytes) -> Callable[[bytes, BinaryIO, int], bool]:
    return lambda head, file, depth: head.startswith(magics)


def _is_tar(head: bytes, file: BinaryIO, depth: int) -> bool:
    # By the checksum of its first header: the oldest archives have no magic.
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _is_zip(head: bytes, file: BinaryIO, depth: int) -> bool:
    # Bytes before it do not matter in a file. To look for its end in an archive's member would unpack all of that.
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06")) or (depth == 0 and zipfile.is_zipfile(file))


_CONTAINERS: list[tuple[Callable[[bytes, BinaryIO, int], bool], Callable[[BinaryIO, int], str | None]]] = [
    (_starting(b"\x1f\x8b"), _in_compressed(gzip.open, "gzip")),
    (_starting(b"BZh"), _in_compressed(bz2.open, "bzip2")),
    (_starting(b"\xfd7zXZ\x00", b"\x5d\x00\x00"), _in_compressed(lzma.open, "xz")),
    (_starting(b"\x28\xb5\x2f\xfd"), _in_compressed(_open_zstd, "zstd")),
    (_starting(_LZ4), _unreadable_lz4),
    (_starting(b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda"), _in_compressed(_open_zlib, "zlib")),
    (_is_tar, _in_tar),
    (_is_zip, _in_zip),
]
"""How each container is recognised, from its first bytes or the file, and what looks for pickles inside."""


def _has_objects(head: bytes) -> bool:
    # The description of the elements is text, of a length that is told before it; `O` is a pickled object.
    size, start = (head[8:10], 10) if head[6:7] == b"\x01" else (head[8:12], 12)
    description = head[start : start + int.from_bytes(size, "little")]
    return b"|O" in description or b"'O'" in description


def _starts_pickle(head: bytes, file: BinaryIO) -> bool:
    # Protocol 2 and later: PROTO, then valid opcodes. A safetensors file may start with the same two bytes
    # (its header's length), but goes on with a zero byte, which is no opcode.
    if len(head) < 3 or head[0] != 0x80 or not 2 <= head[1] <= 5:
        return False
    file.seek(0)
    operations = pickletools.genops(_Operands(file))  # type: ignore[arg-type]
    try:
        next(operations)
        next(operations)
    except _LongLine:
        return True
    except _NO_PICKLE:
        return False
    return True


class _LongLine(Exception):
    """A line longer than any text has, and which ends."""


_NO_PICKLE = (ValueError, StopIteration, UnicodeDecodeError, IndexError, OverflowError, OSError)


class _Skipped(bytes):
    """Stands for an operand too long to be read: it is empty but for its length, which is what is looked at."""

    length: int

    def __len__(self) -> int:
        return self.length


class _Operands:
    """A file for `genops` that never reads an operand longer than a limit into memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        if size <= _MAX_OPERAND_BYTES:
            return self._file.read(size)
        self._file.seek(self._file.tell() + size)  # where that is past the end, no operation follows
        skipped = _Skipped()
        skipped.length = size
        return skipped

    def readline(self) -> bytes:
        line = self._file.readline(_MAX_OPERAND_BYTES)
        if len(line) < _MAX_OPERAND_BYTES or line.endswith(b"\n"):
            return line
        # Weights may begin like a text pickle and need not have any line end.
        while line:
            line = self._file.readline(_MAX_OPERAND_BYTES)
            if line.endswith(b"\n"):
                raise _LongLine
        return b""

    def rest_is_blank(self) -> bool:
        return not self._file.read(_HEAD_BYTES).strip()


def _is_text_pickle(file: BinaryIO) -> bool:
    count, operands, stack = 0, _Operands(file), _Stack()
    runs_code = False
    try:
        for operation, argument, _ in pickletools.genops(operands):  # type: ignore[arg-type]
            count += 1
            runs_code = runs_code or operation.name in _RUNS_CODE
            if operation.name == "STOP":
                # Prose such as "N." parses too: count it only if it could run code or fills the file.
                return runs_code or (count > 2 and operands.rest_is_blank())
            stack.take(operation, argument)
            if stack.has_called or count > _MAX_OPERATIONS:
                return True
    except _LongLine:
        return True
    except _NO_PICKLE:
        return False
    return False


class _Stack:
    """What lies on the unpickler's stack: it runs what is called before it meets the end, which need never come."""

    def __init__(self) -> None:
        self.has_called = False
        self._is_mark: list[bool] = []
        self._has_imported = False
        self._is_broken = False

    def take(self, operation: Any, argument: Any) -> None:
        """Do as the operation does; from where an unpickler would fail, nothing is called any more."""
        name, before, after = operation.name, operation.stack_before, operation.stack_after
        if name in ("GLOBAL", "INST") and not _NAMES.fullmatch(argument):
            self._is_broken = True  # no module has such a name
        needed = len(before)
        if pickletools.markobject in before:
            needed = before.index(pickletools.markobject)
            while self._is_mark and not self._is_mark.pop():
                pass
        if needed > len(self._is_mark):
            self._is_broken = True
        del self._is_mark[len(self._is_mark) - needed :]
        self._is_mark += [item is pickletools.markobject for item in after]
        self._has_imported = self._has_imported or name in _IMPORTS
        self.has_called = self.has_called or (name in _CALLS and self._has_imported and not self._is_broken)
