"""Best-of-n worked by hand, against every subset, and against the KL that it truly spends."""

import itertools
import math

import numpy as np
import pytest

from baton.sampling import best_of_kl
from reward.best_of import at_kl, best_of_rewards, best_of_weights, n_at_kl


def test_the_estimator_is_the_mean_over_all_subsets() -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    proxy, gold = generator.normal(size=(3, 6)), generator.normal(size=(3, 6))
    found = best_of_rewards(proxy, gold)
    for prompt in range(3):
        for n in range(1, 7):
            chosen = [
                gold[prompt, max(subset, key=lambda at: proxy[prompt, at])]
                for subset in itertools.combinations(range(6), n)
            ]
            assert found[prompt, n - 1] == pytest.approx(sum(chosen) / len(chosen))


def test_of_equal_scores_any_is_the_best() -> None:
    # two share the best score; their gold rewards are 4 and 8. Of the pairs ab, ac, bc: 4, 8, and 4 or 8 alike
    proxy, gold = np.array([[0.0, 1.0, 1.0]]), np.array([[1.0, 4.0, 8.0]])
    expected = [[13 / 3, (4 + 8 + 6) / 3, 6.0]]
    assert best_of_rewards(proxy, gold).tolist() == [pytest.approx(row) for row in expected]
    swapped = best_of_rewards(proxy[:, ::-1], gold[:, ::-1])
    assert swapped.tolist() == [pytest.approx(row) for row in expected]


def test_weights_of_many_samples_are_shares() -> None:
    weights = best_of_weights(300)
    assert np.allclose(weights.sum(1), 1)
    assert weights[0].tolist() == pytest.approx([1 / 300] * 300)
    assert weights[99, 199] == pytest.approx(math.comb(199, 99) / math.comb(300, 100))
    assert weights[299].tolist() == [0.0] * 299 + [1.0]


def true_kl(probabilities: list[float], n: int) -> float:
    """Of the best of n among outcomes that are listed from the worst to the best, each with a reward of its own."""
    below, total = 0.0, 0.0
    for probability in probabilities:
        best = (below + probability) ** n - below**n
        total += best * math.log(best / probability)
        below += probability
    return total


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_the_bound_is_above_the_true_kl_and_reached_by_many_outcomes(n: int) -> None:
    assert true_kl([0.5, 0.3, 0.2], n) <= best_of_kl(n) + 1e-12
    assert true_kl([1e-5] * 100_000, n) == pytest.approx(best_of_kl(n), abs=1e-3)


def test_the_bound_by_hand() -> None:
    assert best_of_kl(1) == 0
    assert best_of_kl(2) == pytest.approx(0.693147 - 0.5, abs=1e-6)
    assert best_of_kl(8) == pytest.approx(2.079442 - 0.875, abs=1e-6)


def test_the_n_that_spends_as_much() -> None:
    for n in (1.0, 1.5, 2, 8, 1000, 1e9):
        assert n_at_kl(best_of_kl(n)) == pytest.approx(n)
    assert n_at_kl(-0.2) == 1 and n_at_kl(1e4) == math.inf


def test_rewards_between_two_n() -> None:
    curve = np.array([[0.0, 1.0, 3.0], [0.0, 2.0, 2.0]])
    middle = (best_of_kl(2) + best_of_kl(3)) / 2
    assert at_kl(curve, middle).tolist() == pytest.approx([2.0, 2.0])
    assert at_kl(curve, best_of_kl(2)).tolist() == pytest.approx([1.0, 2.0])
    assert at_kl(curve, best_of_kl(3)).tolist() == pytest.approx([3.0, 2.0])
    assert at_kl(curve, 0.0).tolist() == at_kl(curve, -1.0).tolist() == [0.0, 0.0]
