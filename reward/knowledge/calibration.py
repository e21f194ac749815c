"""Whether a margin means what it says: sigmoid(margin) as the probability that the preferred reply is the better."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

NUM_BINS = 10


@dataclass(frozen=True)
class Bin:
    """Pairs whose confidence falls between `low` and `high`."""

    low: float
    high: float
    count: int
    confidence: float  # their mean
    accuracy: float  # how often the preferred reply was the chosen one


def confidence(margin: torch.Tensor) -> torch.Tensor:
    """margin (N,) -> probability (N,), 0.5 to 1, that Bradley-Terry gives to the reply with the higher score."""
    return torch.sigmoid(margin.double().abs())


def reliability(margin: torch.Tensor, right: torch.Tensor, num_bins: int = NUM_BINS) -> list[Bin]:
    """The bins of a reliability diagram that hold any pair. Guo et al. 2017, section 2.

    margin (N,), chosen minus rejected; right (N,), 1 where the chosen reply has the higher score, 0.5 where they are
    equal. The confidence in a preference begins at 0.5, so the bins are of equal width from 0.5 to 1.
    """
    assert margin.shape == right.shape, (margin.shape, right.shape)
    sure, right = confidence(margin), right.double()
    at = ((sure - 0.5) * 2 * num_bins).floor().clamp(0, num_bins - 1).long()
    bins = []
    for number in range(num_bins):
        inside = at == number
        if count := int(inside.sum()):
            low, high = 0.5 + 0.5 * number / num_bins, 0.5 + 0.5 * (number + 1) / num_bins
            bins.append(Bin(low, high, count, float(sure[inside].mean()), float(right[inside].mean())))
    return bins


def expected_calibration_error(bins: list[Bin]) -> float:
    """Mean |accuracy − confidence| over the pairs of all bins. Guo et al. 2017, eq. 3; Naeini et al. 2015."""
    total = sum(found.count for found in bins)
    return sum(found.count * abs(found.accuracy - found.confidence) for found in bins) / total


def calibration_noise(bins: list[Bin]) -> float:
    """The expected calibration error that a perfectly calibrated reward would show on so many pairs by chance.

    A bin's accuracy then is off by the mean absolute deviation of a share: sqrt(2 / pi) times its standard error, in
    the normal approximation.
    """
    total = sum(found.count for found in bins)
    errors = (math.sqrt(found.confidence * (1 - found.confidence) / found.count) * found.count for found in bins)
    return math.sqrt(2 / math.pi) * sum(errors) / total


def best_temperature(margin: torch.Tensor, bounds: tuple[float, float] = (0.05, 20.0)) -> float:
    """The T for which sigmoid(margin / T) is the likeliest: above 1 where margins claim too much. Guo et al. 2017, 4.2.

    margin (N,), chosen minus rejected. Where every pair is right (or none), likelihood has no maximum: the nearest of
    `bounds`. Found by bisection on the slope of a convex loss in 1 / T.
    """
    margin = margin.double()

    def slope(scale: float) -> float:
        """d/d(scale) of the mean of -log sigmoid(scale · margin)."""
        return float((-margin * torch.sigmoid(-scale * margin)).mean())

    low, high = 1 / bounds[1], 1 / bounds[0]
    if slope(low) >= 0:
        return bounds[1]
    if slope(high) <= 0:
        return bounds[0]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 2 / (low + high)
