"""Recognise pickles by their content, whatever the file is called."""

import bz2
import gzip
import io
import lzma
import pickletools
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

_HEAD_BYTES = 1 << 16
_MAX_TEXT_PICKLE_BYTES = 16 << 20  # protocols 0 and 1 have no mark at the start: the whole file is parsed
_RUNS_CODE = {
    "GLOBAL",
    "STACK_GLOBAL",
    "INST",
    "OBJ",
    "REDUCE",
    "BUILD",
    "NEWOBJ",
    "NEWOBJ_EX",
    "EXT1",
    "EXT2",
}
_COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}


def why_pickle(path: Path) -> str | None:
    """Say in a few words why the file is a pickle or holds one; None when it does not."""
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
        for magic, opener in _COMPRESSED.items():
            if head.startswith(magic):
                file.seek(0)
                return _in_compressed(opener(file))
        if zipfile.is_zipfile(file):
            file.seek(0)
            return _in_zip(file)
    if head[257:262] == b"ustar" and b"pickle" in head:
        return "a tar archive with a pickle, as old torch.save wrote"
    if head.startswith(b"\x93NUMPY") and b"|O" in head[:256]:
        return "a NumPy file of pickled objects"
    if _starts_pickle(head):
        return "a pickle"
    if path.stat().st_size <= _MAX_TEXT_PICKLE_BYTES and _is_text_pickle(path.read_bytes()):
        return "a pickle (protocol 0 or 1)"
    return None


def _in_compressed(file: BinaryIO) -> str | None:
    try:
        head = file.read(_HEAD_BYTES)
    except (OSError, EOFError, lzma.LZMAError):
        return None
    return "a compressed pickle" if _starts_pickle(head) or _is_text_pickle(head) else None


def _in_zip(file: BinaryIO) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if member.filename.endswith((".pkl", ".pickle")):
                    return f"a zip archive with {member.filename}, as torch.save writes"
                with archive.open(member) as content:
                    head = content.read(_HEAD_BYTES)
                if _starts_pickle(head) or _is_text_pickle(head) or head.startswith(b"\x93NUMPY") and b"|O" in head:
                    return f"a zip archive with the pickle {member.filename}"
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError):
        return "a zip archive that cannot be read through"
    return None


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


def _is_text_pickle(data: bytes) -> bool:
    names = []
    try:
        for operation, _, position in pickletools.genops(data):
            names.append(operation.name)
            if operation.name == "STOP":
                # Prose such as "N." parses too: count it only if it could run code or fills the file.
                return bool(_RUNS_CODE & set(names)) or (len(names) > 2 and not data[(position or 0) + 1 :].strip())
    except (ValueError, UnicodeDecodeError, IndexError, OverflowError):
        return False
    return False
