"""Which process is surely dead: also when its number is used again, hidden, or another container's."""

import multiprocessing
import os
import subprocess
import sys
from typing import Any

import pytest

from baton.registry.care import processes


def test_a_process_lives_until_it_ends() -> None:
    assert not processes.is_surely_dead(processes.this_process())
    receiving, sending = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=lambda: sending.send(processes.this_process()))
    process.start()
    child = receiving.recv()
    process.join()
    assert child["pid"] == process.pid and processes.is_surely_dead(child)


def test_a_number_used_again_is_another_process() -> None:
    assert processes.is_surely_dead(processes.this_process() | {"started": "0"})


@pytest.mark.parametrize("change", [{"host": "other"}, {"boot": "other"}, {"pids": "pid:[1]"}])
def test_elsewhere_nothing_is_sure(change: dict[str, str]) -> None:
    dead = processes.this_process() | {"started": "0"}
    assert processes.is_surely_dead(dead) and not processes.is_surely_dead(dead | change)


@pytest.mark.parametrize("nonsense", [None, [], {}, {"pid": "1"}, "x"])
def test_nonsense_is_not_dead(nonsense: Any) -> None:
    assert not processes.is_surely_dead(nonsense)


def test_a_process_that_proc_hides_is_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    described = processes.this_process() | {"started": "0"}

    def hidden(path: Any) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(processes.Path, "read_text", hidden)
    assert not processes.is_surely_dead(described)


def test_a_zombie_is_dead() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert processes._started(process.pid) is None
    process.wait()
