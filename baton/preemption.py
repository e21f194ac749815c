"""Ending early in good order: on a signal the ranks agree on a step, the loop saves it, `program` tells why."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

EXIT_CODE = 75
"""What a program that was preempted exits with: EX_TEMPFAIL of sysexits.h, "try again"."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""SIGTERM: cluster managers and `kill`; SIGUSR1: Slurm's --signal, long before the end; SIGINT: Ctrl-C."""

GRACE_S = 3600
"""How long launchers wait for a step to end and be saved; whoever asked for the end kills the processes earlier."""


class Preempted(Exception):
    """Raised by a loop on every rank once checkpoint `step` is whole; `baton.run.program` ends the program on it."""

    def __init__(self, step: int, *, saved: bool = True) -> None:
        went = f"preempted and saved at step {step}; the same command goes on from there"
        lost = f"preempted at step {step}; nothing could be saved, and the same command begins again"
        super().__init__(went if saved else lost)
        self.step = step


class Group(Protocol):
    """What an Accelerator and a PartialState have in common."""

    @property
    def num_processes(self) -> int: ...

    @property
    def device(self) -> Any: ...


class Preemption:
    """While inside, SIGTERM, SIGUSR1 and the first SIGINT only set a flag, which the loop reads by `asked`.

    with Preemption() as preemption:
        for step in range(first, steps):
            if preemption.asked(accelerator):
                save(step)          # then a barrier: no rank may leave while another one writes
                raise Preempted(step)

    A second SIGINT does what it did before: Ctrl-C pressed twice ends the program at once. The handlers of before are
    back at the end. Only the main thread may enter.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            # None: a handler that Python did not install, and could not put back
            self._before[number] = signal.signal(number, self._note) or signal.SIG_DFL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def received(self) -> bool:
        """Whether this very process has received a signal: for loops that tell the other ranks by themselves."""
        return self._received is not None

    def asked(self, group: Group) -> bool:
        """Whether any rank has received a signal: the same answer on all, so that all of them save the same step.

        A collective (the maximum over the ranks): every rank calls it at the same place, once a step.
        """
        if group.num_processes == 1:
            return self._received is not None
        import torch
        import torch.distributed as dist

        flag = torch.tensor([int(self._received is not None)], device=group.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _note(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if received is signal.SIGINT and self._received is signal.SIGINT:
            before: Callable[[int, FrameType | None], Any] | int = self._before[received]
            if callable(before):
                before(number, frame)
            return
        if self._received is None and os.environ.get("RANK", "0") == "0":
            again = "; Ctrl-C again: at once, without saving" if received is signal.SIGINT else ""
            # not print: the signal may have come in the middle of one
            os.write(2, f"\n{received.name}: saving at the end of this step, then ending{again}\n".encode())
        self._received = received


def ignore_signals() -> None:
    """From here to the end of the process: the checkpoint is whole, and its status must be written too."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
