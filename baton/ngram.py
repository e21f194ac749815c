"""An n-gram language model with interpolated modified Kneser-Ney smoothing: what a neural model has to beat.

It predicts the tokens that the neural model predicts: a document is a sequence of token ids that ends with its end
token, and is read from a context of beginning marks, which are conditioned on and never predicted.

Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), section 3.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: a context longer than what has been seen: this id marks the beginning, before every document
BEGIN = -1

Context = tuple[int, ...]


@dataclass(frozen=True)
class _Level:
    """The counts of one order, turned into what interpolation needs; a context is the tuple of preceding ids.

    discounted: for a context, each seen token's discounted relative frequency
    backoff: for a context, the probability mass that the lower order shares out
    """

    discounted: dict[Context, dict[int, float]]
    backoff: dict[Context, float]


class NGram:
    """A trained model; `train` makes one."""

    def __init__(self, levels: Sequence[_Level], vocabulary: int) -> None:
        self._levels = levels
        self._vocabulary = vocabulary

    @property
    def order(self) -> int:
        """The length of the longest n-gram counted."""
        return len(self._levels)

    def probability(self, context: Sequence[int], token: int) -> float:
        """P(token | context). `context` is the document so far, without beginning marks; its end is what matters."""
        padded = (BEGIN,) * (self.order - 1) + tuple(context)
        return self._probability(padded[len(padded) - self.order + 1 :], token)

    def nats(self, sequences: Iterable[Sequence[int]]) -> float:
        """The total negative log-likelihood in nats of documents, each given with its end token."""
        width = self.order - 1
        total = 0.0
        for sequence in sequences:
            padded = (BEGIN,) * width + tuple(sequence)
            for end in range(width, len(padded)):
                total -= math.log(self._probability(padded[end - width : end], padded[end]))
        return total

    def _probability(self, context: Context, token: int) -> float:
        probability = 1.0 / self._vocabulary
        for length, level in enumerate(self._levels):
            suffix = context[len(context) - length :]
            seen = level.discounted.get(suffix)
            if seen is None:  # then no longer context was seen either
                return probability
            probability = seen.get(token, 0.0) + level.backoff[suffix] * probability
        return probability


def train(sequences: Iterable[Sequence[int]], order: int, vocabulary: int) -> NGram:
    """Count n-grams up to `order` and smooth them.

    Args:
        sequences: documents as token ids in [0, vocabulary), each with its end token.
        order: the longest n-gram, at least 1.
        vocabulary: how many token ids there are; a token never seen gets its share of the uniform distribution.
    """
    assert order >= 1 and vocabulary >= 1
    counts = _count(sequences, order)
    for length in range(order - 1, 0, -1):
        counts[length - 1] = _continuations(counts[length], counts[length - 1])
    return NGram([_smooth(level) for level in counts], vocabulary)


def _count(sequences: Iterable[Sequence[int]], order: int) -> list[dict[Context, Counter[int]]]:
    """For each order from 1, how often each token followed each context."""
    grams: list[Counter[Context]] = [Counter() for _ in range(order)]
    for sequence in sequences:
        padded = (BEGIN,) * (order - 1) + tuple(sequence)
        for length, counter in enumerate(grams):
            start = order - 1 - length
            counter.update(zip(*(padded[start + shift :] for shift in range(length + 1)), strict=False))
    return [_by_context(counter) for counter in grams]


def _by_context(grams: Counter[Context]) -> dict[Context, Counter[int]]:
    table: dict[Context, Counter[int]] = defaultdict(Counter)
    for gram, count in grams.items():
        table[gram[:-1]][gram[-1]] = count
    return dict(table)


def _continuations(
    longer: dict[Context, Counter[int]], counted: dict[Context, Counter[int]]
) -> dict[Context, Counter[int]]:
    """How many different ids precede each shorter n-gram.

    An n-gram that begins with the beginning mark keeps its count: nothing but that mark can precede it.
    """
    table: dict[Context, Counter[int]] = defaultdict(Counter)
    for context, tokens in longer.items():
        shorter = context[1:]
        if not (shorter and shorter[0] == BEGIN):
            table[shorter].update(dict.fromkeys(tokens, 1))
    for context, tokens in counted.items():
        if context and context[0] == BEGIN:
            table[context] = tokens
    return dict(table)


def _smooth(counts: dict[Context, Counter[int]]) -> _Level:
    """Discount one order's counts by 1, 2 or 3 and more (Chen and Goodman's equation 26)."""
    discounts = _discounts(counts)
    discounted: dict[Context, dict[int, float]] = {}
    backoff: dict[Context, float] = {}
    for context, tokens in counts.items():
        total = sum(tokens.values())
        discounted[context] = {token: (count - discounts[min(count, 3)]) / total for token, count in tokens.items()}
        backoff[context] = sum(discounts[min(count, 3)] for count in tokens.values()) / total
    return _Level(discounted, backoff)


def _discounts(counts: dict[Context, Counter[int]]) -> tuple[float, float, float, float]:
    """The discounts for counts of 0, 1, 2, and 3 or more, from how many n-grams occur 1, 2, 3 and 4 times.

    Too small a text leaves the estimates undefined or outside [0, count]: there the discount is 0.5 for every count.
    """
    occur = Counter(count for tokens in counts.values() for count in tokens.values() if count <= 4)
    ones, twos, threes, fours = (occur[count] for count in (1, 2, 3, 4))
    if not (ones and twos and threes):
        return 0.0, 0.5, 0.5, 0.5
    ratio = ones / (ones + 2 * twos)
    estimates = (1 - 2 * ratio * twos / ones, 2 - 3 * ratio * threes / twos, 3 - 4 * ratio * fours / threes)
    one, two, more = (value if 0 < value < count else 0.5 for count, value in enumerate(estimates, start=1))
    return 0.0, one, two, more
