"""Which source and which of its rows each sample is: a function of the seed and the sample's number alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from baton.corpus.order import SeededOrder
from baton.errors import UserError

_PRECISION = 1 << 48
"""Rates are kept as whole numbers of this unit, so that counting rows is exact."""


class MixedSource(NamedTuple):
    """A source as the mixture sees it."""

    name: str
    num_rows: int
    num_tokens: int  # in those rows, padding left out
    weight: float = 1.0
    share: float | None = None
    max_epochs: float | None = None

    @property
    def most_rows(self) -> int | None:
        """Rows that may be taken at all; None: any number."""
        return None if self.max_epochs is None else max(1, int(self.max_epochs * self.num_rows + 0.5))


class Sample(NamedTuple):
    """Where a sample comes from."""

    source: int
    epoch: int
    row: int


class _Phase(NamedTuple):
    """A stretch of samples drawn from the same sources; a source whose epochs are used up ends it."""

    start: int  # the first sample
    taken: list[int]  # of each source, rows before `start`
    tree: _Tree
    sources: list[int]  # of each leaf


class Mixture:
    """An endless sequence of samples that holds the sources' shares throughout, each source in its own seeded order.

    A source's share of the tokens is `share`, or, where no source has one, its own tokens times `weight`. After any
    number of samples every source has had its share of them to within about one row (never two), so that a batch is
    as mixed as the whole. Every row comes once an epoch. A source that has been read `max_epochs` times makes place for
    the others, in proportion. Memory grows with the number of sources alone.
    """

    def __init__(self, sources: Sequence[MixedSource], seed: int) -> None:
        _check(sources)
        self.sources, self.seed = list(sources), seed
        self.num_samples: int | None = None
        """How many samples there are under the caps; None: any number."""
        self._phases = self._plan()
        self._starts = [phase.start for phase in self._phases]
        self._orders: dict[tuple[int, int], SeededOrder] = {}

    def sample(self, number: int) -> Sample:
        """Sample `number` (from 0)."""
        assert number >= 0 and (self.num_samples is None or number < self.num_samples), (number, self.num_samples)
        phase = self._phases[self.phase(number)]
        leaf, before = phase.tree.draw(number - phase.start)
        source = phase.sources[leaf]
        epoch, place = divmod(phase.taken[source] + before, self.sources[source].num_rows)
        return Sample(source, epoch, self._order(source, epoch)[place])

    def phase(self, number: int) -> int:
        """In which phase (from 0) sample `number` is: where a source's epochs are used up, another one begins."""
        return bisect_right(self._starts, number) - 1

    def counts(self, num_samples: int) -> list[int]:
        """How many of the first samples each source gives."""
        phase = self._phases[self.phase(num_samples)]
        counts = list(phase.taken)
        for source, count in zip(phase.sources, phase.tree.counts(num_samples - phase.start), strict=True):
            counts[source] += count
        return counts

    def epochs(self, num_samples: int) -> list[float]:
        """How often the first samples go through each source."""
        return [count / source.num_rows for count, source in zip(self.counts(num_samples), self.sources, strict=True)]

    def check(self, batches: int, rows_per_batch: int, sequence_length: int) -> None:
        """Raises UserError where the data, with every source's epochs capped, does not suffice for so many batches."""
        needed = batches * rows_per_batch
        if self.num_samples is None or self.num_samples >= needed:
            return
        sources = "; ".join(
            f"{source.name}: {source.num_rows * sequence_length:,} tokens × {source.max_epochs:g} epochs"
            for source in self.sources
        )
        raise UserError(
            f"training needs {needed * sequence_length:,} tokens ({batches:,} batches of {rows_per_batch:,} rows of "
            f"{sequence_length:,}); there are {self.num_samples * sequence_length:,} under max_epochs ({sources}). "
            f"Set train.steps to {self.num_samples // rows_per_batch:,} at most, raise max_epochs or add text"
        )

    def _order(self, source: int, epoch: int) -> SeededOrder:
        order = self._orders.get((source, epoch))
        if order is None:
            if len(self._orders) >= 4 * len(self.sources):
                self._orders.clear()
            order = SeededOrder(self.sources[source].num_rows, (self.seed, source, epoch))
            self._orders[source, epoch] = order
        return order

    def _plan(self) -> list[_Phase]:
        """The phases, the last of which has no end unless every source is capped."""
        rates = _rates(self.sources)
        left = [source.most_rows for source in self.sources]
        phases: list[_Phase] = []
        start, taken = 0, [0] * len(rates)
        while True:
            active = [index for index, most in enumerate(left) if most is None or taken[index] < most]
            if not active:
                self.num_samples = start
                return phases
            tree = _Tree([rates[index] for index in active])
            phases.append(_Phase(start, list(taken), tree, active))
            capped = [(leaf, most - taken[index]) for leaf, index in enumerate(active) if (most := left[index])]
            if not capped:
                return phases
            length = min(tree.first_number(leaf, count) for leaf, count in capped)
            for index, count in zip(active, tree.counts(length), strict=True):
                taken[index] += count
            start += length


