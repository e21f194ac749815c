"""Length: correlations by numpy and by hand, matched pairs, and longest-wins."""

import numpy as np
import pytest
import torch

from reward.knowledge.length import Lengths, correlation, is_matched, longer_points, reply_lengths, within_pairs


def lengths(chosen: list[float], rejected: list[float]) -> Lengths:
    return Lengths(torch.tensor(chosen).double(), torch.tensor(rejected).double())


def test_correlation_is_numpys() -> None:
    rng = np.random.default_rng(1)
    left = rng.normal(size=30)
    right = left + rng.normal(size=30)
    expected = np.corrcoef(left, right)[0, 1]
    assert correlation(torch.tensor(left), torch.tensor(right)) == pytest.approx(expected, abs=1e-12)
    assert correlation(torch.ones(3), torch.arange(3.0)) is None


def test_within_pairs_is_numpys_after_the_prompts_means_are_gone() -> None:
    rng = np.random.default_rng(2)
    scores, tokens = rng.normal(size=(2, 20)), rng.integers(1, 90, size=(2, 20)).astype(float)
    centred = [(values - values.mean(0)).ravel() for values in (scores, tokens)]
    margin = torch.tensor(scores[0] - scores[1])
    found = within_pairs(margin, Lengths(torch.tensor(tokens[0]), torch.tensor(tokens[1])))
    assert found == pytest.approx(np.corrcoef(*centred)[0, 1], abs=1e-12)
    swapped = within_pairs(-margin, Lengths(torch.tensor(tokens[1]), torch.tensor(tokens[0])))
    assert swapped == pytest.approx(found, abs=1e-12)


def test_longer_points() -> None:
    assert longer_points(lengths([3, 2, 2], [2, 3, 2])).tolist() == [1.0, 0.0, 0.5]


def test_matched_pairs_lack_at_most_a_tenth() -> None:
    assert is_matched(lengths([90, 89, 100, 5], [100, 100, 90, 5])).tolist() == [True, False, True, True]


def test_reply_lengths(make_pair) -> None:
    pairs = [make_pair(3, 5)]
    assert [side.tolist() for side in reply_lengths(pairs)] == [[3.0], [5.0]]
    # the prompt has 1 token: the second of those in common is the replies' own
    assert [side.tolist() for side in reply_lengths(pairs, [1])] == [[4.0], [6.0]]
