"""A progress line that people can read: a live bar in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any


class Progress:
    """Steps done, the latest figures, units per second and the time left. Silent where `shown` is false.

    Use it in a `with`: leaving it, by an exception too, gives the terminal its cursor and its streams back.
    """

    def __init__(self, label: str, total: int, unit: str, start: int = 0, shown: bool = True) -> None:
        self.label, self.total, self.unit, self.start, self.shown = label, total, unit, start, shown
        self._units = 0.0
        self._began = self._printed = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self.shown:
            self._bar = self._live_bar()
            if self._bar is not None:
                self._task = self._bar.add_task(self.label, total=self.total, completed=self.start, figures="")
                self._bar.start()  # last: nothing that could fail comes between it and the with
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(
        self, step: int, units: float, figures: Mapping[str, float], seconds: Mapping[str, float] | None = None
    ) -> None:
        """`units` more were processed; `step` of `total` are done; `seconds` is how long each part of the step took."""
        self._units += units
        now = time.monotonic()
        rate = self._units / max(now - self._began, 1e-9)
        words = [f"{name} {value:.4g}" for name, value in figures.items()] + [f"{_rate(rate)} {self.unit}/s"]
        if seconds:
            words.append(shares(seconds))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures="  ".join(words))
        elif self.shown and (now - self._printed > 10 or step == self.total):
            self._printed = now
            left = (now - self._began) / max(step - self.start, 1) * (self.total - step)
            print(f"{self.label} {step}/{self.total}  {'  '.join(words)}  {left:.0f} s left", flush=True)

    def _live_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        if not console.is_terminal or os.environ.get("BATON_PROGRESS") == "plain":
            return None
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=24 if console.width >= 120 else 8),  # the figures need the room more
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        ]
        # rich would draw what is printed through its own console, here stderr: right only if both are the terminal
        both = sys.stdout.isatty()
        return Bar(*columns, console=console, refresh_per_second=4, redirect_stdout=both)


def shares(seconds: Mapping[str, float]) -> str:
    """`rollout`, `score`, `update` -> `r/s/u 35/20/45%`: the parts' initials and shares, which add up to 100."""
    total = sum(seconds.values()) or 1.0
    exact = [100 * value / total for value in seconds.values()]
    whole = [int(share) for share in exact]
    short = round(sum(exact)) - sum(whole)
    for at in sorted(range(len(exact)), key=lambda at: whole[at] - exact[at])[:short]:  # largest remainders first
        whole[at] += 1
    return f"{'/'.join(name[0] for name in seconds)} {'/'.join(map(str, whole))}%"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
