"""A signal asks a run to end: it is noted, nothing is interrupted, and the handlers of before come back."""

import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from baton.preemption import SIGNALS, Preempted, Preemption


@pytest.fixture(autouse=True)
def ordinary_ctrl_c() -> Iterator[None]:
    """A shell that starts a job in the background has it ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


ALONE = SimpleNamespace(num_processes=1, device=torch.device("cpu"))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    with Preemption() as preemption:
        assert not preemption.asked(ALONE)
        os.kill(os.getpid(), number)
        assert preemption.asked(ALONE) and preemption.asked(ALONE), "asking does not forget"
    assert f"{number.name}: saving at the end of this step" in capfd.readouterr().err


def test_told_once_and_by_rank_0(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with Preemption() as preemption:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.asked(ALONE)
    assert capfd.readouterr().err.count("SIGTERM") == 1
    monkeypatch.setenv("RANK", "1")
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.asked(ALONE)
    assert capfd.readouterr().err == ""


def test_ctrl_c_pressed_twice_interrupts() -> None:
    with Preemption() as preemption, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.asked(ALONE)
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_after_another_signal_only_asks() -> None:
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.asked(ALONE)


def test_the_handlers_of_before_come_back() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with pytest.raises(Preempted), Preemption():
            raise Preempted(3)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_what_is_said_at_the_end() -> None:
    assert Preempted(7).step == 7
    assert str(Preempted(7)) == "preempted and saved at step 7; the same command goes on from there"
