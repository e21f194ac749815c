"""Working folders on this machine, for registries that lie elsewhere; a dead program's are swept up by the next one."""

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A fresh folder under `tmp` of the cache (`$BATON_CACHE`, else `.baton/cache`), removed at the end.

    Beside the cache, because that disk is meant for models, and `/tmp` is often memory.
    """
    root = Path(os.environ.get("BATON_CACHE") or ".baton/cache").absolute() / "tmp"
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    folder = root / uuid.uuid4().hex
    with _locked(root, folder.name):
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(root: Path, name: str) -> Iterator[None]:
    """Hold the lock that says that a folder's owner is alive: the system lets go of it when the process dies."""
    path = root / f"{name}.lock"
    while True:
        with open(path, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_there(path, file):
                continue  # a sweeper came between open and lock
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _sweep(root: Path) -> None:
    for path in root.glob("*.lock"):
        with suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(path, file):
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                path.unlink(missing_ok=True)


def _is_there(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
