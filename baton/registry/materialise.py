"""Turn a version into a plain, verified folder: in the cache, or where a person wants it."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from baton.errors import UserError
from baton.registry.checks import ADAPTER_CONFIG, adapter_configs
from baton.registry.stores import Store, blob_path
from baton.registry.stores.files import file_sha256, storage_errors_are_user_errors, sync_folder
from baton.registry.stores.scratch import move_contents, partial_folder, sweep_partial

_COPIES_AT_ONCE = 4
_configs: dict[str, bytes] = {}
"""Adapters' configurations by sha256, verified: a second look at a version asks an object store for nothing."""


def cache_root() -> Path:
    """Where versions are materialised for programs: `$BATON_CACHE`, else `.baton/cache`."""
    return Path(os.environ.get("BATON_CACHE") or ".baton/cache").absolute()


def into_cache(store: Store, digest: str, manifest: dict[str, Any], base_folder: Path | None) -> Path:
    """The cached folder of a version, made if absent and mended if a file has changed."""
    target = cache_root() / digest.removeprefix("sha256:")
    stamp_path = target.with_suffix(".stamp.json")
    expected = _expected_files(store, manifest, base_folder) if target.is_dir() else {}
    if target.is_dir() and _is_intact(target, stamp_path, expected):
        return target
    with (
        storage_errors_are_user_errors(f"materialising {digest} in {target.parent} failed"),
        partial_folder(target) as folder,
    ):
        expected = _write(store, manifest, folder, base_folder)
        while not _moved(folder, target):
            # Another process was quicker. Others may be reading its folder: replace only a damaged one.
            if _is_intact(target, stamp_path, expected):
                return target
            _move_away(target)
    _write_stamp(target, stamp_path, expected)
    return target


def into_folder(
    store: Store,
    manifest: dict[str, Any],
    target: Path,
    base: dict[str, Any] | None,
    check: Callable[[Path, Path | None], None],
) -> Path:
    """A version in a person's own folder, absent or empty; `base` is the manifest of an adapter's base.

    The base is put at `target/base`, which the adapter's configuration names by its absolute path. `check`
    gets the finished folder and its base's before they appear at `target`, and may raise.
    """
    target = target.absolute()
    with storage_errors_are_user_errors(f"writing to {target} failed"), new_folder(target) as folder:
        if base is not None:
            _write(store, base, folder / "base", None)
        _write(store, manifest, folder, target / "base" if base is not None else None)
        check(folder, folder / "base" if base is not None else None)
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` at the end; raises UserError when `target` holds something."""
    if target.is_dir():
        sweep_partial(target)  # what a command that was killed left there: the same command then starts anew
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not an empty folder; name a new one.")
    if not target.exists():
        with partial_folder(target) as folder:
            yield folder
            try:
                os.rename(folder, target)
            except OSError as error:
                raise UserError(f"{target} appeared meanwhile; name a new folder.") from error
        return
    # An existing folder may be a mount or somebody's current directory: fill it instead of replacing it.
    with partial_folder(target / "content") as folder:
        yield folder
        move_contents(folder, target, is_last=lambda path: path.name in ("config.json", ADAPTER_CONFIG))


def _moved(folder: Path, target: Path) -> bool:
    try:
        os.rename(folder, target)
    except OSError:
        if not target.is_dir():
            raise
        return False
    sync_folder(target.parent)
    return True


def _move_away(target: Path) -> None:
    # Moved before it is deleted: a process that reads the old folder keeps the files that it has open.
    with partial_folder(target) as old, suppress(FileNotFoundError):
        os.rename(target, old / "old")


def _write(store: Store, manifest: dict[str, Any], folder: Path, base_folder: Path | None) -> dict[str, str]:
    expected = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    for path in expected:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_COPIES_AT_ONCE) as copying:
        # list: the first of them that raises
        list(copying.map(lambda entry: copy_blob(store, entry, folder / entry["path"]), manifest["files"]))
    if base_folder is None:
        return expected
    for path in adapter_configs(expected):
        data = _adapter_config((folder / path).read_bytes(), base_folder)
        (folder / path).write_bytes(data)
        expected[path] = hashlib.sha256(data).hexdigest()
    return expected


def _expected_files(store: Store, manifest: dict[str, Any], base_folder: Path | None) -> dict[str, str]:
    expected = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    if base_folder is None:
        return expected
    for path in adapter_configs(expected):
        data = _stored_config(store, expected[path])
        expected[path] = hashlib.sha256(_adapter_config(data, base_folder)).hexdigest()
    return expected


def _stored_config(store: Store, sha256: str) -> bytes:
    if sha256 not in _configs:
        try:
            data = store.get(blob_path(sha256))
        except FileNotFoundError as error:
            raise _missing(store, ADAPTER_CONFIG, sha256) from error
        _require_digest(store, ADAPTER_CONFIG, sha256, hashlib.sha256(data).hexdigest())
        _configs[sha256] = data
    return _configs[sha256]


def _adapter_config(data: bytes, base_folder: Path) -> bytes:
    settings = json.loads(data) | {"base_model_name_or_path": str(base_folder), "revision": None}
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def copy_blob(store: Store, entry: dict[str, Any], target: Path) -> None:
    """Copy a blob to a new file, and check its digest; never a link that an edit could follow into the store."""
    try:
        found = store.fetch_blob(entry["sha256"], target)
    except FileNotFoundError as error:
        raise _missing(store, entry["path"], entry["sha256"]) from error
    _require_digest(store, entry["path"], entry["sha256"], found)


def _missing(store: Store, path: str, sha256: str) -> UserError:
    return UserError(
        f"{store.describe(blob_path(sha256))} is missing, the blob of {path}. "
        "Copy it from a backup or another registry."
    )


def _require_digest(store: Store, path: str, expected: str, found: str) -> None:
    if found != expected:
        raise UserError(
            f"{path} is damaged in the registry ({store.describe(blob_path(expected))}): expected "
            f"sha256:{expected}, found sha256:{found}. Copy the blob from a backup or another registry."
        )


def _is_intact(folder: Path, stamp_path: Path, expected: dict[str, str]) -> bool:
    """Whether the folder holds the expected files; those whose status is as stamped are not read again."""
    try:
        stamped = json.loads(stamp_path.read_bytes())
    except (OSError, ValueError):
        stamped = {}
    if _files_below(folder) != set(expected):
        return False
    for path, sha256 in expected.items():
        if isinstance(stamped, dict) and stamped.get(path) == [sha256, *_status(folder / path)]:
            continue
        if not (folder / path).is_file() or file_sha256(folder / path) != sha256:
            return False
        stamped = {}  # something was touched: read the rest as well, and write a new stamp
    if not stamped:
        _write_stamp(folder, stamp_path, expected)
    return True


def _write_stamp(folder: Path, stamp_path: Path, expected: dict[str, str]) -> None:
    new = stamp_path.with_name(f".{stamp_path.name}.{uuid.uuid4().hex}")
    try:
        new.write_text(json.dumps({path: [sha256, *_status(folder / path)] for path, sha256 in expected.items()}))
        os.replace(new, stamp_path)
    except OSError:
        new.unlink(missing_ok=True)  # a stamp only saves time


def _status(path: Path) -> list[int]:
    status = path.lstat()
    # The change time too: modification times can be set back, change times cannot.
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _files_below(folder: Path) -> set[str]:
    found: set[str] = set()
    for here, folders, files in os.walk(folder):
        links = [name for name in folders if Path(here, name).is_symlink()]
        found |= {Path(here, name).relative_to(folder).as_posix() for name in [*files, *links]}
    return found
