"""When a training diverges: which steps are not taken, when it goes back, and which batches are passed over then.

A loss spike is answered as PaLM's were (Chowdhery et al. 2022, section 5.1): back to a checkpoint from before it, and
on without the batches seen since. They found that the same batches do no harm to the weights of another step, so which
of them is to blame cannot be told, and all are passed over.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from baton.train_sections import GuardSettings

PASSED_OVER = 500
"""At most so many batches before a spike are passed over; what came earlier is trained on again (PaLM: 200-500)."""

LEAST_DEVIATION = 0.02
"""A window's deviation counts as at least this share of its median: on a plateau the median deviation may be ~0."""

LEAST_RISE = 0.25
"""What rises by less (nats) is no spike, however still the losses before it were."""


STARTS_AFRESH = "A changed recipe, train.guard included, starts from step 0; the checkpoints are set aside"


class Diverged(FloatingPointError):
    """The training cannot go on as it is; the message says what to change."""


class RollBack(Exception):
    """Raised on every rank before the optimizer's step `step` (from 0): the losses since step `first` are a spike."""

    def __init__(self, step: int, first: int, loss: float, usual: float, sigmas: float) -> None:
        super().__init__(f"the loss of step {step + 1} is {loss:.4g}: {sigmas:.3g} deviations above {usual:.4g}")
        self.step, self.first, self.loss, self.usual, self.sigmas = step, first, loss, usual, sigmas


class Usual(NamedTuple):
    """What losses were lately: their median, and the deviation in which a spike is counted."""

    median: float
    deviation: float


def usual(losses: list[float]) -> Usual:
    """Median and 1.4826 x median absolute deviation, which is a Gaussian's standard deviation (Hampel 1974).

    Half of the window would have to be spikes for them to become usual.
    """
    median = statistics.median(losses)
    deviation = 1.4826 * statistics.median(abs(loss - median) for loss in losses)
    return Usual(median, max(deviation, LEAST_DEVIATION * abs(median), 1e-12))


class Guard:
    """Judges one step after another; all ranks give it the same numbers, and so come to the same answer."""

    def __init__(self, settings: GuardSettings | None) -> None:
        """`settings` None: no guard; the first number that is none ends the run."""
        self.settings = settings
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._losses: deque[float] = deque(maxlen=settings.window if settings else 1)
        self._above: list[float] = []

    def takes(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether the optimizer takes step `step` (from 0), given the batch's loss and its gradient's norm.

        Raises RollBack at a spike, Diverged when too many steps in a row could not be taken.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._skipped_in_a_row = 0
            self._look_for_spike(step, loss)
            return True
        told = f"the loss is {loss:.4g} and the gradient's norm {grad_norm:.4g} at step {step + 1}"
        if self.settings is None:
            raise Diverged(f"{told}. {_what_to_do('train.guard: null')}")
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > self.settings.max_skipped:
            raise Diverged(
                f"{told}, as in {self.settings.max_skipped} steps before it, none of which was taken. "
                + _what_to_do(f"train.guard.max_skipped: {self.settings.max_skipped}")
            )
        return False

    def _look_for_spike(self, step: int, loss: float) -> None:
        if self.settings is None:
            return
        if len(self._losses) == self.settings.window:
            median, deviation = usual(list(self._losses))
            rise = loss - median
            if rise > max(self.settings.spike_sigmas * deviation, LEAST_RISE):
                self._above.append(loss)
                if len(self._above) >= self.settings.spike_steps:
                    raise RollBack(step, step + 1 - len(self._above), loss, median, rise / deviation)
                return
        self._losses.extend([*self._above, loss])  # those that were high alone were no spike
        self._above = []

    def forget(self) -> None:
        """What is read changes here: the losses so far say nothing of the next ones."""
        self._losses.clear()
        self._above = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON, whose floats come back bit by bit."""
        return {
            "losses": list(self._losses),
            "above": self._above,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self._losses.clear()
        self._losses.extend(state["losses"])
        self._above = list(state["above"])
        self.skipped_steps, self._skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]


def _what_to_do(setting: str) -> str:
    return (
        "Lower train.learning_rate, lengthen train.warmup_steps, or look at the data: the last complete checkpoint is "
        f"untouched (the recipe has {setting}). {STARTS_AFRESH}"
    )


def too_often(found: RollBack, settings: GuardSettings, record: Path) -> Diverged:
    """What a run ends with at its last spike."""
    return Diverged(
        f"{found}; the loss had spiked {settings.max_rollbacks} times before, each time the run went back and passed "
        f"over the batches since: {record} names them and their samples. Look at those; lower train.learning_rate or "
        "lengthen train.warmup_steps; or, where such losses are healthy, raise train.guard.spike_sigmas (now "
        f"{settings.spike_sigmas:g}) or train.guard.max_rollbacks, or set train.guard: null. {STARTS_AFRESH}"
    )


def read_rollbacks(record: Path, training_key: str) -> list[dict[str, Any]]:
    """The rollbacks that `record` tells of this very recipe, data and code; none where another one's are there."""
    if not record.is_file():
        return []
    content = json.loads(record.read_text(encoding="utf-8"))
    return list(content["rollbacks"]) if content.get("training_key") == training_key else []


def write_rollbacks(record: Path, training_key: str, rollbacks: list[dict[str, Any]]) -> None:
    """Replace `record`."""
    aside = record.with_name(record.name + ".new")
    content = {"training_key": training_key, "rollbacks": rollbacks}
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, record)


def skipped_batches(rollbacks: list[dict[str, Any]]) -> tuple[int, ...]:
    """The batches that all of them passed over, in order."""
    return tuple(sorted({batch for rollback in rollbacks for batch in rollback["batches"]}))
