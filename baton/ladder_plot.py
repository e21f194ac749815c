"""A ladder's picture and table: sizes, losses, the law through the small ones, its prediction and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from baton.plots import COLOURS
from baton.results import format_duration
from baton.scaling import Law

SECONDS_UNKNOWN = "–"


@dataclass(frozen=True)
class Rung:
    """One size of the ladder; what only training tells is None before it."""

    size: str
    parameters: int  # that multiply: layers and output head
    tokens: int
    flops: float
    loss: float | None = None  # held out, nats a token
    bits_per_byte: float | None = None
    seconds: float | None = None
    predicted: float | None = None  # by the smaller sizes: made before training for the last, a backtest for others


@dataclass(frozen=True)
class Forecast:
    """The prediction of the last size as it was written down."""

    law: Law
    loss: float
    low: float
    high: float
    before_training: bool


def ladder_table(rungs: Sequence[Rung]) -> Table:
    """A line a size; the error is the outcome's distance from the prediction, as a share of the outcome."""
    table = Table(
        title="Ladder, held-out loss", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    table.add_column("size", no_wrap=True, style="bold")
    for heading in ("params", "tokens", "FLOPs", "time", "bits/byte", "predicted", "loss", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rung in rungs:
        error = relative_error(rung)
        table.add_row(
            rung.size,
            short_count(rung.parameters),
            short_count(rung.tokens),
            f"{rung.flops:.1e}".replace("e+", "e"),
            SECONDS_UNKNOWN if rung.seconds is None else format_duration(rung.seconds),
            _figure(rung.bits_per_byte),
            _figure(rung.predicted),
            _figure(rung.loss),
            "" if error is None else f"{error:+.1%}",
        )
    table.caption = "loss: nats per token; predicted: from the smaller sizes; error: predicted over loss"
    table.caption_justify = "left"
    return table


def relative_error(rung: Rung) -> float | None:
    """(predicted - outcome) / outcome, or None while either is missing."""
    if rung.predicted is None or rung.loss is None:
        return None
    return (rung.predicted - rung.loss) / rung.loss


def short_count(count: float) -> str:
    """`860`, `412k`, `12.3M`, `1.20B`."""
    if count < 10_000:
        return f"{count:.0f}"
    unit, size = ("B", 1e9) if count >= 1e9 else ("M", 1e6) if count >= 1e6 else ("k", 1e3)
    value = count / size
    return f"{value:.2f}{unit}" if value < 10 else f"{value:.1f}{unit}" if value < 100 else f"{value:.0f}{unit}"


def plot_ladder(rungs: Sequence[Rung], forecast: Forecast | None, path: Path) -> Path:
    """Loss against compute, both axes logarithmic, into a PNG at `path`: trained sizes, law, prediction, outcome."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    below = [(rung.flops, rung.loss) for rung in rungs[:-1] if rung.loss is not None]
    last = rungs[-1]
    if below:
        axes.plot(*zip(*below, strict=True), "o", color=COLOURS[0], markersize=6, label="trained")
    if forecast is not None:
        law = forecast.law
        across = np.geomspace(min(rung.flops for rung in rungs) / 1.3, last.flops * 1.6, 100)
        label = f"{law.floor:.2f} + {law.scale:.2f} (C / {law.reference:.1e})$^{{-{law.exponent:.2f}}}$"
        axes.plot(across, [law.loss(flops) for flops in across], color=COLOURS[0], linewidth=1.3, label=label)
        made = "prediction" if forecast.before_training else "law's value (made after the outcome)"
        ends = [[forecast.loss - forecast.low], [forecast.high - forecast.loss]]
        axes.errorbar(
            [last.flops],
            [forecast.loss],
            yerr=ends,
            fmt="D",
            color=COLOURS[4],
            markersize=7,
            markerfacecolor="none",
            capsize=4,
            label=f"{made} {forecast.loss:.3f}, 95% interval",
        )
    if last.loss is not None:
        error = relative_error(last)
        told = "" if error is None else f", prediction {error:+.1%}"
        axes.plot(
            [last.flops], [last.loss], "*", color=COLOURS[1], markersize=12, label=f"outcome {last.loss:.3f}{told}"
        )
    for rung in rungs:
        height = rung.loss if rung.loss is not None else forecast.loss if forecast else None
        if height is not None:
            axes.annotate(
                rung.size,
                (rung.flops, height),
                xytext=(6, 6),
                textcoords="offset points",
                fontsize="small",
                color="0.3",
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.1)
    axes.set_title("Loss against compute")
    axes.set_xlabel("training compute, FLOPs")
    axes.set_ylabel("held-out loss, nats per token")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
