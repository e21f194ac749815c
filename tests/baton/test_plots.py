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
    path = write(tmp_path, {"step": 4, "time_s": 1.0, "alarm": "length_drift", "message": "longer"})
    assert read_metrics(path) == {"alarm/length_drift": [(4, 1.0)]}


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
        "Reward against KL": "reward per reply",
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
    assert panels.pop("Reward against KL").get_xlabel() == "KL from the reference, nats per reply"
    assert all(axes.get_xlabel() == "step" for axes in panels.values())
    assert len({axes.get_xlim() for axes in panels.values()}) == 1


def test_a_loss_has_the_unit_of_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0})
    assert drawn("sft", tmp_path, monkeypatch)["Loss"].get_ylabel() == "nats per token"
    monkeypatch.undo()
    assert drawn("reward", tmp_path, monkeypatch)["Loss"].get_ylabel() == "nats per pair"


def ppo_rows(count: int) -> list[dict[str, Any]]:
    """Every metric of a PPO run, with an evaluation at every second step."""
    rows = []
    for step in range(1, count + 1):
        row: dict[str, Any] = {"step": step, "reward": step / 10, "reward/rule": 0.5, "reward/model": step / 5}
        row |= {"kl_nats": step / 4, "kl_coefficient": 0.05, "length": 40.0, "eos_rate": 0.9, "entropy_nats": 2.0}
        row |= {"clip_fraction/policy": 0.1, "clip_fraction/value": 0.0, "explained_variance": 0.5, "loss/ptx": 3.0}
        row |= {"loss/policy": -0.1, "loss/value": 0.4, "grad_norm/policy": 1.0, "grad_norm/value": 2.0}
        row |= {"engine_gap_nats": 1e-4, "episodes_per_s": 0.5, "memory/peak_gb": 2.0}
        row |= {"time/rollout_s": 3.0, "time/score_s": 1.0, "time/update_s": 4.0}
        if step % 2 == 0:
            row |= {"eval/reward": step / 12, "eval/gold": -step / 12, "eval/kl_nats": step / 5, "eval/length": 41.0}
            row |= {"eval/reward/rule": 0.25, "eval/reward/model": step / 6, "eval/eos_rate": 1.0}
            row |= {"eval/win_rate": 0.7, "eval/win_rate_low": 0.6, "eval/win_rate_high": 0.8}
        rows.append(row)
    rows[-1] |= {"eval/reward_before": 0.0, "eval/gold_before": 0.1, "eval/reward/rule_before": 0.2}
    alarms = [{"step": 3, "alarm": name, "message": "…"} for name in ("length_drift", "reward_stuck/rule")]
    return [*rows, *alarms]


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


@pytest.fixture(scope="module")
def ppo_panels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four steps of a PPO run, drawn once: title -> axes."""
    folder = tmp_path_factory.mktemp("ppo")
    write(folder, *ppo_rows(4))
    with pytest.MonkeyPatch.context() as patch:
        return drawn("ppo", folder, patch)


def test_a_ppo_run(ppo_panels: dict[str, Any]) -> None:
    panels = ppo_panels
    assert len(panels) == 20
    against = panels["Reward against KL"]
    assert against.collections[0].get_offsets().tolist() == [[0.25, 0.1], [0.5, 0.2], [0.75, 0.3], [1.0, 0.4]]
    assert lines(against)["held out"] == ([0.4, 0.8], [pytest.approx(2 / 12), pytest.approx(4 / 12)])
    assert lines(against)["held out, gold"] == ([0.4, 0.8], [pytest.approx(-2 / 12), pytest.approx(-4 / 12)])
    assert lines(against)["before"] == ([0.0], [0.0])
    assert lines(panels["Gold reward, never optimised"])["held out, before"][1] == [0.1, 0.1]
    components = lines(panels["Reward components"])
    assert components["rule"] == ([1, 2, 3, 4], [0.5] * 4)
    assert components["model, held out"] == ([2, 4], [pytest.approx(2 / 6), pytest.approx(4 / 6)])
    assert set(components) == {"model", "model, held out", "rule", "rule, held out", "alarm"}
    band = panels["Win rate against SFT"].collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} >= {(2.0, 0.6), (4.0, 0.6), (2.0, 0.8), (4.0, 0.8)}
    tops = [max(area.get_paths()[0].vertices[:, 1]) for area in panels["Where the time goes"].collections]
    assert tops == pytest.approx([37.5, 50.0, 100.0])


def test_alarms_are_marked_in_their_panels(ppo_panels: dict[str, Any]) -> None:
    marked = {title for title, axes in ppo_panels.items() if "alarm" in lines(axes)}
    assert marked == {"Length", "Reward", "Reward components"}
    assert lines(ppo_panels["Length"])["alarm"][0] == [3, 3]


def test_nothing_overlaps_in_a_ppo_run(ppo_panels: dict[str, Any]) -> None:
    boxes = [axes.get_tightbbox() for axes in ppo_panels.values()]
    for at, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[at + 1 :])


def test_a_single_step_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"time/rollout_s": 3.0, "time/score_s": 0.0, "time/update_s": 1.0}
    write(tmp_path, {"step": 1, "reward/rule": 1.0, **times})
    panels = drawn("ppo", tmp_path, monkeypatch)
    assert list(panels) == ["Where the time goes"]  # and no components: one alone is the reward itself
    tops = [max(area.get_paths()[0].vertices[:, 1]) for area in panels["Where the time goes"].collections]
    assert tops == pytest.approx([75.0, 75.0, 100.0])


def test_nothing_overlaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Titles and labels of neighbouring panels lie outside each other, whatever the size of the numbers."""
    write(tmp_path, *({"step": step, "loss": 1e6 * step, "reward": -1e-5 * step, "length": 3} for step in range(1, 9)))
    panels = list(drawn("ppo", tmp_path, monkeypatch).values())
    boxes = [axes.get_tightbbox() for axes in panels]
    for at, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[at + 1 :])
