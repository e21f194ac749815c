"""Recognise pickles by their content, whatever the file is called."""

import bz2
import gzip
import io
import lzma
import pickletools
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

_HEAD_BYTES = 1 << 16
_MAX_DEPTH = 4
_MAX_LINE_BYTES = 64 << 20
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
    if _starts_pickle(head):
        return "a pickle"
    if head.startswith(b"\x93NUMPY") and _has_objects(head):
        return "a NumPy file of pickled objects"
    file.seek(0)
    if _is_text_pickle(file):
        return "a pickle (protocol 0 or 1)"
    for looks, look in _CONTAINERS:
        file.seek(0)
        if looks(head, file):
            if depth == _MAX_DEPTH:
                return "an archive in an archive in an archive, too deep to look into"
            file.seek(0)
            return look(file, depth + 1)
    return None


def _in_compressed(opener: Callable[[BinaryIO], Any], kind: str) -> Callable[[BinaryIO, int], str | None]:
    def look(file: BinaryIO, depth: int) -> str | None:
        try:
            with opener(file) as content:
                found = _why(content, depth)
        except _UNREADABLE:
            return None  # the same bytes by chance: what does not decompress cannot be loaded either
        return found and f"{kind}-compressed: {found}"

    return look


def _in_zip(file: BinaryIO, depth: int) -> str | None:
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


def _in_zlib(file: BinaryIO, depth: int) -> str | None:
    # joblib's own format; it has no seekable reader, and a pickle shows at its beginning
    try:
        head = zlib.decompressobj().decompress(file.read(_HEAD_BYTES), _HEAD_BYTES)
    except zlib.error:
        return None
    found = _starts_pickle(head) or _is_text_pickle(io.BytesIO(head))
    return "zlib-compressed: a pickle, as joblib writes" if found else None


def _open_zstd(file: BinaryIO) -> Any:
    import zstandard

    return io.BytesIO(zstandard.ZstdDecompressor().stream_reader(file).read(_HEAD_BYTES))


def _unreadable_lz4(file: BinaryIO, depth: int) -> str:
    return "LZ4-compressed, which cannot be looked into"


def _starting(*magics: bytes) -> Callable[[bytes, BinaryIO], bool]:
    return lambda head, file: head.startswith(magics)


_CONTAINERS: list[tuple[Callable[[bytes, BinaryIO], bool], Callable[[BinaryIO, int], str | None]]] = [
    (_starting(b"\x1f\x8b"), _in_compressed(gzip.open, "gzip")),
    (_starting(b"BZh"), _in_compressed(bz2.open, "bzip2")),
    (_starting(b"\xfd7zXZ\x00", b"\x5d\x00\x00"), _in_compressed(lzma.open, "xz")),
    (_starting(b"\x28\xb5\x2f\xfd"), _in_compressed(_open_zstd, "zstd")),
    (_starting(_LZ4), _unreadable_lz4),
    (_starting(b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda"), _in_zlib),
    (lambda head, file: head[257:262] == b"ustar", _in_tar),
    (lambda head, file: zipfile.is_zipfile(file), _in_zip),
]
"""How each container is recognised, from its first bytes or the file, and what looks for pickles inside."""


def _has_objects(head: bytes) -> bool:
    # The description of the elements is text, of a length that is told before it; `O` is a pickled object.
    size, start = (head[8:10], 10) if head[6:7] == b"\x01" else (head[8:12], 12)
    description = head[start : start + int.from_bytes(size, "little")]
    return b"|O" in description or b"'O'" in description


def _starts_pickle(head: bytes) -> bool:
    # Protocol 2 and later: PROTO, then valid opcodes. A safetensors file may start with the same two bytes
    # (its header's length), but goes on with a zero byte, which is no opcode.
    if len(head) < 3 or head[0] != 0x80 or not 2 <= head[1] <= 5:
        return False
    operations = pickletools.genops(io.BytesIO(head))
    try:
        next(operations)
        next(operations)
    except (ValueError, StopIteration, UnicodeDecodeError, IndexError):
        return False
    return True


class _Lines:
    """A file whose lines end at a limit: weights need not have any line end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, _MAX_LINE_BYTES))

    def readline(self) -> bytes:
        return self._file.readline(_MAX_LINE_BYTES)

    def rest_is_blank(self) -> bool:
        return not self._file.read(_HEAD_BYTES).strip()


def _is_text_pickle(file: BinaryIO) -> bool:
    count, runs_code, lines = 0, False, _Lines(file)
    try:
        for operation, _, _ in pickletools.genops(lines):  # type: ignore[arg-type]
            count += 1
            runs_code = runs_code or operation.name in _RUNS_CODE
            if operation.name == "STOP":
                # Prose such as "N." parses too: count it only if it could run code or fills the file.
                return runs_code or (count > 2 and lines.rest_is_blank())
    except (ValueError, UnicodeDecodeError, IndexError, OverflowError):
        return False
    return False
