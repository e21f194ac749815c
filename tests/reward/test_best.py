"""Which weights are kept, and when a member has had its chances."""

from pathlib import Path

import torch

from baton.checkpoints import _write
from reward.best import Best


def weights(number: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([number])}


def test_the_lowest_loss_is_kept_and_patience_counts_the_others() -> None:
    best = Best(1, patience=2)
    for step, loss in ((1, 0.7), (2, 0.5), (3, 0.6)):
        best.note(0, step, loss, weights(step))
    assert not best.is_finished(0)
    best.note(0, 4, 0.4, weights(4))
    best.note(0, 5, 0.4, weights(5))
    best.note(0, 6, float("nan"), weights(6))
    assert best.all_finished and best.steps == [4] and best.losses == [0.4]
    best.note(0, 7, 0.1, weights(7))
    assert best.weights[0]["w"].item() == 4


def test_members_stop_by_themselves() -> None:
    best = Best(2, patience=1)
    for step in (1, 2):
        best.note(0, step, 0.5, weights(step))
        best.note(1, step, 0.5 - 0.1 * step, weights(step))
    assert [best.is_finished(number) for number in (0, 1)] == [True, False]
    assert not best.all_finished and best.steps == [1, 2]


def test_without_patience_nobody_is_finished_and_the_best_is_kept() -> None:
    best = Best(1, patience=None)
    for step, loss in ((1, 0.5), (2, 0.6), (3, 0.7)):
        best.note(0, step, loss, weights(step))
    assert not best.all_finished and best.steps == [1]


def test_the_weights_are_copies() -> None:
    best, moving = Best(1, None), weights(1)
    best.note(0, 1, 0.5, moving)
    moving["w"] += 1
    assert best.weights[0]["w"].item() == 1


def test_a_checkpoint_holds_everything(tmp_path: Path) -> None:
    best, again = Best(2, 3), Best(2, 3)
    best.note(1, 4, 0.5, weights(7))
    best.note(1, 5, 0.6, weights(8))
    for name, content in best.files().items():
        _write(tmp_path / name, content)
    again.load(tmp_path)
    assert (again.losses, again.steps, again.waited) == ([float("inf"), 0.5], [0, 4], [0, 1])
    assert again.weights[0] == {} and again.weights[1]["w"].item() == 7
