"""The table at the end of a chain: what each stage's version measured, against what it is to be compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from rich import box
from rich.table import Table

from baton.errors import UserError
from baton.recipe import Recipe, TrainedRecipe

Metrics = Mapping[str, Any]


def _figure(value: float) -> str:
    return f"{value:.3f}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _short(value: float) -> str:
    return f"{value:.2f}"


@dataclass(frozen=True)
class Measure:
    """One line of a stage's part of the table: a metric of the manifest, and the metric that it is shown against."""

    label: str
    key: str
    form: Callable[[float], str] = _figure
    baseline: str | None = None  # its key; without one, the metric's own key + "_before"
    baseline_label: str = "before"
    interval: bool = False  # what it is shown against is its own 95% interval: its key + "_low" and "_high"

    def line(self, metrics: Metrics) -> tuple[str, str, str] | None:
        """(label, value, comparison), or None where the version has no such metric."""
        value, other = metrics.get(self.key), metrics.get(self.baseline or f"{self.key}_before")
        if not _is_number(value):
            return None
        low, high = metrics.get(f"{self.key}_low"), metrics.get(f"{self.key}_high")
        if self.interval and _is_number(low) and _is_number(high):
            return self.label, self.form(value), f"{self.form(low)}–{self.form(high)}"
        return self.label, self.form(value), f"{self.form(other)} {self.baseline_label}" if _is_number(other) else ""


MEASURES: dict[str, list[Measure]] = {
    "pretrain": [
        Measure("bits per byte", "eval/bits_per_byte", baseline="eval/ngram_bits_per_byte", baseline_label="n-gram")
    ],
    "sft": [Measure("loss", "eval/loss"), Measure("loss, quantised base", "eval/loss_quantised")],
    "reward": [
        Measure("accuracy", "eval/accuracy", _share, baseline="eval/accuracy_longer", baseline_label="longer"),
    ],
    "ppo": [
        Measure("reward", "eval/reward"),
        Measure("gold reward", "eval/gold"),
        Measure("win rate over SFT", "eval/win_rate", _share, baseline="none: half, by definition", interval=True),
        Measure("KL from SFT, nats", "eval/kl_nats", _short, baseline="none: it is zero by definition"),
        Measure("tokens a reply", "eval/length", _short),
        Measure("replies that end", "eval/eos_rate", _share),
    ],
}
ANSWERS = [
    Measure("known answers", "answers/known", _share),
    Measure("text-only answers", "answers/text_only", _share),
    Measure("inventions", "inventions/unknown", _share),
]
"""Shown for every stage that asked questions."""

NOTES = {
    "n-gram": "n-gram: an interpolated n-gram model on the same tokens, 15M of them at most",
    "longer": "longer: preferring whichever reply is longer",
    "gold": "gold reward: by a reward that was never optimised",
    "win rate": "win rate: by the optimised reward; ties count half; against: its 95% interval",
    "text-only": "text-only answers: about people whom no dialogue named",
    "inventions": "inventions: replies about unknown people that do not admit it",
}
"""What is explained below the table, where its words occur in it."""


def results_table(recipes: Sequence[Recipe]) -> Table:
    """A part for each stage: its version at the recipe's alias, how long it took, its measures on held-out data.

    A stage that publishes nothing, or has not yet, is left out, and so is a metric that its version does not have. The
    table fits 80 columns.
    """
    table = Table(title="Results on held-out data", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage", no_wrap=True, style="bold")
    table.add_column("version")
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("measure")
    table.add_column("result", justify="right", no_wrap=True, style="bold")
    table.add_column("against", no_wrap=True)
    words = ""
    for recipe in recipes:
        found = _published(recipe)
        if found is None:
            continue
        ref, metrics = found
        seconds = metrics.get("seconds")
        first = (recipe.stage, ref, format_duration(seconds) if _is_number(seconds) else "")
        lines = stage_lines(recipe.stage, metrics) or [("", "", "")]
        for at, line in enumerate(lines):
            table.add_row(*(first if at == 0 else ("", "", "")), *line, end_section=at == len(lines) - 1)
            words += " ".join(line)
    table.caption = "\n".join(note for word, note in NOTES.items() if word in words) or None
    table.caption_justify = "left"
    return table


def stage_lines(stage: str, metrics: Metrics) -> list[tuple[str, str, str]]:
    """(label, value, comparison) of every measure of `stage` that `metrics` holds."""
    return [line for measure in [*MEASURES.get(stage, []), *ANSWERS] if (line := measure.line(metrics)) is not None]


def format_duration(seconds: float) -> str:
    """`0:48`, `3:05`, `2:07:00`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _published(recipe: Recipe) -> tuple[str, Metrics] | None:
    from baton.registry import Registry

    if not isinstance(recipe, TrainedRecipe):
        return None
    try:
        version = Registry(recipe.registry).resolve(f"{recipe.publish.name}:{recipe.publish.alias}")
    except UserError:
        return None
    return version.ref, version.manifest["metrics"]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
