"""The process that records probes: fresh, shared, free of its parent's devices and ranks, and gone with its parent."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from baton.errors import UserError
from baton.registry import probe, probe_process
from baton.registry.checks import CheckFailed
from baton.registry.probe_process import ProbeProcess
from tests.baton.registry.test_inspection import edit_tensors

VOCABULARY = {"size": 280, "special_tokens": {"bos": 0, "eos": 1, "pad": 2, "unk": None, "stop": [1]}}


@pytest.fixture(scope="module")
def process() -> Iterator[ProbeProcess]:
    """One process for the tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "nowhere"}.items():
            patch.setenv(name, value)
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        patch.setenv("OMP_NUM_THREADS", "1")
        started = ProbeProcess()
    yield started
    started.close()


def request(folder: Path, kind: str = "base", base: Path | None = None) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "base_folder": str(base) if base else None,
        "kind": kind,
        "vocabulary": VOCABULARY,
    }


def test_it_gives_what_this_process_computes(process: ProbeProcess, made: Any) -> None:
    for kind, base in (("base", None), ("adapter", made.base), ("reward", made.base)):
        here = probe.compute(getattr(made, kind), base, kind, VOCABULARY)
        there = process.ask(request(getattr(made, kind), kind, base))["probe"]
        assert probe.largest_difference(there["expected"], here) is None
        assert {**there, "expected": None} == {**here, "expected": None}


def test_it_knows_nothing_of_ranks_and_devices(process: ProbeProcess) -> None:
    environment = psutil.Process(process.pid).environ()
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    unwanted = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_USE_FSDP", "OMP_NUM_THREADS")
    assert not set(unwanted) & set(environment)


def test_errors_come_back_as_they_were(process: ProbeProcess, folders: Any) -> None:
    edit_tensors(folders.reward / "adapter_model.safetensors", lambda t: t.pop("base_model.model.score.weight"))
    with pytest.raises(probe.ProbeMismatch, match="^check lost-head: .* has lost its score.weight") as caught:
        process.ask(request(folders.reward, "reward", folders.base))
    assert isinstance(caught.value, CheckFailed) and caught.value.check == "lost-head"
    edit_tensors(folders.base / "model.safetensors", lambda t: t["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(UserError, match="nan or infinity") as caught_user:
        process.ask(request(folders.base))
    assert type(caught_user.value) is UserError
    with pytest.raises(RuntimeError, match="the probe's process failed:\nTraceback"):
        process.ask({"folder": str(folders.base)})
    assert process.ask(request(folders.other_base))["probe"]["expected"]


def test_a_fork_that_is_killed_is_named_and_the_next_one_answers(
    process: ProbeProcess, made: Any, tmp_path: Path
) -> None:
    """As the kernel does where memory runs out; a FIFO keeps the fork waiting meanwhile."""
    import threading

    shutil.copytree(made.base, tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    os.mkfifo(tmp_path / "model" / "config.json")

    def kill() -> None:
        deadline = time.monotonic() + 20
        while not (children := psutil.Process(process.pid).children()) and time.monotonic() < deadline:
            time.sleep(0.02)
        children[0].kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(UserError, match=r"ended with signal 9 \(Killed\) while it loaded .*model.*needs memory"):
        process.ask(request(tmp_path / "model"))
    killer.join()
    assert process.ask(request(made.base))["probe"]["expected"]


def test_it_is_started_once_and_again_when_it_died(made: Any) -> None:
    first = probe_process.start()
    assert probe_process.start() is first
    os.kill(first.pid, signal.SIGKILL)
    while first.is_alive:
        time.sleep(0.01)
    second = probe_process.start()
    assert second is not first and second.is_alive


def test_a_forked_child_has_one_of_its_own(made: Any) -> None:
    ours = probe_process.start()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"none" if probe_process._current is None else b"inherited")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 100) == b"none" and ours.is_alive
    os.close(read)
    os.close(write)


PARENT = """
import json, sys
from baton.registry import probe_process
print(json.dumps(probe_process.start().pid), flush=True)
if sys.argv[1] == "wait":
    sys.stdin.read()
"""


@pytest.mark.parametrize("ending", ["kill", "exit"])
def test_it_ends_with_its_parent(ending: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, "wait" if ending == "kill" else "leave"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert parent.stdout is not None
    pid = json.loads(parent.stdout.readline())
    if ending == "kill":
        parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the process outlived its parent"
        time.sleep(0.05)


def test_publishing_records_in_that_process_and_never_here(
    folder_registry: Any, folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(*arguments: Any) -> None:
        raise AssertionError("the probe was computed beside the trained model")

    monkeypatch.setattr(probe, "compute", here)
    monkeypatch.setattr(probe, "load", here)
    version = folder_registry.publish(folders.base, name="team/base", kind="base")
    monkeypatch.undo()
    assert folder_registry.verify(version, deep=True) == []
