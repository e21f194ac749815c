"""A bundle's index, `bundle.json`: what lies in the bundle, in which order, and what the receiver must have."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from baton.errors import UserError
from baton.registry.manifest import canonical, digest_of, is_safe_path, manifest_path
from baton.registry.reference import check_name
from baton.registry.reference import parse as parse_reference
from baton.registry.stores import blob_path
from baton.registry.travel.closure import Named

FORMAT = "baton.bundle/1"
INDEX = "bundle.json"
MAX_INDEX_BYTES = 32 << 20
MAX_FILES = 100_000
MAX_RECORD_BYTES = 16 << 20
"""A manifest or attestation larger than this is not read: they are kept in memory until all is verified."""
MAX_RECORDS_BYTES = 256 << 20
_MAX_BLOB_BYTES = 1 << 60
_HEX = "[0-9a-f]{64}"
_PATHS = (
    re.compile(rf"manifests/sha256/({_HEX})\.json"),
    re.compile(rf"attestations/{_HEX}/({_HEX})\.json"),
    re.compile(rf"blobs/sha256/({_HEX})"),
)
"""The grammar of names, in the order in which files of each kind follow each other."""
_FIELDS = {"format": str, "registry": str, "versions": list, "without": dict, "files": list, "sha256": str}
_WITHOUT = {"refs": list, "manifests": list, "blobs": list}


class File(NamedTuple):
    """A file of a bundle: its name, bytes and hex digest."""

    path: str
    size: int
    sha256: str


class Blob(NamedTuple):
    """A blob that the receiver must have."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Index:
    """What a bundle holds. `files` in the order of the bundle: manifests, attestations, blobs, each by name."""

    registry: str  # the id of the registry that it was exported from
    versions: list[Named]  # those with a name there, ancestors first; the last one is what was exported
    files: list[File]
    without_refs: list[str]  # what the receiver was said to have, for people
    without_manifests: list[str]  # digests that are needed and not in the bundle
    without_blobs: list[Blob]

    def of_kind(self, folder: str) -> list[File]:
        """Its manifests, attestations or blobs."""
        return [file for file in self.files if file.path.startswith(f"{folder}/")]


