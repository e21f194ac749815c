"""Calibration of margins, by hand and by simulation."""

import math

import pytest
import torch

from reward.knowledge.accuracy import points
from reward.knowledge.calibration import (
    best_temperature,
    calibration_noise,
    confidence,
    expected_calibration_error,
    reliability,
)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_confidence_is_of_the_preferred_side() -> None:
    assert confidence(torch.tensor([logit(0.8), -logit(0.8), 0.0])).tolist() == pytest.approx([0.8, 0.8, 0.5], abs=1e-6)


def test_bins_and_error_by_hand() -> None:
    # 0.62 is in the bin 0.60 to 0.65, 0.93 in 0.90 to 0.95; of the former 1 of 2 is right, of the latter 2 of 2
    margin = torch.tensor([logit(0.62), -logit(0.62), logit(0.93), logit(0.93)])
    bins = reliability(margin, points(margin))
    assert [(b.low, b.count, b.accuracy) for b in bins] == [(pytest.approx(0.6), 2, 0.5), (pytest.approx(0.9), 2, 1.0)]
    # (2 · |0.5 − 0.62| + 2 · |1 − 0.93|) / 4
    assert expected_calibration_error(bins) == pytest.approx(0.095, abs=1e-6)


def test_certainty_is_in_the_last_bin() -> None:
    (only,) = reliability(torch.tensor([100.0, -100.0]), torch.tensor([1.0, 0.0]))
    assert (only.low, only.high, only.count, only.accuracy) == (0.95, 1.0, 2, 0.5)


def test_noise_is_what_a_calibrated_reward_shows() -> None:
    generator = torch.Generator().manual_seed(0)
    errors, expected = [], []
    for _ in range(60):
        size = torch.randn(400, generator=generator).abs() * 1.5
        is_right = torch.rand(400, generator=generator) < torch.sigmoid(size)
        margin = torch.where(is_right, size, -size)
        bins = reliability(margin, points(margin))
        errors.append(expected_calibration_error(bins))
        expected.append(calibration_noise(bins))
    assert sum(errors) / 60 == pytest.approx(sum(expected) / 60, rel=0.08)


def test_temperature_of_two_values() -> None:
    # margins ±2, 3 of 4 right: sigmoid(2 / T) = 0.75, so T = 2 / ln 3
    margin = torch.tensor([2.0, 2.0, 2.0, -2.0])
    assert best_temperature(margin) == pytest.approx(2 / math.log(3), abs=1e-9)


def test_temperature_without_a_maximum_is_a_bound() -> None:
    assert best_temperature(torch.tensor([1.0, 2.0])) == 0.05
    assert best_temperature(torch.tensor([-1.0, -2.0])) == 20.0
