"""The KL's estimators and its coefficient, by hand."""

import math

import pytest
import torch

from stages.kl import Estimator, KLCoefficient, kl_estimate


@pytest.mark.parametrize(
    ("estimator", "expected", "slopes"),
    [
        # r = p_ref / p is 1/2 and 2; slopes by log p
        ("k1", [math.log(2), -math.log(2)], [1.0, 1.0]),
        ("k2", [math.log(2) ** 2 / 2, math.log(2) ** 2 / 2], [math.log(2), -math.log(2)]),
        ("k3", [0.5 - 1 + math.log(2), 2 - 1 - math.log(2)], [1 - 0.5, 1 - 2.0]),
    ],
)
def test_estimators(estimator: Estimator, expected: list[float], slopes: list[float]) -> None:
    reference = torch.tensor([math.log(0.3), math.log(0.6)], dtype=torch.float64)
    ours = torch.tensor([math.log(0.6), math.log(0.3)], dtype=torch.float64, requires_grad=True)
    found = kl_estimate(ours, reference, estimator)
    assert found.tolist() == pytest.approx(expected)
    found.sum().backward()
    assert ours.grad is not None and ours.grad.tolist() == pytest.approx(slopes)


def test_k1_and_k3_are_right_on_average_and_k2s_gradient_is_the_kls() -> None:
    """Over the whole distribution instead of samples."""
    logits = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([1.0, 0.5, -0.2], dtype=torch.float64).log_softmax(-1)
    ours = logits.log_softmax(-1)
    p = ours.exp()
    exact = (p * (ours - reference)).sum()
    for estimator in ("k1", "k3"):
        assert float((p * kl_estimate(ours, reference, estimator)).sum()) == pytest.approx(float(exact))
    assert (kl_estimate(ours, reference, "k3") >= 0).all()
    (slope,) = torch.autograd.grad(exact, logits, retain_graph=True)
    (found,) = torch.autograd.grad((p.detach() * kl_estimate(ours, reference, "k2")).sum(), logits)
    torch.testing.assert_close(found, slope)


def test_the_coefficient_follows_the_target() -> None:
    coefficient = KLCoefficient(0.1, target_nats=4.0, horizon_episodes=100)
    coefficient.adapt(4.4, 50)  # 10% above: x e^(0.1 x 50 / 100)
    assert coefficient.value == pytest.approx(0.1 * math.exp(0.05))
    coefficient.adapt(40.0, 50)  # far above: as if 20%
    assert coefficient.value == pytest.approx(0.1 * math.exp(0.15))
    coefficient.adapt(4.0, 50)
    assert coefficient.value == pytest.approx(0.1 * math.exp(0.15))
    coefficient.adapt(0.0, 100)  # far below
    assert coefficient.value == pytest.approx(0.1 * math.exp(-0.05))
    coefficient.adapt(0.0, 10_000)  # a batch far longer than the horizon
    assert 0 < coefficient.value < 1e-9


def test_without_a_target_the_coefficient_is_fixed() -> None:
    coefficient = KLCoefficient(0.1, None, 100)
    coefficient.adapt(40.0, 50)
    assert coefficient.value == 0.1
