"""What the disagreement of an ensemble's members says about its errors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch

from reward.knowledge.accuracy import Share, points, share

NUM_QUANTILES = 4


class Quantile(NamedTuple):
    """Pairs about which the members disagree to a like degree."""

    low: float  # of the margin's deviation over members, in score units
    high: float
    accuracy: Share


def mean_and_deviation(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """scores (K, N) -> mean (N,) and population deviation (N,) over the K members; no deviation for one member."""
    return scores.mean(0), scores.std(0, correction=0)


def unanimity(margins: torch.Tensor) -> float:
    """margins (K, N) -> share of pairs on which all members prefer the same side."""
    signs = margins.sign()
    return float((signs == signs[0]).all(0).double().mean())


def pairwise_agreement(margins: torch.Tensor) -> float:
    """margins (K, N), K > 1 -> how often two members prefer the same side, over all pairs of members."""
    assert len(margins) > 1, "one member has nobody to agree with"
    signs = margins.sign()
    agreed = [float((signs[a] == signs[b]).double().mean()) for a, b in combinations(range(len(signs)), 2)]
    return sum(agreed) / len(agreed)


def auroc(values: torch.Tensor, positive: torch.Tensor) -> float | None:
    """How often a positive has the higher of two values, equal ones counting half; None where a class is empty.

    values (N,), positive (N,) bool. The Mann-Whitney statistic over its maximum (Hanley and McNeil 1982), by ranks.
    """
    ones = int(positive.sum())
    zeros = len(positive) - ones
    if not ones or not zeros:
        return None
    _, at, counts = values.double().unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts.double() - 1) / 2)[at]  # from 1; equal values share the mean of their ranks
    return (float(ranks[positive].sum()) - ones * (ones + 1) / 2) / (ones * zeros)


def by_disagreement(margins: torch.Tensor, num_quantiles: int = NUM_QUANTILES) -> list[Quantile]:
    """Accuracy of the mean's preference by the deviation of the margin over members, the most agreed on first.

    margins (K, N). Parts of equal size, as far as N allows; fewer where there are fewer pairs than parts.
    """
    mean, deviation = mean_and_deviation(margins.double())
    right, order = points(mean), deviation.argsort(stable=True)
    parts: Sequence[torch.Tensor] = [part for part in order.tensor_split(num_quantiles) if len(part)]
    return [Quantile(float(deviation[part[0]]), float(deviation[part[-1]]), share(right[part])) for part in parts]
