"""A stage's curves as one PNG: each panel one quantity against the step, with its unit."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = dict[str, list[tuple[int, float]]]
"""metric -> (step, value), by step"""

# told apart by colour-blind readers too (Wong 2011)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
ALARM_COLOUR = "#D55E00"
PANEL_INCHES = (5.2, 3.2)


@dataclass(frozen=True)
class Panel:
    """One quantity: the metrics drawn as curves, and those drawn as a level to compare with; key -> legend.

    `band` is the lower and upper end of an interval around the only curve; `alarm` is the metric, or the beginning of
    several, whose steps are marked; `neutral` is a value that means neither better nor worse.
    """

    title: str
    unit: str
    curves: dict[str, str]
    levels: dict[str, str] = field(default_factory=dict)
    band: tuple[str, str] | None = None
    alarm: str | None = None
    neutral: float | None = None

    def is_in(self, series: Series) -> bool:
        return any(key in series for key in self.curves)

    def draw(self, axes: Axes, series: Series) -> None:
        colours = iter(COLOURS)
        for key, legend in self.curves.items():
            if key in series:
                _curve(axes, series[key], legend, next(colours), marked=key.startswith("eval/"))
        for key, legend in self.levels.items():
            if key in series:
                axes.axhline(series[key][-1][1], label=legend, color="0.45", linestyle="--", linewidth=1)
        if self.neutral is not None:
            axes.axhline(self.neutral, color="0.7", linewidth=0.8, zorder=0)
        if self.band and all(key in series for key in self.band):
            low, high = (dict(series[key]) for key in self.band)
            steps = sorted(low.keys() & high.keys())
            ends = [low[step] for step in steps], [high[step] for step in steps]
            axes.fill_between(steps, *ends, color=COLOURS[0], alpha=0.18, linewidth=0, label="95% interval")
        _finish(axes, self.title, self.unit, series, self.alarm)


@dataclass(frozen=True)
class Components(Panel):
    """Every metric under a prefix in its own colour: training as a line, held-out values as points joined by dots."""

    prefix: str = "reward/"

    def is_in(self, series: Series) -> bool:
        return len(self._labels(series)) > 1

    def draw(self, axes: Axes, series: Series) -> None:
        for label, colour in zip(self._labels(series), COLOURS, strict=False):
            for key, marked in ((self.prefix + label, False), (f"eval/{self.prefix}{label}", True)):
                if key in series:
                    legend = f"{label}, held out" if marked else label
                    _curve(axes, series[key], legend, colour, marked, line=":" if marked else "-")
        _finish(axes, self.title, self.unit, series, self.alarm)

    def _labels(self, series: Series) -> list[str]:
        keys = [key.removeprefix("eval/") for key in series]
        found = dict.fromkeys(key.removeprefix(self.prefix) for key in keys if key.startswith(self.prefix))
        return sorted(label for label in found if not label.endswith("_before"))


@dataclass(frozen=True)
class Frontier(Panel):
    """Reward against KL (Gao et al. 2022; Huang et al. 2024): rollouts as points, held-out measurements as a path.

    The reference's own reward stands at KL zero; what matters is how high a path is at the KL that it has spent.
    """

    def is_in(self, series: Series) -> bool:
        return any(_joined(series, *keys) for keys in FRONTIER)

    def draw(self, axes: Axes, series: Series) -> None:
        for (kl, reward, legend), colour in zip(FRONTIER, ("#56B4E9", COLOURS[0], COLOURS[2]), strict=True):
            points = _joined(series, kl, reward, legend)
            if not points:
                continue
            xs, ys = zip(*points, strict=True)
            if legend == "rollouts":
                axes.scatter(xs, ys, s=12, color=colour, alpha=0.6, linewidths=0, label=legend)
                continue
            axes.plot(xs, ys, color=colour, linewidth=1.5, marker="o", markersize=4, label=legend)
            axes.annotate(
                "last",
                points[-1],
                xytext=(5, 0),
                textcoords="offset points",
                verticalalignment="center",
                fontsize="small",
                color=colour,
            )
        axes.margins(x=0.12)  # room for the last word
        if "eval/reward_before" in series:
            axes.plot([0.0], [series["eval/reward_before"][-1][1]], "*", color="0.45", markersize=9, label="before")
        _finish(axes, self.title, self.unit, series, None, across="KL from the reference, nats per reply")


@dataclass(frozen=True)
class Shares(Panel):
    """What share of each step its parts took, stacked."""

    def draw(self, axes: Axes, series: Series) -> None:
        found = {key: dict(series[key]) for key in self.curves if key in series}
        steps = sorted(set.intersection(*(set(points) for points in found.values())))
        totals = [sum(points[step] for points in found.values()) or 1.0 for step in steps]
        heights = [
            [100 * points[step] / total for step, total in zip(steps, totals, strict=True)] for points in found.values()
        ]
        if len(steps) == 1:  # an area needs two ends
            steps, heights = [steps[0] - 1, steps[0]], [height * 2 for height in heights]
        labels = [self.curves[key] for key in found]
        axes.stackplot(steps, heights, labels=labels, colors=COLOURS, alpha=0.75, linewidth=0)
        axes.set_ylim(0, 100)
        _finish(axes, self.title, self.unit, series, self.alarm)
        axes.legend(fontsize="small", framealpha=0.9, reverse=True)  # a frame, and the order in which they are stacked


PANELS = [
    Panel(
        "Loss",
        "nats per token",
        {"loss": "training", "eval/loss": "held out", "eval/loss_quantised": "held out, quantised base"},
        {"eval/loss_before": "held out, before", "eval/loss_quantised_before": "held out, quantised base, before"},
    ),
    Panel(
        "Bits per byte",
        "bits per byte",
        {"bits_per_byte": "training", "eval/bits_per_byte": "held out"},
        {"eval/ngram_bits_per_byte": "n-gram model"},
    ),
    Panel(
        "Accuracy",
        "share of pairs",
        {"accuracy": "training", "eval/accuracy": "held out"},
        {"eval/accuracy_longer": "always the longer reply"},
    ),
    Panel(
        "Reward",
        "reward per reply",
        {"reward": "rollouts", "eval/reward": "held out"},
        {"eval/reward_before": "held out, before"},
        alarm="alarm/reward_stuck",
    ),
    Panel(
        "Gold reward, never optimised",
        "reward per reply",
        {"eval/gold": "held out"},
        {"eval/gold_before": "held out, before"},
        alarm="alarm/gold_falling",
    ),
    Components("Reward components", "score per reply", {}, alarm="alarm/reward_stuck"),
    Frontier("Reward against KL", "reward per reply", {}),
    Panel(
        "Win rate against SFT",
        "share of prompts",
        {"eval/win_rate": "held out"},
        band=("eval/win_rate_low", "eval/win_rate_high"),
        neutral=0.5,
    ),
    Panel(
        "KL from the reference",
        "nats per reply",
        {"kl_nats": "rollouts", "eval/kl_nats": "held out"},
        alarm="alarm/negative_kl",
    ),
    Panel("KL coefficient", "reward per nat", {"kl_coefficient": "coefficient"}),
    Panel(
        "Length",
        "tokens per reply",
        {"length": "rollouts", "eval/length": "held out"},
        {"eval/length_before": "held out, before"},
        alarm="alarm/length_drift",
    ),
    Panel(
        "Replies that end",
        "share of replies",
        {"eos_rate": "rollouts", "eval/eos_rate": "held out"},
        alarm="alarm/eos_collapse",
    ),
    Panel("Entropy", "nats per token", {"entropy_nats": "policy"}, alarm="alarm/entropy_collapse"),
    Panel(
        "Clipped",
        "share of tokens",
        {"clip_fraction/policy": "ratio", "clip_fraction/value": "value"},
        alarm="alarm/clip_fraction_spike",
    ),
    Panel(
        "Explained variance",
        "share of the returns' variance",
        {"explained_variance": "value"},
        alarm="alarm/negative_explained_variance",
        neutral=0.0,
    ),
    Panel("Policy loss", "loss", {"loss/policy": "policy"}),
    Panel("Value loss", "loss", {"loss/value": "value"}),
    Panel("Mixed-in loss", "nats per token", {"loss/ptx": "ptx"}),
    Panel(
        "Gradient norm",
        "norm before clipping",
        {"grad_norm": "all", "grad_norm/policy": "policy", "grad_norm/value": "value"},
    ),
    Panel("Engine against trainer", "nats per token", {"engine_gap_nats": "gap"}),
    Panel("Memory", "GB a process", {"memory/peak_gb": "peak so far"}),
    Panel("Episodes per second", "episodes/s", {"episodes_per_s": "whole step"}),
    Shares(
        "Where the time goes",
        "% of rollout, scoring and update",
        {"time/rollout_s": "rollout", "time/score_s": "scoring", "time/update_s": "update"},
    ),
]
FRONTIER = [
    ("kl_nats", "reward", "rollouts"),
    ("eval/kl_nats", "eval/reward", "held out"),
    ("eval/kl_nats", "eval/gold", "held out, gold"),
]
LOSS_UNITS = {"reward": "nats per pair", "ppo": "loss"}


def plot_run(stage: str, run_dir: Path) -> list[Path]:
    """Draw `run_dir`/metrics.jsonl into `run_dir`/plots/`stage`.png; returns what was written, if anything."""
    series = read_metrics(run_dir / "metrics.jsonl")
    panels = [panel for panel in PANELS if panel.is_in(series)]
    if not panels:
        return []
    # Figure, not pyplot: no backend is chosen and no state is kept for the process
    from matplotlib.figure import Figure

    columns = min(2 if len(panels) <= 8 else 3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.3), layout="constrained")
    figure.suptitle(stage, fontweight="bold")
    grid = figure.subplots(rows, columns, squeeze=False)
    last_step = max(points[-1][0] for points in series.values())
    for axes, panel in zip(grid.flat, panels, strict=False):
        if not isinstance(panel, Frontier):
            axes.set_xlim(0, last_step * 1.03 + 0.5)
        if panel.title == "Loss":
            panel = replace(panel, unit=LOSS_UNITS.get(stage, panel.unit))
        panel.draw(axes, series)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    path = run_dir / "plots" / f"{stage}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return [path]


def read_metrics(path: Path) -> Series:
    """Every finite number of a metrics.jsonl by name; of two values for one step, the later written counts.

    A row {"step": …, "alarm": name} becomes the metric alarm/name, 1 at its step.
    """
    found: dict[str, dict[int, float]] = {}
    if not path.is_file():
        return {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the line that a killed run was writing
        step = row.get("step") if isinstance(row, dict) else None
        if not isinstance(step, int):
            continue
        if isinstance(row.get("alarm"), str):
            row = {f"alarm/{row['alarm']}": 1.0}
        for key, value in row.items():
            if key not in ("step", "time_s") and _is_finite(value):
                found.setdefault(key, {})[step] = float(value)
    return {key: sorted(values.items()) for key, values in found.items()}


def _finish(
    axes: Axes, title: str, unit: str, series: Series, alarm: str | None, across: str = "step"
) -> None:
    """Titles, grid and legend, and the steps at which an alarm of this panel rang."""
    from matplotlib.ticker import MaxNLocator

    rang = {step for key, points in series.items() if alarm and key.startswith(alarm) for step, _ in points}
    for at, step in enumerate(sorted(rang)):
        axes.axvline(step, color=ALARM_COLOUR, linestyle=":", linewidth=1.2, label=None if at else "alarm")
    axes.set_title(title)
    axes.set_xlabel(across)
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=across == "step", nbins=6))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    handles, _ = axes.get_legend_handles_labels()
    if len(handles) > 1:
        axes.legend(frameon=False, fontsize="small")


def _curve(
    axes: Axes, points: Sequence[tuple[int, float]], legend: str, colour: str, marked: bool, line: str = "-"
) -> None:
    steps, values = zip(*points, strict=True)
    # a lone point has no line to be seen by, and the few steps of held-out values are to be told apart
    marker = "o" if len(points) < 15 or (marked and len(points) < 60) else None
    line = line if len(points) > 1 else "none"
    axes.plot(steps, values, label=legend, color=colour, linestyle=line, linewidth=1.5, marker=marker, markersize=4)


def _joined(series: Series, kl: str, reward: str, _legend: str = "") -> list[tuple[float, float]]:
    """(KL, reward) of the steps that have both, in their order."""
    ys = dict(series.get(reward, []))
    return [(x, ys[step]) for step, x in series.get(kl, []) if step in ys]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
