"""Working folders on this machine, each with a lock beside it; a dead program's are swept up by the next one."""

import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_PARTIAL = re.compile(r"\..*\.partial-[0-9a-f]{32}\.lock")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A fresh folder under `tmp` of the cache (`$BATON_CACHE`, else `.baton/cache`), removed at the end.

    Beside the cache, because that disk is meant for models, and `/tmp` is often memory.
    """
    root = Path(os.environ.get("BATON_CACHE") or ".baton/cache").absolute() / "tmp"
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root, lambda path: path.suffix == ".lock")
    folder = root / uuid.uuid4().hex
    with _locked(folder):
        yield folder


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A fresh hidden folder beside `target`, removed at the end if it is still there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep_partial(target.parent)
    folder = target.parent / f".{target.name[:16]}.partial-{uuid.uuid4().hex}"
    with _locked(folder):
        yield folder


def move_contents(folder: Path, target: Path, is_last: Callable[[Path], bool]) -> None:
    """Move all that a `partial_folder` holds into `target`, which holds nothing; `is_last`: what goes last.

    Killed meanwhile, what was moved is swept with the folder: it is noted beforehand.
    """
    paths = sorted(folder.iterdir(), key=is_last)
    lock = _lock_of(folder)
    if lock.is_file():
        with open(lock, "r+b") as file:
            file.write(json.dumps({path.name: _identity(path) for path in paths}).encode())
            file.flush()
            os.fsync(file.fileno())
    for path in paths:
        os.rename(path, target / path.name)


def sweep_partial(root: Path) -> None:
    """Remove what programs that were killed left in `root`: their partial folders, and what came out of them."""
    _sweep(root, lambda path: _PARTIAL.fullmatch(path.name) is not None)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make a folder and hold the lock that says that its owner is alive: the system lets go of it when that dies."""
    path = _lock_of(folder)
    while True:
        with open(path, "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not _is_there(path, file):
                    continue  # a sweeper came between open and lock
            except OSError:
                path.unlink(missing_ok=True)  # a file system without locks: nobody will sweep there
            try:
                folder.mkdir()
                yield
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                path.unlink(missing_ok=True)
            return


def _sweep(root: Path, is_ours: Callable[[Path], bool]) -> None:
    with suppress(OSError):
        for path in [path for path in root.iterdir() if is_ours(path)]:
            # For writing, without which NFS gives no such lock.
            with suppress(OSError), open(path, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_there(path, file):
                    _remove_moved(root, file)
                    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                    path.unlink(missing_ok=True)


def _remove_moved(root: Path, file: IO[bytes]) -> None:
    with suppress(ValueError):
        moved = json.loads(file.read() or b"{}")
        for name, identity in moved.items():
            path = root / name
            with suppress(FileNotFoundError):
                if path.parent == root and _identity(path) == identity:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _identity(path: Path) -> list[int]:
    status = path.lstat()
    return [status.st_dev, status.st_ino]


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _is_there(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
