"""The ladder's picture and table."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from baton.ladder_plot import Forecast, Rung, ladder_table, plot_ladder, relative_error, short_count
from baton.scaling import Law

LAW = Law(floor=2.0, scale=2.0, exponent=0.5, reference=1e12)
RUNGS = [
    Rung("1m", 1_000_000, 20_000_000, 1e12, 4.0, 2.1, 61.0),
    Rung("2m", 2_000_000, 40_000_000, 4e12, 3.0, 1.6, 122.0),
    Rung("4m", 4_000_000, 80_000_000, 16e12, 2.5, 1.3, 3700.0, predicted=2.55),
]
FORECAST = Forecast(LAW, loss=2.55, low=2.4, high=2.6, before_training=True)


def test_counts_are_short() -> None:
    assert [short_count(n) for n in (860, 92_160, 1_250_304, 25_001_984, 250_000_000, 1_200_000_000)] == [
        "860", "92.2k", "1.25M", "25.0M", "250M", "1.20B",
    ]  # fmt: skip


def test_the_error_is_a_share_of_the_outcome() -> None:
    assert relative_error(RUNGS[2]) == pytest.approx(0.02)  # (2.55 - 2.5) / 2.5
    assert relative_error(RUNGS[0]) is None
    assert relative_error(replace(RUNGS[2], loss=None)) is None


def test_the_table_fits_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(ladder_table(RUNGS))
    lines = console.export_text().splitlines()
    row = next(line for line in lines if line.lstrip().startswith("4m"))
    assert row.split() == ["4m", "4.00M", "80.0M", "1.6e13", "1:01:40", "1.300", "2.550", "2.500", "+2.0%"]
    row = next(line for line in lines if line.lstrip().startswith("1m"))
    assert row.split() == ["1m", "1.00M", "20.0M", "1.0e12", "1:01", "2.100", "4.000"]


def drawn(monkeypatch: pytest.MonkeyPatch, rungs: list[Rung], forecast: Forecast | None, path: Path) -> Any:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *rest, **named: figures.append(figure) or save(figure, *rest, **named)
    )
    assert plot_ladder(rungs, forecast, path) == path and path.stat().st_size > 5000
    return figures[0].axes[0]


def test_the_picture_shows_law_prediction_and_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(monkeypatch, RUNGS, FORECAST, tmp_path / "plots" / "ladder.png")
    labels = axes.get_legend_handles_labels()[1]
    assert "outcome 2.500, prediction +2.0%" in labels
    assert "prediction 2.550, 95% interval" in labels and "trained" in labels
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    lines = {line.get_label(): line for line in axes.lines}
    assert [float(x) for x in lines["trained"].get_xdata()] == [1e12, 4e12]  # the last is the outcome
    curve = next(line for label, line in lines.items() if "(C /" in str(label))
    x, y = float(curve.get_xdata()[40]), float(curve.get_ydata()[40])
    assert y == pytest.approx(2.0 + 2.0 * (x / 1e12) ** -0.5)


def test_a_value_known_before_is_no_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn(monkeypatch, RUNGS, replace(FORECAST, before_training=False), tmp_path / "ladder.png")
    assert "law's value (made after the outcome) 2.550, 95% interval" in axes.get_legend_handles_labels()[1]


def test_a_ladder_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = [*RUNGS[:2], replace(RUNGS[2], loss=None, bits_per_byte=None, seconds=None)]
    axes = drawn(monkeypatch, waiting, FORECAST, tmp_path / "ladder.png")
    assert not any("outcome" in label for label in axes.get_legend_handles_labels()[1])
