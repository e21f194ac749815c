"""Plots: the metrics as written, one panel a quantity."""

import json
from pathlib import Path
from typing import Any

import pytest

from baton.plots import plot_run, read_metrics


def write(run_dir: Path, *rows: dict[str, Any], end: str = "") -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


def test_metrics_are_read_by_name_and_step(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"step": 2, "time_s": 1.0, "loss": 2.5},
        {"step": 1, "time_s": 0.5, "loss": 3, "note": "text", "flag": True},
        {"step": 2, "time_s": 9.0, "loss": 2.0},  # written again after a resumption
        {"step": 3, "loss": float("nan"), "reward": float("inf")},
        {"loss": 7.0},
        end='[1]\n{"step": 4, "lo',
    )
    assert read_metrics(path) == {"loss": [(1, 3.0), (2, 2.0)]}


def test_no_metrics_no_plot(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == {}
    assert plot_run("sft", tmp_path) == []
    write(tmp_path, {"step": 1, "unheard_of": 1.0})
    assert plot_run("sft", tmp_path) == []
    assert not (tmp_path / "plots").exists()


def drawn(stage: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """title -> axes of every panel that can be seen"""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, path: Path, dpi: int) -> None:
        figures.append(figure)
        save(figure, path, dpi=dpi)

    monkeypatch.setattr(Figure, "savefig", keep)
    assert plot_run(stage, run_dir) == [run_dir / "plots" / f"{stage}.png"]
    assert (run_dir / "plots" / f"{stage}.png").read_bytes().startswith(b"\x89PNG")
    return {axes.get_title(): axes for axes in figures[0].axes if axes.get_visible()}


def test_panels_curves_levels_and_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(
        tmp_path,
        {"step": 1, "reward": -1.0, "kl_nats": 0.0, "length": 20},
        {"step": 2, "reward": 0.5, "kl_nats": 1.5, "length": 22},
        {"step": 2, "eval/reward": 0.75, "eval/reward_before": -1.25},
    )
    panels = drawn("ppo", tmp_path, monkeypatch)
    assert {title: axes.get_ylabel() for title, axes in panels.items()} == {
        "Reward": "reward per reply",
        "KL from the reference": "nats per reply",
        "Length": "tokens per reply",
    }
    rollouts, held_out, before = panels["Reward"].lines
    assert (list(rollouts.get_xdata()), list(rollouts.get_ydata())) == ([1, 2], [-1.0, 0.5])
    assert (list(held_out.get_xdata()), list(held_out.get_ydata())) == ([2], [0.75])
    assert held_out.get_marker() == "o"  # a lone point would be invisible as a line
    assert set(before.get_ydata()) == {-1.25}
    assert [text.get_text() for text in panels["Reward"].get_legend().get_texts()] == [
        "rollouts", "held out", "held out, before",
    ]  # fmt: skip
    assert panels["Length"].get_legend() is None  # one curve needs none
    assert all(axes.get_xlabel() == "step" for axes in panels.values())
    assert len({axes.get_xlim() for axes in panels.values()}) == 1


def test_a_loss_has_the_unit_of_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0})
    assert drawn("sft", tmp_path, monkeypatch)["Loss"].get_ylabel() == "nats per token"
    monkeypatch.undo()
    assert drawn("reward", tmp_path, monkeypatch)["Loss"].get_ylabel() == "nats per pair"


def test_nothing_overlaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Titles and labels of neighbouring panels lie outside each other, whatever the size of the numbers."""
    write(tmp_path, *({"step": step, "loss": 1e6 * step, "reward": -1e-5 * step, "length": 3} for step in range(1, 9)))
    panels = list(drawn("ppo", tmp_path, monkeypatch).values())
    boxes = [axes.get_tightbbox() for axes in panels]
    for at, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[at + 1 :])
