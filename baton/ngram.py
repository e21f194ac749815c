"""An n-gram language model with interpolated modified Kneser-Ney smoothing: what a neural model has to beat.

It predicts the tokens that the neural model predicts: a document is a sequence of token ids that ends with its end
token, and is read from a context of beginning marks, which are conditioned on and never predicted.

Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), section 3.

The n-grams of a length are numbered in the order of their keys: the number of the n-gram without its last token, and
that token, as one 64-bit integer. So a key is exact, an n-gram of any length is one number, and all that is done to one
n-gram is done to all at once. What is kept is the sorted keys and counts, and two numbers a context.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Document: TypeAlias = Sequence[int] | np.ndarray

TOKENS_AT_ONCE = 1 << 20
"""Tokens of documents whose nats are computed together: bounds the memory of measuring."""

UNSEEN = -1


@dataclass(frozen=True)
class _Level:
    """The n-grams of one length, and what interpolation needs of their contexts.

    A context is an n-gram one shorter, or, last, the beginning marks alone; (C,) stands for their number.
    """

    keys: np.ndarray  # (N,) int64, ascending: context * width + token
    counts: np.ndarray  # (N,) int32: occurrences; below the longest, how many different ids come before
    totals: np.ndarray  # (C,) float64: the counts of a context's n-grams; 0 where it was never followed
    backoffs: np.ndarray  # (C,) float64: the probability mass that the lower order shares out
    discounts: np.ndarray  # (4,) for counts of 0, 1, 2, and 3 and more

    @property
    def beginning(self) -> int:
        """The number of the n-gram that is beginning marks alone."""
        return len(self.keys)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The numbers of n-grams by their keys, UNSEEN where there is none."""
        at = np.searchsorted(self.keys, keys)
        at[at == len(self.keys)] = 0
        return np.where(self.keys[at] == keys, at, UNSEEN)

    def interpolate(self, contexts: np.ndarray, grams: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """P of the n-grams from the lower order's; a context that was never followed leaves it as it is."""
        seen = (contexts != UNSEEN) & (self.totals[contexts] > 0)
        counts = np.where(grams == UNSEEN, 0, self.counts[grams])
        totals = np.where(seen, self.totals[contexts], 1.0)
        discounted = (counts - self.discounts[np.minimum(counts, 3)]) / totals
        return np.where(seen, discounted + self.backoffs[contexts] * lower, lower)


class NGram:
    """A trained model; `train` makes one."""

    def __init__(self, levels: Sequence[_Level], vocabulary: int, num_tokens: int) -> None:
        self._levels = levels
        self._vocabulary = vocabulary
        self.num_tokens = num_tokens  # that were counted

    @property
    def order(self) -> int:
        """The length of the longest n-gram counted."""
        return len(self._levels)

    @property
    def num_bytes(self) -> int:
        """The memory of the tables."""
        return sum(
            array.nbytes for level in self._levels for array in (level.keys, level.counts, level.totals, level.backoffs)
        )

    def probability(self, context: Sequence[int], token: int) -> float:
        """P(token | context). `context` is the document so far, without beginning marks; its end is what matters."""
        ids = np.asarray([*context, token], dtype=np.int64)
        return float(self._probabilities(ids, np.asarray([len(ids)]))[-1])

    def nats(self, sequences: Iterable[Document]) -> float:
        """The total negative log-likelihood in nats of documents, each given with its end token."""
        return float(self.document_nats(sequences).sum())

    def document_nats(self, sequences: Iterable[Document]) -> np.ndarray:
        """(documents,) float64: the negative log-likelihood in nats of each document, given with its end token."""
        found: list[np.ndarray] = [np.zeros(0)]
        for ids, lengths in _groups(sequences):
            costs = -np.log(self._probabilities(ids, lengths))
            owners = np.repeat(np.arange(len(lengths)), lengths)
            found.append(np.bincount(owners, weights=costs, minlength=len(lengths)))
        return np.concatenate(found)

    def _probabilities(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(T,) of documents' tokens one after the other, `lengths` of them each."""
        assert not len(ids) or 0 <= ids.min() <= ids.max() < self._vocabulary
        is_first = _is_first(lengths)
        probabilities = np.full(len(ids), 1.0 / self._vocabulary)
        contexts = np.zeros(len(ids), dtype=np.int64)
        for level in self._levels:
            grams = level.find(contexts * self._vocabulary + ids)
            grams[contexts == UNSEEN] = UNSEEN
            probabilities = level.interpolate(contexts, grams, probabilities)
            contexts = _shifted(grams, is_first, level.beginning)
        return probabilities


def train(sequences: Iterable[Document], order: int, vocabulary: int, max_tokens: int | None = None) -> NGram:
    """Count n-grams up to `order` and smooth them.

    Args:
        sequences: documents as token ids in [0, vocabulary), each with its end token.
        order: the longest n-gram, at least 1.
        vocabulary: how many token ids there are; a token never seen gets its share of the uniform distribution.
        max_tokens: only so many tokens are counted, the rest is not read; `NGram.num_tokens` says how many were.

    While it counts it takes some 110 bytes a token, of which it keeps at most 28 a distinct n-gram.
    """
    assert order >= 1 and vocabulary >= 1
    ids, lengths = _joined(sequences, max_tokens)
    assert len(ids), "no text to count"
    assert 0 <= ids.min() <= ids.max() < vocabulary
    is_first = _is_first(lengths)
    places = _places(lengths)
    grams = np.zeros(len(ids), dtype=np.int32)  # of each token: the number of the n-gram that ends there
    contexts = np.zeros(len(ids), dtype=np.int32)  # and of what comes before it
    num_contexts = 1
    tables: list[tuple[np.ndarray, np.ndarray, int]] = []  # keys, occurrences, contexts
    levels: list[_Level] = []
    for length in range(1, order + 1):
        shorter = grams
        keys, grams, occurrences = _number(contexts.astype(np.int64) * vocabulary + ids)
        if length > 1:
            levels.append(_smooth(*_continued(tables[-1], shorter, grams, len(keys), places >= length - 2), vocabulary))
        tables.append((keys, occurrences, num_contexts))
        contexts, num_contexts = _shifted(grams, is_first, len(keys)), len(keys) + 1
    levels.append(_smooth(*tables[-1], vocabulary))
    return NGram(levels, vocabulary, len(ids))


def _continued(
    table: tuple[np.ndarray, np.ndarray, int],
    shorter: np.ndarray,
    longer: np.ndarray,
    num_longer: int,
    is_whole: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, int]:
    """`table` of the n-grams `shorter` with, for counts, how many different ids precede each.

    Every position has its n-gram, and the one longer that ends there too. An n-gram that begins with the beginning mark
    keeps its count: nothing but that mark can precede it. `is_whole` says where the shorter one has no mark.
    """
    keys, occurrences, num_contexts = table
    endings = np.full(num_longer, len(keys), dtype=np.int32)  # of each longer n-gram: the shorter one it ends in
    endings[longer[is_whole]] = shorter[is_whole]
    counts = np.bincount(endings, minlength=len(keys) + 1)[: len(keys)].astype(np.int32)
    begun = shorter[~is_whole]
    counts[begun] = occurrences[begun]
    return keys, counts, num_contexts


def _smooth(keys: np.ndarray, counts: np.ndarray, num_contexts: int, width: int) -> _Level:
    """Discount one order's counts by 1, 2 or 3 and more (Chen and Goodman's equation 26)."""
    discounts = np.asarray(_discounts(np.bincount(np.minimum(counts, 5), minlength=6)))
    contexts = keys // width
    totals = np.bincount(contexts, weights=counts, minlength=num_contexts)
    taken = np.bincount(contexts, weights=discounts[np.minimum(counts, 3)], minlength=num_contexts)
    backoffs = np.divide(taken, totals, out=np.zeros_like(totals), where=totals > 0)
    return _Level(keys, counts, totals, backoffs, discounts)


def _discounts(occur: np.ndarray) -> tuple[float, float, float, float]:
    """The discounts for counts of 0, 1, 2, and 3 or more, from how many n-grams occur 1, 2, 3 and 4 times.

    Too small a text leaves the estimates undefined or outside [0, count]: there the discount is 0.5 for every count.
    """
    ones, twos, threes, fours = (int(number) for number in occur[1:5])
    if not (ones and twos and threes):
        return 0.0, 0.5, 0.5, 0.5
    ratio = ones / (ones + 2 * twos)
    estimates = (1 - 2 * ratio * twos / ones, 2 - 3 * ratio * threes / twos, 3 - 4 * ratio * fours / threes)
    one, two, more = (value if 0 < value < count else 0.5 for count, value in enumerate(estimates, start=1))
    return 0.0, one, two, more


def _number(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(distinct keys, ascending; of each of `keys` its number among them, int32; how often each occurs, int32)."""
    order = np.argsort(keys)
    ordered = keys[order]
    is_new = np.ones(len(keys), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=is_new[1:])
    starts = np.flatnonzero(is_new)
    numbers = np.empty(len(keys), dtype=np.int32)
    numbers[order] = np.cumsum(is_new, dtype=np.int32) - 1
    return ordered[starts], numbers, np.diff(starts, append=len(keys)).astype(np.int32)


def _shifted(grams: np.ndarray, is_first: np.ndarray, beginning: int) -> np.ndarray:
    """Of each token the number of what comes before it: the n-gram that ends at the token before, or the marks."""
    contexts = np.empty_like(grams)
    contexts[1:] = grams[:-1]
    contexts[is_first] = beginning
    return contexts


def _is_first(lengths: np.ndarray) -> np.ndarray:
    """(T,): which tokens are their documents' first."""
    is_first = np.zeros(int(lengths.sum()), dtype=bool)
    is_first[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    return is_first


def _places(lengths: np.ndarray) -> np.ndarray:
    """(T,) int32: of each token, how many of its document come before it."""
    starts = np.cumsum(lengths) - lengths
    return (np.arange(int(lengths.sum())) - np.repeat(starts, lengths)).astype(np.int32)


def _joined(sequences: Iterable[Document], max_tokens: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(ids of all documents one after the other, int32; the documents' lengths); the last may be cut off."""
    parts, lengths, left = [np.zeros(0, np.int32)], [], max_tokens
    for sequence in sequences:
        part = np.asarray(sequence, dtype=np.int32)[:left]
        parts.append(part)
        lengths.append(len(part))
        if left is not None:
            left -= len(part)
            if not left:
                break
    return np.concatenate(parts), np.asarray(lengths, dtype=np.int64)


def _groups(sequences: Iterable[Document]) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """(ids, lengths) of whole documents, some TOKENS_AT_ONCE tokens of them at a time."""
    parts: list[np.ndarray] = []
    held = 0
    for sequence in sequences:
        parts.append(np.asarray(sequence, dtype=np.int64))
        held += len(parts[-1])
        if held >= TOKENS_AT_ONCE:
            yield np.concatenate(parts), np.asarray([len(part) for part in parts])
            parts, held = [], 0
    if parts:
        yield np.concatenate(parts), np.asarray([len(part) for part in parts])
