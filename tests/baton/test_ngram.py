"""The n-gram model: it is a distribution, and a tiny example agrees with one worked by hand."""

import math

import pytest

from baton.ngram import train

#: two documents over the ids 0 (end), 1, 2 and 3; id 3 never occurs
DOCUMENTS = [[1, 2, 0], [1, 1, 0]]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("context", [[], [1], [1, 2], [2, 1, 2], [3], [3, 3, 3], [1, 3]])
def test_probabilities_sum_to_one(order: int, context: list[int]) -> None:
    model = train(DOCUMENTS, order=order, vocabulary=4)
    probabilities = [model.probability(context, token) for token in range(4)]
    assert all(p > 0 for p in probabilities)
    assert math.isclose(sum(probabilities), 1.0, rel_tol=1e-12)


def test_sum_with_estimated_discounts() -> None:
    # enough n-grams of counts 1 to 4 that the discounts are estimates, not the fallback
    documents = [[i % 7 + 1, (i * i) % 5 + 1, (i * 3) % 11 + 1, 0] for i in range(60)]
    model = train(documents, order=3, vocabulary=13)
    for context in ([], [1], [1, 2], [5, 5], [12, 1]):
        assert math.isclose(sum(model.probability(context, t) for t in range(13)), 1.0, rel_tol=1e-12)


def test_bigram_by_hand() -> None:
    """Bigrams: (^,1) twice, (1,2) (1,1) (1,0) (2,0) once. Too few for estimates, so every discount is 0.5.

    Continuations: 1 follows ^ and 1 (2), 2 follows 1 (1), 0 follows 1 and 2 (2): 5 in all.
    Unigram: (count - 0.5) / 5, and 3 x 0.5 / 5 = 0.3 shared among 4 ids, 0.075 each.
    P(1) = 0.3 + 0.075 = 0.375; P(2) = 0.1 + 0.075 = 0.175; P(0) = 0.375; P(3) = 0.075.
    """
    model = train(DOCUMENTS, order=2, vocabulary=4)
    # after 3, never seen: the unigram
    assert [model.probability([3], token) for token in (0, 1, 2, 3)] == pytest.approx([0.375, 0.375, 0.175, 0.075])
    # after 1, seen three times with three followers: (1 - 0.5) / 3, and 0.5 of the unigram
    assert model.probability([1], 2) == pytest.approx(0.5 / 3 + 0.5 * 0.175)
    assert model.probability([1], 3) == pytest.approx(0.5 * 0.075)
    # at the beginning, seen twice, always 1: (2 - 0.5) / 2, and 0.25 of the unigram
    assert model.probability([], 1) == pytest.approx(0.75 + 0.25 * 0.375)
    # after 2, seen once: (1 - 0.5) / 1, and 0.5 of the unigram
    assert model.probability([2], 0) == pytest.approx(0.5 + 0.5 * 0.375)


def test_nats_is_the_sum_over_tokens_and_end() -> None:
    model = train(DOCUMENTS, order=2, vocabulary=4)
    by_hand = (0.75 + 0.25 * 0.375) * (0.5 / 3 + 0.5 * 0.175) * (0.5 + 0.5 * 0.375)  # 1, then 2, then the end
    assert model.nats([[1, 2, 0]]) == pytest.approx(-math.log(by_hand))
    assert model.nats([[1, 2, 0], [1, 2, 0]]) == pytest.approx(-2 * math.log(by_hand))


def test_estimated_discounts_by_hand() -> None:
    """A unigram of counts 1, 1, 2, 3, 4: n1 = 2, n2 = n3 = n4 = 1, so Y = 2 / (2 + 2) = 0.5 and the discounts are
    1 - 2 x 0.5 x 1/2 = 0.5 for one, 2 - 3 x 0.5 x 1/1 = 0.5 for two and 3 - 4 x 0.5 x 1/1 = 1 for three and more.
    """
    model = train([[1, 2, 3, 3, 4, 4, 4, 0, 0, 0, 0]], order=1, vocabulary=5)
    shared = (0.5 + 0.5 + 0.5 + 1 + 1) / 11 / 5
    expected = [(4 - 1) / 11, (1 - 0.5) / 11, (1 - 0.5) / 11, (2 - 0.5) / 11, (3 - 1) / 11]
    assert [model.probability([], t) for t in range(5)] == pytest.approx([value + shared for value in expected])


def test_longer_orders_predict_repeated_text_better() -> None:
    text = [[1, 2, 3, 1, 4, 0]] * 20
    short, long = (train(text, order=order, vocabulary=6).nats(text[:1]) for order in (1, 4))
    assert long < short / 2