class _Tree:
    """The order in which sources of given rates take turns: a Huffman tree of choices between two.

    At every node the n samples that reach it are split by rounding n times the first child's part, which is within one
    half of exact, grows with n, and needs nothing but n. Down the tree the errors shrink with the children's parts, of
    which two below each other make one half at most (Huffman 1952): fewer than two rows in all.
    """

    def __init__(self, rates: Sequence[int]) -> None:
        self.num_leaves = len(rates)
        heap: list[tuple[int, int]] = [(rate, leaf) for leaf, rate in enumerate(rates)]
        heapify(heap)
        self._nodes: list[tuple[int, int, int, int]] = []  # rates of both, first child, second child
        while len(heap) > 1:
            second, first = heappop(heap), heappop(heap)
            self._nodes.append((first[0], first[0] + second[0], first[1], second[1]))
            heappush(heap, (first[0] + second[0], self.num_leaves + len(self._nodes) - 1))
        self._root = heap[0][1]

    def draw(self, number: int) -> tuple[int, int]:
        """(leaf, how many samples it gave before) of sample `number`."""
        at = self._root
        while at >= self.num_leaves:
            part, whole, first, second = self._nodes[at - self.num_leaves]
            before = (2 * number * part + whole) // (2 * whole)
            if (2 * (number + 1) * part + whole) // (2 * whole) > before:
                at, number = first, before
            else:
                at, number = second, number - before
        return at, number

    def counts(self, num_samples: int) -> list[int]:
        """Of the first samples, how many each leaf gives."""
        counts = [0] * self.num_leaves
        pending = [(self._root, num_samples)]
        while pending:
            at, number = pending.pop()
            if at < self.num_leaves:
                counts[at] = number
                continue
            part, whole, first, second = self._nodes[at - self.num_leaves]
            before = (2 * number * part + whole) // (2 * whole)
            pending += [(first, before), (second, number - before)]
        return counts

    def first_number(self, leaf: int, count: int) -> int:
        """The least number of samples of which `leaf` gives `count`."""
        low, high = 0, count
        while self.counts(high)[leaf] < count:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.counts(middle)[leaf] >= count else (middle, high)
        return high


def _check(sources: Sequence[MixedSource]) -> None:
    """Raises UserError where the sources cannot be mixed as asked."""
    assert sources, "a mixture of nothing"
    for source in sources:
        if not source.num_rows:
            raise UserError(f"{source.name} has no text to train on; take it out of data.train")
    # baton.corpus_sections has told the user: of all sources or of none, and in sum 1 but for rounding
    assert len({source.share is None for source in sources}) == 1, "some sources have a share, others have none"


def _rates(sources: Sequence[MixedSource]) -> list[int]:
    """Of each source, how many of so many rows are its own: its part of the tokens over the tokens in one of its rows.

    Rows that padding leaves emptier than others' come more often.
    """
    parts = [
        source.weight * source.num_rows if source.share is None else source.share * source.num_rows / source.num_tokens
        for source in sources
    ]
    return [max(1, round(part / sum(parts) * _PRECISION)) for part in parts]
