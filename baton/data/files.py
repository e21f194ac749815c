"""Data files: found from a recipe's path, digested, and read one raw row at a time."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from baton.data.objects import ObjectFile, digest_objects, is_object_url, locate_objects
from baton.errors import UserError, nearest

DataFile = Path | ObjectFile

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
_PARQUET_ROWS = 1024
"""Rows of a parquet file that are read at once: documents may be long."""
SUPPORTED = f"supported are {', '.join(SUFFIXES)}, each also with {' or '.join(COMPRESSIONS)} after it"


class Record(NamedTuple):
    """One raw row: a dict, or a str (line end included) where the file is a .txt."""

    row: Any
    file: str
    number: int  # 1-based: the line of a .txt or .jsonl, else the row

    @property
    def place(self) -> str:
        """The row's place in words, for messages."""
        return f"{self.file} {place_unit(self.file)} {self.number}"


def place_unit(file: str) -> str:
    """What a record's number counts in `file`: lines where a row is a line, else rows."""
    return "line" if _inner_suffix(file) in (".txt", ".jsonl") else "row"


def locate(path: str, folder: Path) -> Sequence[DataFile] | None:
    """The files, sorted, of a `path` (file, folder or glob; relative to `folder`), or None: a hub id.

    The path may be the URL of an object, a prefix or a pattern in an object store.

    A hub id is `org/name` with no local file or folder of that name, and none named `org` either: a misspelt
    local path must not be looked up on the hub. Raises UserError where nothing is found or a suffix is not
    read.
    """
    if is_object_url(path):
        return _readable(path, locate_objects(path))
    local = folder / Path(path).expanduser()
    if local.is_file():
        files = [local]
    elif local.is_dir():
        found = (file for file in local.rglob("*") if file.is_file())
        files = sorted(file for file in found if _inner_suffix(file.name) and not _is_hidden(file, local))
        if not files:
            raise UserError(f"the folder {local} holds no data files; {SUPPORTED}")
    elif glob.escape(path) != path:
        matches = glob.glob(os.path.expanduser(path), root_dir=folder, recursive=True)
        files = sorted(folder / match for match in matches if (folder / match).is_file())
        if not files:
            raise UserError(f"the pattern {path} matches no file under {folder}")
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) and not _inner_suffix(path) and not local.parent.exists():
        return None
    else:
        raise _missing(local)
    for file in files:
        if not _inner_suffix(file.name):
            raise UserError(f"{file}: the suffix {''.join(file.suffixes) or '(none)'} is not read; {SUPPORTED}")
    return files


def _readable(path: str, objects: list[ObjectFile]) -> list[ObjectFile]:
    """Those of a listing that are data files."""
    files = [file for file in objects if _inner_suffix(file.name) and not file.name.startswith(".")]
    if not files:
        raise UserError(f"{path} holds no data files; {SUPPORTED}")
    return files


def digest(data_files: Sequence[DataFile]) -> tuple[str, int]:
    """(sha256, size in bytes) of the raw files.

    One file: its own sha256, as `sha256sum` prints it. Several: over the sorted names (relative to the folder
    that they share) with their sha256. Of objects in a store: over their names, sizes and ETags.
    """
    objects = [file for file in data_files if isinstance(file, ObjectFile)]
    if objects:
        return digest_objects(objects)
    files = [file for file in data_files if isinstance(file, Path)]
    sizes, digests = 0, []
    shared = os.path.commonpath([file.parent for file in files])
    for file in files:
        try:
            with file.open("rb") as stream:
                digests.append((file.relative_to(shared).as_posix(), hashlib.file_digest(stream, "sha256").hexdigest()))
            sizes += file.stat().st_size
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None
    if len(files) == 1:
        return digests[0][1], sizes
    return hashlib.sha256(json.dumps(sorted(digests)).encode()).hexdigest(), sizes


def read_records(files: Sequence[DataFile]) -> Iterator[Record]:
    """The raw rows of the files, in order. Raises UserError for a file that is empty, damaged or misnamed."""
    for file in files:
        number = 0
        compression = file.suffix.lower() if file.suffix.lower() in COMPRESSIONS else ""
        try:
            with _open(file, compression) as stream:
                for number, row in _READERS[_inner_suffix(file.name)](stream, file):
                    yield Record(row, str(file), number)
        except EOFError:
            raise UserError(f"{file} is cut off: its compressed data ends early. Copy it again") from None
        except (OSError, zlib.error) as error:
            raise UserError(f"{file} cannot be read: {error}. Is it whole, and is its suffix right?") from None
        if not number:
            raise UserError(f"{file} is empty; expected at least one row")


