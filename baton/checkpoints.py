"""Checkpoints of transformers' Trainer: written aside and behind the training's back, whole or not at all, pruned."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.errors import UserError

if TYPE_CHECKING:
    from baton.run import Run

COMPLETE = "complete"
"""The last file of a checkpoint: JSON of the sha256 of all others, or empty where it was written in place."""

CHUNK = 4 << 20


class Writer:
    """Runs one piece of work at a time in a thread of its own; a failure is kept until somebody asks."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Wait for the work before, then begin this one."""
        self.wait()
        # a daemon: a program that ends early leaves a folder aside, which is nobody's checkpoint
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def failure(self) -> Exception | None:
        """What went wrong, if anything did; it may still be going on."""
        return self._failure

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._failure = error


def write_checkpoint(folder: Path, step: int, files: Mapping[str, Any], keep: int) -> None:
    """Write `folder`/checkpoint-STEP whole or not at all, then delete all complete ones but the last `keep`.

    `files`: name -> content: tensors by name (.safetensors), JSON (.json), whatever torch.save takes (others).
    Raises UserError that names the place and the room left when it cannot be written.
    """
    aside, final = folder / f"aside-{step}", folder / f"checkpoint-{step}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        digests = {name: _write(aside / name, content) for name, content in files.items()}
        (aside / COMPLETE).write_text(json.dumps(digests), encoding="utf-8")
        _sync(aside / COMPLETE)
        _sync(aside)
        remove(final)
        os.replace(aside, final)
        _sync(folder)
        prune(folder, keep)
    except Exception as error:  # a full disk comes as OSError, or as torch's RuntimeError of its own writer
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"writing checkpoint {final} failed: {error} ({_room(folder)}). Make room, lower train.keep, or "
            "move the run's folder and name its new place by run_dir; then run the same command again: it goes on from "
            "the checkpoint before"
        ) from error


def _write(path: Path, content: Any) -> str:
    """Write and sync one file; its sha256."""
    import torch
    from safetensors.torch import save_file

    if path.suffix == ".safetensors":
        save_file(dict(content), path)
        digest = _sha256(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(content), encoding="utf-8")
        digest = _sha256(path)
    else:
        with path.open("wb", buffering=0) as file:
            hashed = _Hashed(file)
            torch.save(content, hashed)  # type: ignore[arg-type]  # it needs no more than write and flush
        digest = hashed.digest.hexdigest()
    _sync(path)
    return digest


class _Hashed:
    """A file that is hashed as it is written, a few megabytes at a time: meanwhile, the interpreter is the training's.

    Measured on 300 MB: the training thread waits 0.06 s for the interpreter in all, where torch.save writes by itself
    0.3 to 0.4 s, up to 0.16 s at a time.
    """

    def __init__(self, file: Any) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content: Any) -> int:
        whole = memoryview(content).cast("B")
        for start in range(0, len(whole), CHUNK):
            chunk = whole[start : start + CHUNK]
            self.digest.update(chunk)
            while len(chunk):
                chunk = chunk[self.file.write(chunk) :]
        return len(whole)

    def flush(self) -> None:
        """Nothing is held back."""


def prune(folder: Path, keep: int) -> None:
    """Delete all complete checkpoints but the newest `keep`."""
    for path in complete_checkpoints(folder)[:-keep]:
        remove(path)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """How many steps had been taken."""
    return int(checkpoint.name.split("-")[1])


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, its mark first: cut off on the way, the rest is no checkpoint."""
    (checkpoint / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def mark_complete(checkpoint: Path) -> None:
    """Flush a checkpoint that was written in place to disk, then leave the mark that makes it one to go on from."""
    for path in [*checkpoint.rglob("*"), checkpoint]:
        _sync(path)
    (checkpoint / COMPLETE).touch()


def drop_incomplete(run: Run[Any]) -> str | None:
    """Remove checkpoints that were cut off while being written; the newest complete one, if any.

    Raises UserError when a file of that one is not what was written.
    """
    if run.is_main:
        for path in run.checkpoints.glob("aside-*"):
            shutil.rmtree(path)
        for path in run.checkpoints.glob("checkpoint-*"):
            if not (path / COMPLETE).exists():
                shutil.rmtree(path)
    run.state.wait_for_everyone()
    last = run.last_checkpoint()
    if last is None:
        return None
    verify(last)
    run.say(f"continuing from {last}")
    return str(last)


def verify(checkpoint: Path) -> None:
    """Raises UserError when a file is not the one that was written; one that was written in place has no digests."""
    for name, digest in json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8") or "{}").items():
        path = checkpoint / name
        if not path.is_file() or _sha256(path) != digest:
            raise UserError(
                f"{path} is {'damaged' if path.is_file() else 'missing'}: it is not what was saved; delete {checkpoint}"
                " and run the same command again: it goes on from the checkpoint before, or from the start"
            )


def copied(content: Any) -> Any:
    """`content` with a copy in main memory of each tensor in it: what is trained on meanwhile does not change it."""
    import torch

    if isinstance(content, torch.Tensor):
        return content.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(content, Mapping):
        return {key: copied(item) for key, item in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(copied(item) for item in content)
    return content


def rng_state(all_devices: bool) -> dict[str, Any]:
    """Of every generator that a step may draw from, in the form in which the Trainer reads it."""
    import numpy as np
    import torch

    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state_all() if all_devices else torch.cuda.random.get_rng_state()
    return state


def _room(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB free on that disk"
    except OSError as error:
        return str(error)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
