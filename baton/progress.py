"""A progress line that people can read: a live bar in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import Any


class Progress:
    """Steps done, the latest figures, units per second and the time left. Silent where `shown` is false."""

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
                self._bar.start()
                self._task = self._bar.add_task(self.label, total=self.total, completed=self.start, figures="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, units: float, figures: dict[str, float]) -> None:
        """`units` more were processed; `step` of `total` are done."""
        self._units += units
        now = time.monotonic()
        rate = self._units / max(now - self._began, 1e-9)
        words = [f"{name} {value:.4g}" for name, value in figures.items()] + [f"{rate:,.0f} {self.unit}/s"]
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
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        ]
        return Bar(*columns, console=console, refresh_per_second=4)
