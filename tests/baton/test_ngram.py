"""The n-gram model: it is a distribution, and a tiny example agrees with one worked by hand."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton import ngram
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


BEGIN = -1


class Plain:
    """The independent reference: modified Kneser-Ney by dictionaries, one n-gram at a time, straight from the paper."""

    def __init__(self, documents: Sequence[Sequence[int]], order: int, vocabulary: int) -> None:
        self.order, self.vocabulary = order, vocabulary
        grams: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order)]
        for document in documents:
            padded = (*[BEGIN] * (order - 1), *document)
            for end in range(order - 1, len(padded)):
                for length in range(1, order + 1):
                    grams[length - 1][padded[end - length + 1 : end + 1]] += 1
        self.counts = [grams[-1]]
        for length in range(order - 1, 0, -1):
            before = Counter(gram[1:] for gram in grams[length])  # distinct n-grams one longer that end in it
            kept = {gram: count for gram, count in grams[length - 1].items() if length > 1 and gram[0] == BEGIN}
            self.counts.insert(0, Counter(before | Counter(kept)))
            for gram, count in kept.items():
                self.counts[0][gram] = count

    def discount(self, counts: Counter[tuple[int, ...]], count: int) -> float:
        n1, n2, n3, n4 = (sum(c == wanted for c in counts.values()) for wanted in (1, 2, 3, 4))
        if not count or not (n1 and n2 and n3):
            return 0.5 * bool(count)
        y, kind = n1 / (n1 + 2 * n2), min(count, 3)
        value = {1: 1 - 2 * y * n2 / n1, 2: 2 - 3 * y * n3 / n2, 3: 3 - 4 * y * n4 / n3}[kind]
        return value if 0 < value < kind else 0.5

    def probability(self, context: Sequence[int], token: int) -> float:
        padded = (*[BEGIN] * (self.order - 1), *context)
        probability = 1 / self.vocabulary
        for length, counts in enumerate(self.counts):
            seen = padded[len(padded) - length :]
            follow = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == seen}
            if not follow:
                return probability
            total = sum(follow.values())
            count = follow.get(token, 0)
            mass = sum(self.discount(counts, each) for each in follow.values()) / total
            probability = (count - self.discount(counts, count)) / total + mass * probability
        return probability


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_the_probabilities_of_the_dictionaries(data: st.DataObject) -> None:
    vocabulary = data.draw(st.sampled_from([1, 2, 4, 9]))
    order = data.draw(st.integers(1, 5))
    tokens = st.integers(0, vocabulary - 1)
    documents = data.draw(st.lists(st.lists(tokens, max_size=12), max_size=8)) + [[0]]
    asked = data.draw(st.lists(st.lists(tokens, min_size=1, max_size=7), min_size=1, max_size=4)) + documents[:1]
    model, plain = train(documents, order, vocabulary), Plain(documents, order, vocabulary)
    for document in asked:
        expected = [plain.probability(document[:at], token) for at, token in enumerate(document)]
        assert [model.probability(document[:at], t) for at, t in enumerate(document)] == pytest.approx(
            expected, abs=1e-9
        )
    costs = [-sum(math.log(plain.probability(d[:at], t)) for at, t in enumerate(d)) for d in asked]
    assert model.document_nats(asked) == pytest.approx(costs, abs=1e-9)


def test_a_larger_text_with_estimated_discounts() -> None:
    random = np.random.default_rng(0)
    documents = [(random.geometric(0.2, size) % 30).tolist() for size in random.integers(0, 60, 25)]
    model, plain = train(documents, 4, 30), Plain(documents, 4, 30)
    for document in documents[:2]:
        for at in range(0, len(document), 5):
            assert model.probability(document[:at], document[at]) == pytest.approx(
                plain.probability(document[:at], document[at]), abs=1e-9
            )


def test_large_ids_are_told_apart_exactly() -> None:
    """Keys reach far beyond 32 bits and floats: n-grams whose ids differ by one have their own counts."""
    size = 1 << 20
    documents = [[size - 1, size - 2, size - 3, token] for token in (size - 4, size - 5)] + [[1, 2, 3, 4]] * 3
    model, plain = train(documents, 4, size), Plain(documents, 4, size)
    for token in (size - 3, size - 4, size - 5, size - 6, 4):
        context = [size - 1, size - 2, size - 3]
        assert model.probability(context, token) == pytest.approx(plain.probability(context, token), rel=1e-9)


def test_document_nats_do_not_depend_on_how_many_are_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = train(DOCUMENTS, order=3, vocabulary=4)
    documents = [[1, 2, 0], [], [3], [1, 1, 1, 1, 0]]
    together = model.document_nats(documents)
    assert together[1] == 0
    monkeypatch.setattr(ngram, "TOKENS_AT_ONCE", 2)
    assert model.document_nats(iter(documents)) == pytest.approx(together, rel=1e-12)
    assert together == pytest.approx([model.nats([document]) for document in documents])


def test_no_more_tokens_are_counted_than_asked_for() -> None:
    """Nor read: the third document would be an error."""

    def documents() -> Iterator[list[int]]:
        yield [1, 2, 0]
        yield [1, 1, 0]
        raise AssertionError

    model = train(documents(), order=2, vocabulary=4, max_tokens=5)
    cut = train([[1, 2, 0], [1, 1]], order=2, vocabulary=4)
    assert (model.num_tokens, cut.num_tokens) == (5, 5)
    assert [model.probability([1], t) for t in range(4)] == [cut.probability([1], t) for t in range(4)]


def test_the_tables_are_small() -> None:
    """At most 28 bytes a distinct n-gram, and a context's two numbers for each length."""
    ids = np.random.default_rng(1).integers(0, 1000, 20_000)
    grams = sum(
        len({tuple(ids[max(at - n + 1, 0) : at + 1]) + (at < n,) for at in range(len(ids))}) for n in range(1, 6)
    )
    assert train([ids], 5, 1000).num_bytes <= 28 * grams + 5 * 2 * 16
