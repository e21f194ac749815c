"""A tiny training with dropout: interrupted equals uninterrupted, what is skipped, rolled back, saved and when."""

import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from baton import checkpoints
from baton.errors import UserError
from baton.guard import Diverged
from baton.guarded_trainer import SKIPPED
from baton.preemption import Preempted
from baton.run import Run
from baton.training import train_guarded
from tests.baton.guarded_run import ROWS, Numbered, Observed, make_run, make_trainer
from tests.conftest import without_clocks

NAN = float("nan")


def trained(run: Run[Any], *callbacks: TrainerCallback, **settings: Any) -> Observed:
    """The whole training, as a stage runs it."""

    def make(skipped: tuple[int, ...]) -> Observed:
        trainer = make_trainer(run, skipped, **settings)
        for callback in callbacks:
            trainer.add_callback(callback)
        return trainer

    return train_guarded(run, make)


def everything(trainer: Observed) -> dict[str, torch.Tensor]:
    """Weights and moments."""
    moments = {
        f"{at}.{name}": torch.as_tensor(item)
        for at, state in trainer.optimizer.state_dict()["state"].items()
        for name, item in state.items()
    }
    return {**trainer.trained_tensors(), **moments}


def assert_equal(ours: Observed, theirs: Observed) -> None:
    mine, other = everything(ours), everything(theirs)
    assert mine.keys() == other.keys() and len(mine) == 8
    assert all(torch.equal(mine[name], other[name]) for name in mine)


def lines(run: Run[Any]) -> list[dict[str, Any]]:
    text = (run.folder / "metrics.jsonl").read_text()
    return [without_clocks(json.loads(line)) for line in text.splitlines()]


