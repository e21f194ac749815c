"""Manifests: canonical JSON, its digest, and a strict check of what a registry holds."""

import hashlib
import json
import math
import os
import re
import unicodedata
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

from baton.errors import UserError
from baton.registry import manifest_fields
from baton.registry.version import KINDS, WHOLE_KINDS

FORMAT = "baton.manifest/1"
_HEX = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NONE = type(None)
_PATH_INSIDE = re.compile(r"(?:(?<==)|(?<=file://))/[^\s\"'=;,/]+/[^\s\"'=;,]+")
"""An absolute path in an address or a command's option."""
_MAX_PATH_BYTES, _MAX_NAME_BYTES = 1024, 255  # what every file system can store
_FIELDS: dict[str, tuple[type, ...]] = {
    "format": (str,),
    "kind": (str,),
    "files": (list,),
    "architecture": (dict,),
    "dtype": (str, dict),
    "vocabulary": (dict,),
    "tokenizer_digest": (str,),
    "chat_template_digest": (str, _NONE),
    "base": (str, _NONE),
    "parents": (dict,),
    "data": (list,),
    "recipe": (dict,),
    "code": (dict,),
    "packages": (dict,),
    "metrics": (dict,),
    "licence": (str, _NONE),
    "licences": (dict,),
    "build_key": (str, _NONE),
    "probe": (dict,),
}


def canonical(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def digest_of(data: bytes) -> str:
    """`sha256:<hex>` of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def manifest_path(digest: str) -> str:
    """Where the manifest with this digest lies in a store."""
    return f"manifests/sha256/{digest.removeprefix('sha256:')}.json"


def identity(manifest: dict[str, Any]) -> str:
    """A digest of all but the probe's outputs, whose last digits depend on the machine that recorded them."""
    return digest_of(canonical({key: value for key, value in manifest.items() if key != "probe"}))


def parse(data: bytes, digest: str, where: str) -> dict[str, Any]:
    """Check a manifest's bytes against its digest and form; raises UserError that names `where`."""
    if digest_of(data) != digest:
        raise UserError(
            f"{where} is damaged: expected {digest}, found {digest_of(data)}. "
            "Restore the file from a backup or another registry."
        )
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}).") from error
    for problem in _problems(manifest, data):
        raise UserError(f"{where} is not a manifest that this Baton reads: {problem}.")
    return manifest


def _problems(manifest: Any, data: bytes) -> list[str]:
    if not isinstance(manifest, dict):
        return [f"expected an object, found {type(manifest).__name__}"]
    if manifest.get("format") != FORMAT:
        return [f"expected format {FORMAT!r}, found {manifest.get('format')!r}"]
    problems = [f"field {key!r} is missing" for key in _FIELDS if key not in manifest]
    problems += [f"unknown field {key!r}" for key in manifest if key not in _FIELDS]
    for key, types in _FIELDS.items():
        if key in manifest and type(manifest[key]) not in types:
            problems.append(f"field {key!r} has type {type(manifest[key]).__name__}")
    if problems:
        return problems
    if manifest["kind"] not in KINDS:
        problems.append(f"unknown kind {manifest['kind']!r}")
    # a reward or value model is an adapter on a base, or a whole classifier without one
    if manifest["kind"] == "adapter" and manifest["base"] is None:
        problems.append("kind adapter with base None")
    if manifest["kind"] in WHOLE_KINDS and manifest["base"] is not None:
        problems.append(f"kind {manifest['kind']} with base {manifest['base']}")
    digests = [manifest["tokenizer_digest"], manifest["chat_template_digest"], manifest["base"]]
    for digest in [*digests, *manifest["parents"].values()]:
        if digest is not None and not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
            problems.append(f"bad digest {digest!r}")
    problems += manifest_fields.problems(manifest)
    problems += _file_problems(manifest["files"])
    # `get` puts an adapter's base at base/.
    if not problems and manifest["base"] and any(lies_in_base(entry["path"]) for entry in manifest["files"]):
        problems.append("an adapter with a file at base or in base/")
    # One spelling only: otherwise the same version could have two digests.
    if not problems and not _is_canonical(manifest, data):
        problems.append("it is not canonical JSON")
    return problems


def _is_canonical(value: Any, data: bytes) -> bool:
    try:
        return canonical(value) == data
    except (ValueError, RecursionError):  # no number, half a character, nested too deeply
        return False


def _file_problems(files: list[Any]) -> list[str]:
    problems = []
    seen: set[str] = set()
    for entry in files:
        if not isinstance(entry, dict) or set(entry) != {"path", "sha256", "size"}:
            return [f"bad file entry {entry!r}"]
        path, sha256, size = entry["path"], entry["sha256"], entry["size"]
        if not isinstance(path, str) or not is_safe_path(path):
            return [f"unsafe file path {path!r:.300}"]
        # as file systems compare names that take capitals, or two spellings of é, for the same
        key = unicodedata.normalize("NFC", path).casefold()
        if key in seen:
            problems.append(f"file {path!r} occurs twice (capitals and accents' spelling aside)")
        seen.add(key)
        if not isinstance(sha256, str) or not _HEX.fullmatch(sha256):
            problems.append(f"file {path!r} has a bad sha256 {sha256!r}")
        if type(size) is not int or size < 0:
            problems.append(f"file {path!r} has a bad size {size!r}")
    # Sorted by their parts, what lies in a folder comes right after the file that has its name.
    parts = sorted(path.split("/") for path in seen)
    both = ["/".join(file) for file, following in pairwise(parts) if following[: len(file)] == file]
    return problems + [f"{path!r} is a file and a folder" for path in both]


def lies_in_base(path: str) -> bool:
    """Whether a path is `base` or below it, on a file system that takes capitals for small letters too."""
    return path.partition("/")[0].casefold() == "base"


def is_safe_path(path: str) -> bool:
    """Whether `path` is relative, stays below its folder, and can be stored and means the same on every system."""
    # Lengths first: no further look at a path of megabytes.
    if not 0 < len(path) <= _MAX_PATH_BYTES:
        return False
    if not path.isprintable() or any(character in path for character in '\\:*?"<>|'):
        return False
    if len(path.encode()) > _MAX_PATH_BYTES or max(len(part.encode()) for part in path.split("/")) > _MAX_NAME_BYTES:
        return False
    pure = PurePosixPath(path)
    return not pure.is_absolute() and str(pure) == path and not {"..", "."} & set(pure.parts)


def storable(value: Any) -> Any:
    """`value` as it goes into a manifest: JSON's types only, and no absolute path of this machine.

    An absolute path becomes `…/last-part`; a number that JSON cannot say becomes "nan", "inf" or "-inf".
    """
    if isinstance(value, dict):
        return {str(key): storable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [storable(item) for item in value]
    if isinstance(value, os.PathLike):
        value = str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        # With spaces in it, it is a path only if there is such a file: a sentence may begin with a stroke.
        if os.path.isabs(value) and value.count("/") > 1 and (not re.search(r"\s", value) or os.path.exists(value)):
            return "…/" + PurePosixPath(value).name
        return _PATH_INSIDE.sub(lambda found: "…/" + PurePosixPath(found[0]).name, value)
    assert value is None or isinstance(value, (str, bool, int, float)), f"not JSON: {type(value)}"
    return value
