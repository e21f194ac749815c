"""The table at the end of a chain: what each stage's version measured, against what it is to be compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from baton.errors import UserError
from baton.recipe import Recipe, TrainedRecipe

Metrics = Mapping[str, Any]


def _figure(value: float) -> str:
    return f"{value:.3f}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _tokens(value: float) -> str:
    return f"{value:.1f} tokens"


def _nats(value: float) -> str:
    return f"{value:.2f} nats"


@dataclass(frozen=True)
class Measure:
    """One line of a stage's row: a metric of the manifest, and the metric that it is shown against."""

    label: str
    key: str
    form: Callable[[float], str] = _figure
    baseline: str | None = None  # its key; without one, the metric's own key + "_before"
    baseline_label: str = "before"

    def line(self, metrics: Metrics) -> tuple[str, str, str] | None:
        """(label, value, comparison), or None where the version has no such metric."""
        value, other = metrics.get(self.key), metrics.get(self.baseline or f"{self.key}_before")
        if not _is_number(value):
            return None
        return self.label, self.form(value), f"{self.form(other)} {self.baseline_label}" if _is_number(other) else ""


MEASURES: dict[str, list[Measure]] = {
    "pretrain": [
        Measure(
            "bits per byte, held out",
            "eval/bits_per_byte",
            baseline="eval/ngram_bits_per_byte",
            baseline_label="n-gram",
        ),
    ],
    "sft": [Measure("loss, held out", "eval/loss")],
    "reward": [
        Measure(
            "accuracy, held out",
            "eval/accuracy",
            _share,
            baseline="eval/accuracy_longer",
            baseline_label="always longer",
        ),
    ],
    "ppo": [
        Measure("reward, held out", "eval/reward"),
        Measure("KL from SFT", "eval/kl_nats", _nats),
        Measure("reply length", "eval/length", _tokens),
        Measure("replies that end", "eval/eos_rate", _share),
    ],
}
ANSWERS = [
    Measure("right answers, known", "answers/known", _share),
    Measure("right answers, in texts alone", "answers/text_only", _share),
    Measure("inventions, unknown", "inventions/unknown", _share),
]
"""Shown for every stage that asked questions."""


def results_table(recipes: Sequence[Recipe]) -> Table:
    """A row a stage: its version at the recipe's alias, how long it took, and its measures, one a line.

    A stage that publishes nothing, or has not yet, has no row; a metric that a version does not have, no line.
    """
    table = Table(title="Results", title_justify="left", show_lines=True)
    for heading in ("stage", "version"):
        table.add_column(heading, no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("measure")
    table.add_column("result", justify="right", no_wrap=True, style="bold")
    table.add_column("compared with", no_wrap=True)
    for recipe in recipes:
        found = _published(recipe)
        if found is None:
            continue
        ref, metrics = found
        lines = stage_lines(recipe.stage, metrics)
        seconds = metrics.get("seconds")
        duration = format_duration(seconds) if _is_number(seconds) else ""
        table.add_row(recipe.stage, ref, duration, *("\n".join(part) for part in zip(*lines, strict=True)))
    return table


def stage_lines(stage: str, metrics: Metrics) -> list[tuple[str, str, str]]:
    """(label, value, comparison) of every measure of `stage` that `metrics` holds."""
    return [line for measure in [*MEASURES.get(stage, []), *ANSWERS] if (line := measure.line(metrics)) is not None]


def format_duration(seconds: float) -> str:
    """`48 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _published(recipe: Recipe) -> tuple[str, Metrics] | None:
    from baton.registry import Registry

    if not isinstance(recipe, TrainedRecipe):
        return None
    try:
        version = Registry.open(Path(recipe.registry)).resolve(f"{recipe.publish.name}:{recipe.publish.alias}")
    except UserError:
        return None
    return version.ref, version.manifest["metrics"]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