def read_hub(
    path: str, subset: str | None, split: str, revision: str | None, streaming: bool = False
) -> Iterator[Record]:
    """The rows of a hub dataset, downloaded whole or as they come (`streaming`).

    Raises UserError if it cannot be loaded (absent, offline, no such subset or split).
    """
    import datasets

    how = {"streaming": True} if streaming else {}
    try:
        rows = datasets.load_dataset(path, subset, split=split, revision=revision, **how)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        why = (str(error).splitlines() or [repr(error)])[0]
        raise UserError(
            f"{path}: there is no such file or folder, and as a hub dataset (subset {subset or 'not given'}, split "
            f"{split}, revision {revision or 'not given'}) it could not be loaded: {why}"
        ) from None
    for number, row in enumerate(rows, 1):
        yield Record(row, f"{path} ({split})", number)


def describe(value: object) -> str:
    """What a JSON value is, in words, for messages."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = ((str, "a string"), (int | float, "a number"), (list, "a list"), (dict, "an object"))
    return next((name for types, name in names if isinstance(value, types)), type(value).__name__)


def _inner_suffix(name: str) -> str:
    """The suffix in front of a compression's, if it is one that is read, else the empty string."""
    path = Path(name.lower())
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    return suffix if suffix in SUFFIXES else ""


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _missing(local: Path) -> UserError:
    wanted = local
    while not wanted.parent.is_dir():
        wanted = wanted.parent
    siblings = sorted(item.name for item in wanted.parent.iterdir() if not item.name.startswith("."))
    near = nearest(wanted.name, siblings) or siblings[:5]
    return UserError(f"no data at {local}: in {wanted.parent} there is {', '.join(near) or 'nothing'}")


def _open(file: DataFile, compression: str) -> IO[bytes]:
    if compression == ".gz":
        return io.BufferedReader(gzip.open(file if isinstance(file, Path) else file.open()))  # type: ignore[arg-type]
    if compression == ".zst":
        import pyarrow

        # the zstandard package reads a cut-off file, or the first frame of several, without any error
        raw = pyarrow.OSFile(str(file), "rb") if isinstance(file, Path) else pyarrow.PythonFile(file.open(), "r")
        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    return file.open("rb") if isinstance(file, Path) else file.open()


def _decode(raw: bytes, file: DataFile, line: int) -> str:
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise UserError(f"{file} line {line} is not UTF-8: save the file as UTF-8") from None


def _read_txt(stream: IO[bytes], file: DataFile) -> Iterator[tuple[int, str]]:
    for number, raw in enumerate(stream, 1):
        yield number, _decode(raw, file, number)


def _read_jsonl(stream: IO[bytes], file: DataFile) -> Iterator[tuple[int, dict]]:
    for number, raw in enumerate(stream, 1):
        line = _decode(raw, file, number).strip()
        if line:
            yield number, _object(_parse(line, f"{file} line {number}"), f"{file} line {number}")


def _read_json(stream: IO[bytes], file: DataFile) -> Iterator[tuple[int, dict]]:
    text = _decode(stream.read(), file, 1)
    if not text.strip():
        return
    rows = _parse(text, str(file))
    if not isinstance(rows, list):
        raise UserError(f"{file} holds {describe(rows)}; expected a list of rows. One object a line is .jsonl")
    for number, row in enumerate(rows, 1):
        yield number, _object(row, f"{file} row {number}")


def _read_parquet(stream: IO[bytes], file: DataFile) -> Iterator[tuple[int, dict]]:
    import pyarrow
    from pyarrow import parquet

    content = stream.read() if file.suffix.lower() in COMPRESSIONS else b""
    if not content and not stream.peek(1):  # type: ignore[attr-defined]
        return
    number = 0
    try:
        for batch in parquet.ParquetFile(io.BytesIO(content) if content else stream).iter_batches(_PARQUET_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file} is not a parquet file, or is damaged: {error}") from None


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f" at its line {error.lineno}" if error.lineno > 1 else ""
        hint = ". One object a line is .jsonl" if error.msg == "Extra data" and at else ""
        raise UserError(f"{place} is not JSON{at}: {error.msg}{hint}") from None
    except RecursionError:
        raise UserError(f"{place} is not a row: its JSON is nested too deeply") from None


def _object(row: Any, place: str) -> dict:
    if not isinstance(row, dict):
        raise UserError(f"{place} is {describe(row)}; expected an object with named fields")
    return row


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
