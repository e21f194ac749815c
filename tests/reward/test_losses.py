"""The pair loss by hand, and its gradient's direction."""

import math

import pytest
import torch

from baton.recipe import PairLoss
from reward.losses import pair_losses, targets


def loss_of(chosen: float, rejected: float, margin: float = 0.0, is_tie: bool = False, **settings: float) -> float:
    loss = PairLoss(**settings)
    target = targets(torch.tensor([is_tie]), loss.label_smoothing)
    given = [torch.tensor([number], dtype=torch.float64) for number in (chosen, rejected, margin)]
    return float(pair_losses(*given, target, loss))


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def test_bradley_terry() -> None:
    assert loss_of(1.5, 0.5) == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)
    assert loss_of(0.3, 0.3) == pytest.approx(math.log(2), abs=1e-6)
    assert loss_of(-400.0, 400.0) == pytest.approx(800.0)


def test_a_margin_is_wanted_before_the_pair_counts_as_ordered() -> None:
    assert loss_of(1.0, 0.0, margin=2.0) == pytest.approx(-log_sigmoid(1.0), abs=1e-6)
    assert loss_of(1.0, 0.0, margin=2.0, margin_weight=0.5) == pytest.approx(-log_sigmoid(0.0), abs=1e-6)


def test_smoothed_labels() -> None:
    expected = -0.9 * log_sigmoid(1.0) - 0.1 * log_sigmoid(-1.0)
    assert loss_of(1.0, 0.0, label_smoothing=0.1) == pytest.approx(expected, abs=1e-6)


def test_a_tie_wants_equal_scores_whatever_the_smoothing() -> None:
    expected = -0.5 * log_sigmoid(1.0) - 0.5 * log_sigmoid(-1.0)
    assert loss_of(1.0, 0.0, is_tie=True) == pytest.approx(expected, abs=1e-6)
    assert loss_of(0.0, 1.0, is_tie=True, label_smoothing=0.2) == pytest.approx(expected, abs=1e-6)
    scores = torch.zeros(1, requires_grad=True)
    zero = torch.zeros(1)
    pair_losses(scores, zero, zero, targets(torch.tensor([True]), 0.0), PairLoss()).sum().backward()
    assert scores.grad is not None and scores.grad.item() == 0


def test_centring_adds_the_square_of_the_sum() -> None:
    assert loss_of(1.5, 0.5, centring=0.01) - loss_of(1.5, 0.5) == pytest.approx(0.01 * 4, abs=1e-6)
    assert loss_of(0.5, -0.5, centring=0.01) == pytest.approx(loss_of(0.5, -0.5), abs=1e-9)
