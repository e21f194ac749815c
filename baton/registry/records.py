"""The numbered records of a model: its versions, what was deleted, and each alias with its history.

Blobs and manifests are named after their content; a record is not, so it carries `sha256` over the rest of it and over
its place: neither a flipped bit nor another record put there passes for what was written.
"""

import json
import re
import uuid
from contextlib import suppress
from typing import Any, NamedTuple

from baton.errors import UserError
from baton.registry.manifest import canonical, digest_of
from baton.registry.reference import check_alias
from baton.registry.stores import Store

_RECORD = re.compile(r"([0-9]{7})\.json")
_FIELD_TYPES = {"digest": (str,), "to": (int, type(None)), "why": (str,), "policy": (dict,)}
_RESTORE = "Restore it from a backup, or by `baton fsck --from REGISTRY`."


def versions_folder(name: str) -> str:
    """Where the version records of a model lie."""
    return f"models/{name}/versions"


def tombstones_folder(name: str) -> str:
    """Where the records of deleted versions lie, each under its version's number."""
    return f"models/{name}/tombstones"


def alias_folder(name: str, alias: str) -> str:
    """Where the records of an alias lie."""
    return f"models/{name}/aliases/{alias}"


def record_path(folder: str, number: int) -> str:
    """Where record `number` lies."""
    return f"{folder}/{number:07d}.json"


def numbers(store: Store, folder: str) -> list[int]:
    """The numbers of the records in `folder`, ascending; other files are left to `verify`."""
    return [int(match[1]) for name in store.list(folder) if (match := _RECORD.fullmatch(name))]


class Listed(NamedTuple):
    """The numbers of a model's versions, ascending: all that were ever given, and those that were deleted."""

    given: list[int]
    deleted: set[int]


def listed(store: Store) -> dict[str, Listed]:
    """The models of a registry by name, sorted, by one listing; those without a version record are left out."""
    found: dict[str, Listed] = {}
    for path in sorted(store.paths("models")):
        parts = path.split("/")
        if len(parts) != 5 or not (match := _RECORD.fullmatch(parts[4])):
            continue
        model = found.setdefault(f"{parts[1]}/{parts[2]}", Listed([], set()))
        if parts[3] == "versions":
            model.given.append(int(match[1]))
        elif parts[3] == "tombstones":
            model.deleted.add(int(match[1]))
    return {name: model for name, model in sorted(found.items()) if model.given}


def read(store: Store, folder: str, number: int, field: str) -> dict[str, Any]:
    """One record, which must have `field` (digest, to, why or policy); raises UserError that names a damaged one."""
    path = record_path(folder, number)
    try:
        return parse(store, path, store.get(path), field)
    except FileNotFoundError as error:
        raise UserError(f"{store.describe(path)} is missing.") from error


def parse(store: Store, path: str, data: bytes, field: str) -> dict[str, Any]:
    """A record from its bytes; raises UserError that names a damaged one."""
    record = unsealed(path, data, store.describe(path))
    if field not in record or type(record[field]) not in _FIELD_TYPES[field]:
        raise UserError(f"{store.describe(path)} is damaged: no field {field!r}. Restore it from a backup.")
    return record


def sealed(path: str, record: dict[str, Any]) -> bytes:
    """A record's bytes as they are stored at `path`: canonical JSON with `sha256` over the path and all the rest."""
    assert "sha256" not in record
    return canonical({**record, "sha256": _seal(path, record)})


def unsealed(path: str, data: bytes, where: str) -> dict[str, Any]:
    """The record that `sealed` made for `path`, without its `sha256`; raises UserError that names `where`."""
    try:
        record = json.loads(data)
        is_sound = isinstance(record, dict) and canonical(record) == data
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is damaged: not JSON ({error}). {_RESTORE}") from error
    if not is_sound:
        raise UserError(f"{where} is damaged: not a record in canonical JSON. {_RESTORE}")
    expected = record.pop("sha256", None)
    found = _seal(path, record)
    if expected != found:
        raise UserError(
            f"{where} is damaged, or belongs elsewhere: expected sha256:{expected}, found sha256:{found}. {_RESTORE}"
        )
    return record


def _seal(path: str, record: dict[str, Any]) -> str:
    return digest_of(canonical({"path": path, "record": record})).removeprefix("sha256:")


def read_all(store: Store, folder: str, wanted: list[int], field: str) -> dict[int, dict[str, Any]]:
    """Several records, many at a time where the store is far away; raises UserError that names a bad one."""
    paths = {number: record_path(folder, number) for number in wanted}
    found = store.get_many(list(paths.values()))
    for path in paths.values():
        if path not in found:
            raise UserError(f"{store.describe(path)} is missing.")
    return {number: parse(store, path, found[path], field) for number, path in paths.items()}


def read_sound(store: Store, folder: str, wanted: list[int], field: str) -> dict[int, dict[str, Any]]:
    """As `read_all`, without the records that are missing or damaged."""
    paths = {record_path(folder, number): number for number in wanted}
    found = {}
    for path, data in store.get_many(list(paths)).items():
        with suppress(UserError):
            found[paths[path]] = parse(store, path, data, field)
    return found


def read_versions(store: Store, wanted: list[tuple[str, int]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Version records of many models by name and number, without those that are missing or damaged."""
    paths = {record_path(versions_folder(name), number): (name, number) for name, number in wanted}
    found = {}
    for path, data in store.get_many(list(paths)).items():
        with suppress(UserError):
            found[paths[path]] = parse(store, path, data, "digest")
    return found


def write(store: Store, folder: str, number: int, record: dict[str, Any]) -> bool:
    """Write record `number` unless it exists; True when this call wrote it."""
    # The nonce tells a writer whose answer was lost that the record it then finds is its own.
    path = record_path(folder, number)
    return store.put_if_absent(path, sealed(path, {**record, "nonce": uuid.uuid4().hex}))


def alias_names(store: Store, name: str) -> list[str]:
    """The aliases of a model, sorted."""
    return [alias for alias in store.list(f"models/{name}/aliases") if is_alias(alias)]


def is_alias(alias: str) -> bool:
    """Whether `alias` can name a version."""
    try:
        check_alias(alias)
    except UserError:
        return False
    return True
