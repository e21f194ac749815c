"""The numbered records of a model: its versions, and each alias with its history."""

import json
import re
from typing import Any

from baton.errors import UserError
from baton.registry.manifest import canonical
from baton.registry.reference import check_alias
from baton.registry.store import LocalStore

_RECORD = re.compile(r"([0-9]{7})\.json")


def versions_folder(name: str) -> str:
    """Where the version records of a model lie."""
    return f"models/{name}/versions"


def alias_folder(name: str, alias: str) -> str:
    """Where the records of an alias lie."""
    return f"models/{name}/aliases/{alias}"


def record_path(folder: str, number: int) -> str:
    """Where record `number` lies."""
    return f"{folder}/{number:07d}.json"


def numbers(store: LocalStore, folder: str) -> list[int]:
    """The numbers of the records in `folder`, ascending; other files are left to `verify`."""
    return [int(match[1]) for name in store.list(folder) if (match := _RECORD.fullmatch(name))]


def read(store: LocalStore, folder: str, number: int, field: str) -> dict[str, Any]:
    """One record, which must have `field` (`digest` or `to`); raises UserError that names a damaged one."""
    path = record_path(folder, number)
    try:
        record = json.loads(store.get(path))
    except FileNotFoundError as error:
        raise UserError(f"{store.path(path)} is missing.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{store.path(path)} is damaged: not JSON ({error}). Restore it from a backup.") from error
    expected = str if field == "digest" else int
    if not isinstance(record, dict) or not isinstance(record.get(field), expected):
        raise UserError(f"{store.path(path)} is damaged: no field {field!r}. Restore it from a backup.")
    return record


def write(store: LocalStore, folder: str, number: int, record: dict[str, Any]) -> bool:
    """Write record `number` unless it exists; True when this call wrote it."""
    return store.put_if_absent(record_path(folder, number), canonical(record))


def alias_names(store: LocalStore, name: str) -> list[str]:
    """The aliases of a model, sorted."""
    return [alias for alias in store.list(f"models/{name}/aliases") if is_alias(alias)]


def is_alias(alias: str) -> bool:
    """Whether `alias` can name a version."""
    try:
        check_alias(alias)
    except UserError:
        return False
    return True
