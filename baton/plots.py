"""A stage's curves as one PNG: each panel one quantity against the step, with its unit."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = dict[str, list[tuple[int, float]]]
"""metric -> (step, value), by step"""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # told apart by colour-blind readers too (Wong 2011)
PANEL_INCHES = (5.2, 3.2)


@dataclass(frozen=True)
class Panel:
    """One quantity: the metrics drawn as curves, and those drawn as a level to compare with; key -> legend."""

    title: str
    unit: str
    curves: dict[str, str]
    levels: dict[str, str]


PANELS = [
    Panel(
        "Loss",
        "nats per token",
        {"loss": "training", "eval/loss": "held out"},
        {"eval/loss_before": "held out, before"},
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
    ),
    Panel("KL from the reference", "nats per reply", {"kl_nats": "rollouts", "eval/kl_nats": "held out"}, {}),
    Panel("Length", "tokens per reply", {"length": "rollouts", "eval/length": "held out"}, {}),
    Panel("Policy loss", "loss", {"loss/policy": "policy"}, {}),
    Panel("Value loss", "loss", {"loss/value": "value"}, {}),
    Panel("Gradient norm", "norm", {"grad_norm": "before clipping"}, {}),
]
LOSS_UNITS = {"reward": "nats per pair", "ppo": "loss"}


def plot_run(stage: str, run_dir: Path) -> list[Path]:
    """Draw `run_dir`/metrics.jsonl into `run_dir`/plots/`stage`.png; returns what was written, if anything."""
    series = read_metrics(run_dir / "metrics.jsonl")
    panels = [panel for panel in PANELS if any(key in series for key in panel.curves)]
    if not panels:
        return []
    # Figure, not pyplot: no backend is chosen and no state is kept for the process
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.3), layout="constrained")
    figure.suptitle(stage, fontweight="bold")
    grid = figure.subplots(rows, columns, squeeze=False)
    last_step = max(points[-1][0] for points in series.values())
    for axes, panel in zip(grid.flat, panels, strict=False):
        axes.set_xlim(0, last_step * 1.03 + 0.5)
        _draw(axes, panel, LOSS_UNITS.get(stage, panel.unit) if panel.title == "Loss" else panel.unit, series)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    path = run_dir / "plots" / f"{stage}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return [path]


def read_metrics(path: Path) -> Series:
    """Every finite number of a metrics.jsonl by name; of two values for one step, the later written counts."""
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
        for key, value in row.items():
            if key not in ("step", "time_s") and _is_finite(value):
                found.setdefault(key, {})[step] = float(value)
    return {key: sorted(values.items()) for key, values in found.items()}


def _draw(axes: Axes, panel: Panel, unit: str, series: Series) -> None:
    from matplotlib.ticker import MaxNLocator

    colours = iter(COLOURS)
    for key, legend in panel.curves.items():
        points = series.get(key)
        if points:
            _curve(axes, points, legend, next(colours))
    for key, legend in panel.levels.items():
        if key in series:
            axes.axhline(series[key][-1][1], label=legend, color="0.45", linestyle="--", linewidth=1)
    axes.set_title(panel.title)
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    handles, _ = axes.get_legend_handles_labels()
    if len(handles) > 1:
        axes.legend(frameon=False, fontsize="small")


def _curve(axes: Axes, points: Sequence[tuple[int, float]], legend: str, colour: str) -> None:
    steps, values = zip(*points, strict=True)
    marker = "o" if len(points) < 15 else None  # a lone point has no line to be seen by
    line = "-" if len(points) > 1 else "none"
    axes.plot(steps, values, label=legend, color=colour, linestyle=line, linewidth=1.5, marker=marker, markersize=4)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