def to_bytes(index: Index) -> bytes:
    """The one spelling of an index: canonical JSON with a digest over itself."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "registry": index.registry,
        "versions": [one._asdict() for one in index.versions],
        "files": [file._asdict() for file in index.files],
        "without": {
            "refs": index.without_refs,
            "manifests": index.without_manifests,
            "blobs": [blob._asdict() for blob in index.without_blobs],
        },
    }
    # Files are known by their digests, names are not: without this a flipped bit would rename a model.
    return canonical(content | {"sha256": _own_digest(content)})


def _own_digest(content: dict[str, Any]) -> str:
    return digest_of(canonical(content)).removeprefix("sha256:")


def order(path: str) -> tuple[int, str]:
    """Where a file belongs in a bundle: manifests first, so that all is judged before the first large file."""
    return next(rank for rank, grammar in enumerate(_PATHS) if grammar.fullmatch(path)), path


def from_bytes(data: bytes, where: str) -> Index:
    """Read an index strictly; raises UserError that names `where`."""
    try:
        content = json.loads(data)
        is_canonical = isinstance(content, dict) and canonical(content) == data
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: its {INDEX} is not JSON ({error}).") from error
    if not is_canonical:
        raise UserError(f"{where}: its {INDEX} is not an object in canonical JSON.")
    if content.get("format") != FORMAT:
        raise UserError(f"{where}: expected format {FORMAT!r}, found {content.get('format')!r}. Update Baton?")
    problem = _problem(content)
    if problem:
        raise UserError(f"{where}: its {INDEX} is not one that Baton writes: {problem}.")
    return Index(
        registry=content["registry"],
        versions=[Named(**one) for one in content["versions"]],
        files=[File(**file) for file in content["files"]],
        without_refs=content["without"]["refs"],
        without_manifests=content["without"]["manifests"],
        without_blobs=[Blob(**blob) for blob in content["without"]["blobs"]],
    )


def _problem(content: dict[str, Any]) -> str | None:
    if not _has(content, _FIELDS) or not _has(content["without"], _WITHOUT):
        return f"expected the fields {', '.join(_FIELDS)}"
    if content["sha256"] != _own_digest({key: value for key, value in content.items() if key != "sha256"}):
        return "it has changed since it was written (its own sha256 differs)"
    if not re.fullmatch("[0-9a-f]{32}", content["registry"]):
        return f"bad registry id {content['registry']!r}"
    return (
        _problem_of_files(content["files"])
        or _problem_of_versions(content["versions"], {file["path"] for file in content["files"]})
        or _problem_of_without(content["without"], {file["path"] for file in content["files"]})
    )


def _problem_of_files(files: list[Any]) -> str | None:
    if not 0 < len(files) <= MAX_FILES:
        return f"it names {len(files)} files; from 1 to {MAX_FILES} are read"
    seen: set[str] = set()
    before = (0, "")
    for file in files:
        if not _has(file, {"path": str, "size": int, "sha256": str}):
            return f"bad entry {file!r}"
        path, size = file["path"], file["size"]
        match = next((found for grammar in _PATHS if (found := grammar.fullmatch(path))), None)
        if path in seen:
            return f"{path} occurs twice"
        if path.casefold() in seen:
            return f"{path!r} differs from another name in capitals only"
        if match is None:
            return f"{path!r} is {'no name of a file in a bundle' if is_safe_path(path) else 'an unsafe name'}"
        if match[1] != file["sha256"]:
            return f"{path} would have the digest {file['sha256']}"
        if not 0 <= size <= (_MAX_BLOB_BYTES if path.startswith("blobs/") else MAX_RECORD_BYTES):
            return f"{path} would have {size} bytes"
        if order(path) <= before:
            return f"{path} stands at the wrong place"
        before = order(path)
        seen.add(path)
    if sum(file["size"] for file in files if not file["path"].startswith("blobs/")) > MAX_RECORDS_BYTES:
        return f"its manifests and attestations have more than {MAX_RECORDS_BYTES} bytes"
    return None


def _problem_of_versions(versions: list[Any], paths: set[str]) -> str | None:
    if not versions:
        return "it names no version"
    seen: set[str] = set()
    for one in versions:
        if not _has(one, {"digest": str, "name": str, "number": int, "by": str}) or not 0 < one["number"] < 10**7:
            return f"bad version {one!r}"
        try:
            check_name(one["name"])
        except UserError as error:
            return str(error).removesuffix(".")
        if manifest_path(one["digest"]) not in paths:
            return f"{one['name']}:{one['number']} has a manifest elsewhere: {one['digest']!r}"
        if one["digest"] in seen:
            return f"{one['digest']} is named twice"
        seen.add(one["digest"])
    return None


def _problem_of_without(without: dict[str, Any], paths: set[str]) -> str | None:
    try:
        for ref in without["refs"]:
            parse_reference(ref if isinstance(ref, str) else repr(ref))
    except UserError as error:
        return str(error).removesuffix(".")
    digests, blobs = without["manifests"], without["blobs"]
    for digest in digests:
        if not isinstance(digest, str) or not re.fullmatch(f"sha256:{_HEX}", digest):
            return f"bad digest {digest!r}"
    for blob in blobs:
        if not _has(blob, {"sha256": str, "size": int}) or not re.fullmatch(_HEX, blob["sha256"]):
            return f"bad blob {blob!r}"
    if {manifest_path(digest) for digest in digests} & paths or {blob_path(b["sha256"]) for b in blobs} & paths:
        return "it holds what it says to leave out"
    if len(digests) + len(blobs) > MAX_FILES:
        return f"it leaves out more than {MAX_FILES} files"
    return None


def _has(value: Any, fields: Mapping[str, type]) -> bool:
    """Whether a value is an object with exactly these fields, of exactly these types."""
    return (
        isinstance(value, dict)
        and value.keys() == fields.keys()
        and all(type(value[key]) is expected for key, expected in fields.items())
    )