def batches(trainer: Observed) -> list[int]:
    """The batches of the micro-batches read, without repetition."""
    return list(dict.fromkeys(number // ROWS for rows in trainer.seen for number in rows))


def interrupted(run: Run[Any], checkpoint: int, to: Path, **settings: Any) -> Run[Any]:
    """A copy of the run as a kill after `checkpoint` would have left it."""
    other = make_run(to, **settings)
    shutil.copytree(run.checkpoints / f"checkpoint-{checkpoint}", other.checkpoints / f"checkpoint-{checkpoint}")
    for name in ("metrics.jsonl", SKIPPED):
        if (run.folder / name).exists():
            shutil.copy(run.folder / name, to / name)
    return other


class At(TrainerCallback):
    """Does something when a step has ended."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act()


@pytest.mark.parametrize("rows_at_once", [1, 2, 4])
def test_interrupted_equals_uninterrupted(tmp_path: Path, rows_at_once: int) -> None:
    """With dropout, and with 4, 2 and 1 micro-batches; line 10 counts steps from both sides of checkpoint 9."""
    run = make_run(tmp_path / "whole", keep=9)
    whole = trained(run, rows_at_once=rows_at_once)
    for checkpoint in (3, 9, 12):
        again = interrupted(run, checkpoint, tmp_path / str(checkpoint))
        assert_equal(trained(again, rows_at_once=rows_at_once), whole)
        assert lines(again) == lines(run)


def test_saving_and_telling_more_often_on_the_way_changes_no_step(tmp_path: Path) -> None:
    """A full disk may ask for it: the training goes on where it was, by the new settings."""
    run = make_run(tmp_path / "whole")
    whole = trained(run)
    again = interrupted(run, 9, tmp_path / "again", save_every=2, log_every=1, keep=1)
    assert_equal(trained(again), whole)
    assert [checkpoints.step_of(path) for path in checkpoints.complete_checkpoints(again.checkpoints)] == [12]
    assert [line["step"] for line in lines(again)] == [2, 4, 6, 8, 10, 11, 12]


def test_dropout_is_on_in_these_tests(tmp_path: Path) -> None:
    """Otherwise the generators' state would mean nothing."""
    run = make_run(tmp_path)
    first, second = make_trainer(run), make_trainer(run)
    torch.manual_seed(1)
    second.watch(run)
    first.train()
    torch.manual_seed(2)
    second.train()
    assert not torch.equal(first.trained_tensors()["head.weight"], second.trained_tensors()["head.weight"])


def test_a_line_of_metrics_is_the_mean_of_its_steps(tmp_path: Path) -> None:
    every, second = make_run(tmp_path / "1", log_every=1), make_run(tmp_path / "2", log_every=2)
    assert_equal(trained(every), trained(second))
    losses = [line["loss"] for line in lines(every)]
    assert [line["loss"] for line in lines(second)] == [
        pytest.approx((losses[at] + losses[at + 1]) / 2, abs=1e-9) for at in range(0, 12, 2)
    ]
    rows = [json.loads(line) for line in (every.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["rows_per_s"] > 0 and row["time_left_s"] >= 0 for row in rows) and rows[-1]["time_left_s"] == 0


@pytest.mark.parametrize("rows_at_once", [1, 4])
def test_a_step_without_a_number_changes_nothing(tmp_path: Path, rows_at_once: int) -> None:
    run, found = make_run(tmp_path / "run", keep=9), {}

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer: Any = holder[0]
            found[state.global_step] = {name: item.detach().clone() for name, item in everything(trainer).items()}

    holder: list[Observed] = []

    def make(skipped: tuple[int, ...]) -> Observed:
        holder[:] = [make_trainer(run, skipped, {5: NAN, 8: NAN}, rows_at_once)]
        holder[0].add_callback(Watch())
        return holder[0]

    trainer = train_guarded(run, make)
    for step in range(2, 13):  # step 6 read batch 5
        same = all(torch.equal(item, found[step - 1][name]) for name, item in found[step].items())
        assert same == (step in (6, 9)), step
    assert all(bool(item.isfinite().all()) for item in found[12].values())
    assert trainer.summary() == {"skipped_steps": 2, "rollbacks": 0}
    counted = [line.get("skipped_steps", 0) for line in lines(run)]
    assert counted == [0, 0, 1, 1, 2, 2] and all("loss" in line for line in lines(run))
    again = interrupted(run, 6, tmp_path / "again")
    assert_equal(trained(again, broken={5: NAN, 8: NAN}, rows_at_once=rows_at_once), trainer)
    assert lines(again) == lines(run)


def test_a_line_none_of_whose_steps_was_taken_has_no_loss(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    trained(run, broken={2: NAN, 3: NAN})
    assert "loss" not in lines(run)[1] and lines(run)[1]["skipped_steps"] == 2


@pytest.mark.parametrize(("settings", "words"), [({"guard": None}, "guard: null"), ({}, "max_skipped: 2")])
def test_too_many_of_them_end_the_run(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    run = make_run(tmp_path, **({"guard": {"max_skipped": 2}} | settings))
    with pytest.raises(Diverged, match=words):
        trained(run, broken=dict.fromkeys(range(5, 12), NAN))
    assert run.last_checkpoint() == run.checkpoints / f"checkpoint-{3 if settings else 6}"


SPIKES: dict[str, Any] = {
    "steps": 20,
    "save_every": 4,
    "keep": 9,
    "guard": {"window": 8, "spike_sigmas": 30, "spike_steps": 1},
}


def test_a_spike_goes_back_and_passes_over_the_batches_since(tmp_path: Path) -> None:
    """The end is that of a run that never had those batches; killed after the rollback, it is the same."""
    run = make_run(tmp_path / "run", **SPIKES)
    trainer = trained(run, broken={14: 1000.0})
    assert batches(trainer) == [*range(12, 20)][3:] + [20, 21, 22]
    clean = make_run(tmp_path / "clean", **SPIKES)
    never = make_trainer(clean, skipped=(12, 13, 14))
    never.watch(clean)
    never.train()
    assert batches(never) == [*range(12), *range(15, 23)]
    assert_equal(trainer, never)
    assert lines(run) == lines(clean)

    (rollback,) = json.loads((run.folder / SKIPPED).read_text())["rollbacks"]
    assert (rollback["step"], rollback["checkpoint"], rollback["batches"]) == (15, 12, [12, 13, 14])
    assert rollback["samples"]["13"] == ["row 52", "row 53", "row 54", "row 55"]
    assert rollback["loss"] > 1e5 and trainer.summary() == {"skipped_steps": 0, "rollbacks": 1}

    again = interrupted(run, 16, tmp_path / "again", **SPIKES)
    assert_equal(trained(again, broken={14: 1000.0}), trainer)


def test_a_second_spike_from_one_checkpoint_goes_back_to_the_one_before(tmp_path: Path) -> None:
    run = make_run(tmp_path, **SPIKES)
    trained(run, broken={14: 1000.0, 15: 1000.0})
    rollbacks = json.loads((run.folder / SKIPPED).read_text())["rollbacks"]
    assert [(r["checkpoint"], r["batches"]) for r in rollbacks] == [(12, [12, 13, 14]), (8, [8, 9, 10, 11, 15])]


def test_a_spike_older_than_every_checkpoint_goes_back_to_the_oldest(tmp_path: Path) -> None:
    """The one that is kept was written in the middle of the spike."""
    run = make_run(tmp_path, **SPIKES | {"keep": 1, "guard": SPIKES["guard"] | {"spike_steps": 3}})
    trainer = trained(run, broken={10: 1000.0, 11: 1000.0, 12: 1000.0})
    (rollback,) = json.loads((run.folder / SKIPPED).read_text())["rollbacks"]
    assert (rollback["step"], rollback["checkpoint"], rollback["batches"]) == (13, 12, [12])
    assert batches(trainer) == list(range(13, 21))


def test_where_other_text_begins_higher_losses_are_no_spike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, **SPIKES)
    monkeypatch.setattr(Numbered, "changes_at", lambda self, step: step == 14, raising=False)
    trained(run, broken={number: 1000.0 for number in range(14, 20)})
    assert not (run.folder / SKIPPED).exists()


def test_a_spike_before_any_checkpoint_begins_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, **SPIKES | {"save_every": 15})
    trainer = trained(run, broken={10: 1000.0})
    assert batches(trainer) == list(range(11, 31))


def test_too_many_spikes_end_the_run_and_the_message_says_what_to_do(tmp_path: Path) -> None:
    run = make_run(tmp_path, **SPIKES | {"guard": SPIKES["guard"] | {"max_rollbacks": 1}})
    with pytest.raises(Diverged, match=r"spiked 1 times before.*skipped\.json.*raise train\.guard\.spike_sigmas"):
        trained(run, broken={14: 1000.0, 18: 1000.0})
    assert len(json.loads((run.folder / SKIPPED).read_text())["rollbacks"]) == 1


@pytest.mark.parametrize("step", [5, 6, 12])
def test_a_signal_saves_and_ends_and_the_rest_is_the_same(tmp_path: Path, step: int) -> None:
    """Between checkpoints, at one, and at the last step."""
    whole = trained(make_run(tmp_path / "whole"))
    run = make_run(tmp_path / "run")
    with pytest.raises(Preempted, match=f"saved at step {step};"):
        trained(run, At(step - 1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert run.last_checkpoint() == run.checkpoints / f"checkpoint-{step}"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert_equal(trained(run), whole)
    assert [line["step"] for line in lines(run)] == [2, 4, 6, 8, 10, 12]


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, may_write, writing = make_run(tmp_path), threading.Event(), threading.Event()
    write, order = checkpoints._write, []

    def slow(path: Path, content: Any) -> str:
        writing.set()
        assert may_write.wait(60)
        return write(path, content)

    monkeypatch.setattr(checkpoints, "_write", slow)

    def look() -> None:
        assert writing.wait(60) and not list(run.checkpoints.glob("checkpoint-*"))
        order.append("a step while it is written")
        may_write.set()

    trained(run, At(5, look))
    assert order and [checkpoints.step_of(path) for path in checkpoints.complete_checkpoints(run.checkpoints)] == [
        9,
        12,
    ]


def test_what_is_written_is_the_moment_it_was_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps later, when the writer begins, weights and moments have changed."""
    run, quick = make_run(tmp_path / "slow", keep=9), make_run(tmp_path / "quick", keep=9)
    may_write = threading.Event()
    write = checkpoints._write

    def slow(path: Path, content: Any) -> str:
        assert may_write.wait(60)
        return write(path, content)

    monkeypatch.setattr(checkpoints, "_write", slow)
    trained(run, At(5, may_write.set))
    trained(quick)
    for name in ("trained.safetensors", "optimizer.pt", "guard.json", "rng_state.pth"):
        ours, theirs = (r.checkpoints / "checkpoint-3" / name for r in (run, quick))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_a_failure_to_write_surfaces_and_names_disk_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, save_every=3, steps=400)

    def full(path: Path, content: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "_write", full)
    steps = []
    with pytest.raises(
        UserError, match=r"checkpoint-3 failed: .*No space left.*GB free on that disk.*the same command"
    ):
        trained(run, *(At(step, lambda: steps.append(1)) for step in range(400)))
    assert 3 <= len(steps) < 400 and run.last_checkpoint() is None and not list(run.checkpoints.iterdir())


def test_only_what_is_trained_is_saved_and_the_last_are_kept(tmp_path: Path) -> None:
    from safetensors import safe_open

    run = make_run(tmp_path, keep=1)
    trained(run)
    (last,) = run.checkpoints.iterdir()
    assert last.name == "checkpoint-12"
    with safe_open(last / "trained.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["head.bias", "head.weight"]
    assert json.loads((last / "trainer_state.json").read_text())["log_history"] == []


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    trained(run)
    trainer = make_trainer(run)
    trainer.model.base.requires_grad_(True)
    trainer.watch(run)
    with pytest.raises(UserError, match=r"other weights than are trained here, for example base\.bias"):
        trainer.train_from(str(run.last_checkpoint()))


def test_without_a_run_it_is_a_plain_trainer(tmp_path: Path) -> None:
    trainer = make_trainer(make_run(tmp_path))
    trainer.train()
    assert trainer.state.global_step == 12 and trainer.summary() == {}
