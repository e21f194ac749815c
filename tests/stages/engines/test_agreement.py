"""Drift and importance weights, worked by hand."""

import math

import pytest
import torch

from baton.errors import UserError
from stages.engines.agreement import check_engine, drift_nats, importance_weights


def test_drift_is_the_mean_over_tokens_not_over_replies() -> None:
    # gaps 0.1, 0.3 and 0.2, 0, 0.4: 1.0 over five tokens
    engine, trainer = [[-1.0, -2.0], [-0.5, -3.0, -1.0]], [[-1.1, -1.7], [-0.7, -3.0, -0.6]]
    assert drift_nats(engine, trainer) == pytest.approx(0.2)
    assert check_engine(engine, trainer, 0.2001) == pytest.approx(0.2)
    said = r"0\.2 nats a token .* over 5 tokens .at most 0\.1; .* 0\.4 nats at token 2 of reply 1"
    with pytest.raises(UserError, match=said):
        check_engine(engine, trainer, 0.1)


def test_drift_that_is_no_number_stops() -> None:
    with pytest.raises(UserError, match="nan nats at token 0 of reply 1"):
        check_engine([[-1.0], [math.nan]], [[-3.0], [-1.0]], 10.0)


def test_missing_log_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0\].*\[1\]"):
        drift_nats([[]], [[-1.0]])


def test_importance_weights_by_hand() -> None:
    trainer = torch.tensor([[math.log(0.5), math.log(0.2), 0.0], [math.log(0.9), -1.0, 500.0]], requires_grad=True)
    engine = torch.tensor([[math.log(0.25), math.log(0.4), 0.0], [math.log(0.1), -1.0, -500.0]])
    weights = importance_weights(trainer, engine, cap=3.0)
    assert weights.tolist() == [pytest.approx([2.0, 0.5, 1.0]), pytest.approx([3.0, 1.0, 3.0])]
    assert not weights.requires_grad
    assert importance_weights(trainer, engine, cap=0.5)[0].tolist() == pytest.approx([0.5, 0.5, 0.5])
