"""Disagreement among members, by hand and by counting."""

import pytest
import torch

from reward.knowledge.ensemble import auroc, by_disagreement, mean_and_deviation, pairwise_agreement, unanimity

MARGINS = torch.tensor([[1.0, 1.0, -1.0, 2.0], [1.0, -1.0, -1.0, 1.0], [1.0, -3.0, 1.0, 3.0]])


def test_mean_and_population_deviation() -> None:
    mean, deviation = mean_and_deviation(MARGINS)
    assert mean.tolist() == pytest.approx([1.0, -1.0, -1 / 3, 2.0])
    # of 1, −1, −3 around −1: sqrt((4 + 0 + 4) / 3)
    assert deviation.tolist() == pytest.approx([0.0, (8 / 3) ** 0.5, (8 / 9) ** 0.5, (2 / 3) ** 0.5])


def test_agreement() -> None:
    assert unanimity(MARGINS) == 0.5
    # members 0 and 1 agree on 3 of 4, 0 and 2 on 2, 1 and 2 on 3
    assert pairwise_agreement(MARGINS) == pytest.approx((3 + 2 + 3) / 12)


def test_auroc_counts_the_pairs_won() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(0, 6, (40,), generator=generator).double()
    positive = torch.rand(40, generator=generator) < 0.3
    ones, zeros = values[positive].tolist(), values[~positive].tolist()
    won = sum((a > b) + 0.5 * (a == b) for a in ones for b in zeros)
    assert auroc(values, positive) == pytest.approx(won / (len(ones) * len(zeros)), abs=1e-12)
    assert auroc(values, torch.ones(40).bool()) is None


def test_by_disagreement() -> None:
    # by deviation: pairs 0 (0), 3 (0.82), 2 (0.94), 1 (1.63); the mean is right on 0 and 3
    first, second = by_disagreement(MARGINS, 2)
    assert (first.accuracy.rate, first.accuracy.count) == (1.0, 2) and first.low == 0.0
    assert (second.accuracy.rate, second.low) == (0.0, pytest.approx((8 / 9) ** 0.5))
    assert len(by_disagreement(MARGINS[:, :1])) == 1
