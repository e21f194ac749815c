"""The process that records probes: fresh, shared, free of its parent's devices and ranks, and gone with its parent."""

import json
import os
import select
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


@pytest.fixture
def process() -> ProbeProcess:
    """The process that all tests of this run share: starting one takes seconds."""
    return probe_process.start()


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """None is there, for tests that end theirs."""
    with monkeypatch.context() as patch:
        patch.setattr(probe_process, "_current", None)
        yield
        probe_process.close()


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


def test_it_knows_nothing_of_ranks_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "nowhere"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started = ProbeProcess()
    until = time.monotonic() + 30
    while not (environment := psutil.Process(started.pid).environ()):  # for an instant it has none
        assert time.monotonic() < until
    started.close()
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


def test_an_interruption_leaves_no_answer_for_the_next_request(
    no_process: None, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the process is at work, which a notebook goes on after."""
    shutil.copytree(made.base, tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    os.mkfifo(tmp_path / "model" / "config.json")  # keeps the fork waiting
    first = probe_process.start()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(probe_process, "_wait", interrupt_when_asked(probe_process._wait))
        probe_process.ask(request(tmp_path / "model"))
    assert not first.is_alive and probe_process.start() is not first
    with pytest.raises(probe_process._Ended):  # as another thread finds it, which had it in its hands
        first.ask(request(made.base))


def interrupt_when_asked(wait: Any) -> Any:
    def interrupted(pipe: Any, event: int, *arguments: Any) -> None:
        if event == select.POLLIN:
            raise KeyboardInterrupt
        wait(pipe, event, *arguments)

    return interrupted


def test_requests_and_answers_carry_a_number(process: ProbeProcess, made: Any) -> None:
    """Two requests at once: the second must not be eaten while the first is answered, and each answer says whose."""
    stdin, stdout = process._process.stdin, process._process.stdout
    assert stdin is not None and stdout is not None
    folders = {7: str(made.base / "absent"), 8: str(made.other_base / "absent")}
    for number, folder in folders.items():
        os.write(stdin.fileno(), json.dumps(request(Path(folder)) | {"id": number}).encode() + b"\n")
        time.sleep(0.03)
    received = b""
    while received.count(b"\n") < 2:
        received += os.read(stdout.fileno(), 1 << 16)
    for line, (number, folder) in zip(received.splitlines(), folders.items(), strict=True):
        answer = json.loads(line)
        assert answer["id"] == number and folder in answer["error"]["message"]


def test_an_answer_to_another_request_is_not_taken(made: Any) -> None:
    started = ProbeProcess()
    read, write = os.pipe()
    os.write(write, json.dumps({"id": -1}).encode() + b"\n")
    with open(read, "rb", buffering=0) as pipe, open(write, "wb", buffering=0):
        started._process.stdout, real = pipe, started._process.stdout
        with pytest.raises(AssertionError, match="an answer to another request"):
            started.ask(request(made.base))
        assert real is not None
        real.close()
    assert not started.is_alive


def test_a_hung_probe_is_ended(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    started = ProbeProcess()
    os.kill(started.pid, signal.SIGSTOP)
    assert probe_process._seconds(request(made.adapter, "adapter", made.base)) > 900
    monkeypatch.setattr(probe_process, "_seconds", lambda request: 0.1)
    with pytest.raises(UserError, match=r"not answered within 0 s for .*base, and was ended"):
        started.ask(request(made.base))
    assert not started.is_alive


def test_it_is_started_once_and_again_when_it_died(no_process: None) -> None:
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
sys.path.insert(0, sys.argv[2])
from baton.registry import probe_process
print(json.dumps(probe_process.start().pid), flush=True)
if sys.argv[1] == "wait":
    sys.stdin.read()
"""


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("ending", ["kill", "exit"])
def test_it_ends_with_its_parent(ending: str, tmp_path: Path) -> None:
    (tmp_path / "peft.py").write_text("raise ImportError")  # it need not import what takes seconds
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, "wait" if ending == "kill" else "leave", str(tmp_path)],
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
    while is_running(pid):
        assert time.monotonic() < deadline, "the process outlived its parent"
        time.sleep(0.05)


def test_publishing_records_in_that_process_and_never_here(
    registry: Any, folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(*arguments: Any) -> None:
        raise AssertionError("the probe was computed beside the trained model")

    monkeypatch.setattr(probe, "compute", here)
    monkeypatch.setattr(probe, "load", here)
    version = registry.publish(folders.base, name="team/base", kind="base")
    monkeypatch.undo()
    assert registry.verify(version, deep=True) == []
