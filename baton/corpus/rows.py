"""Training rows out of prepared shards: sample number -> input ids, labels and positions of one row."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

import numpy as np

from baton.corpus.mixture import MixedSource, Mixture, Sample
from baton.corpus.shards import Recent
from baton.packing import IGNORED, best_fit
from baton.schedule import batch_number

if TYPE_CHECKING:
    from baton.corpus.shards import Corpus, PreparedSource
    from baton.corpus_sections import CorpusData
    from baton.train_sections import TokenTrain

Packing = Literal["best_fit", "stream"]

_LENGTH_BITS = 24
"""A piece is one number: its start in the shard above these bits, its length within them."""
_INDEX_FORMAT = 1
"""Part of the name of an index: another way to pack gets another number."""


class Row(TypedDict):
    """One row for a trainer, each (L,) int64; see `baton.packing.pack` for what they hold."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray


class Piece(NamedTuple):
    """A run of one document's tokens in a row; its first token is context, the others are predicted."""

    document: int  # its number in the source
    start: int  # where the piece begins in the source's stream
    length: int


class RowIndex:
    """Which pieces of a shard make up each row: one array of int64, as it lies beside the shard.

    [rows, tokens, first piece of row 0, …, of row n, pieces …]; a piece is its start << 24 | its length.
    """

    def __init__(self, numbers: np.ndarray) -> None:
        self._numbers = numbers
        self.num_rows, self.num_tokens = int(numbers[0]), int(numbers[1])
        self._pieces = numbers[3 + self.num_rows :]

    @classmethod
    def of(cls, ends: np.ndarray, length: int) -> RowIndex:
        """Pack the documents that end at `ends` into rows of `length` tokens, best fit.

        A document longer than a row is cut, each further piece beginning with the last token of the one before: every
        token but a document's first is predicted exactly once.
        """
        assert 1 < length < 1 << _LENGTH_BITS, length
        ends = np.asarray(ends)
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        in_document = np.maximum(1, -((ends - starts - 1) // -(length - 1)))
        document = np.repeat(np.arange(len(ends)), in_document)
        number = np.arange(len(document)) - np.repeat(np.cumsum(in_document) - in_document, in_document)
        piece_starts = starts[document] + number * (length - 1)
        lengths = np.minimum(ends[document] - piece_starts, length)
        rows = best_fit(lengths, length)
        order = np.argsort(rows, kind="stable")
        num_rows = int(rows.max()) + 1 if len(rows) else 0
        firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(rows, minlength=num_rows))])
        pieces = (piece_starts << _LENGTH_BITS | lengths)[order]
        return cls(np.concatenate([np.array([num_rows, lengths.sum()], np.int64), firsts, pieces]))

    @classmethod
    def beside(cls, file: Path, ends: np.ndarray, length: int) -> RowIndex:
        """The index in `file`, memory-mapped; made and saved first where there is none.

        Processes that want it at once each make the same and rename theirs into place. Where the folder cannot be
        written to, the index stays in memory.
        """
        try:
            return cls(np.load(file, mmap_mode="r"))
        except FileNotFoundError:
            pass
        index = cls.of(ends, length)
        aside = file.with_name(f"{file.name}.{os.uname().nodename}-{os.getpid()}.new")
        try:
            with aside.open("wb") as stream:
                np.save(stream, index._numbers)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, file)
        except OSError:
            aside.unlink(missing_ok=True)
            return index
        return cls(np.load(file, mmap_mode="r"))

    def spans(self, row: int) -> list[tuple[int, int]]:
        """(start, stop) in the shard of each piece of `row`."""
        first, last = self._numbers[2 + row : 4 + row].tolist()
        pieces = self._pieces[first:last].tolist()
        return [(piece >> _LENGTH_BITS, (piece >> _LENGTH_BITS) + (piece & _MOST)) for piece in pieces]


_MOST = (1 << _LENGTH_BITS) - 1


class SourceRows:
    """The rows of `length` tokens of one prepared source, by number.

    `best_fit` keeps documents whole where a row can hold them; `stream` cuts the stream of documents every `length`
    tokens, needs no index, and loses from the loss the first token of every row.
    """

    def __init__(self, source: PreparedSource, length: int, pad_id: int, packing: Packing = "best_fit") -> None:
        self.source, self.length, self.pad_id, self.packing = source, length, pad_id, packing
        self._indices = Recent()
        if packing == "best_fit":
            found = [(index.num_rows, index.num_tokens) for index in map(self._index, range(len(source.shards)))]
            counts = [num_rows for num_rows, _ in found]
            self.num_tokens = sum(num_tokens for _, num_tokens in found)
        else:
            counts = [-(-source.num_tokens // length)]
            self.num_tokens = source.num_tokens
        self._row_starts = [0, *accumulate(counts)]
        self._places = np.arange(length)

    def __len__(self) -> int:
        return self._row_starts[-1]

    @property
    def padding_share(self) -> float:
        """The share of the rows' positions that hold no token."""
        return 1 - self.num_tokens / (len(self) * self.length) if len(self) else 0.0

    def __getitem__(self, row: int) -> Row:
        ids = np.full(self.length, self.pad_id, np.int64)
        labels = np.full(self.length, IGNORED, np.int64)
        positions = np.empty(self.length, np.int64)
        at = 0
        for start, stop in self._spans(row):
            end = at + stop - start
            ids[at:end] = self.source.tokens(start, stop)
            labels[at + 1 : end] = ids[at + 1 : end]
            positions[at:end] = self._places[: end - at]
            at = end
        positions[at:] = self._places[: self.length - at]
        return {"input_ids": ids, "labels": labels, "position_ids": positions}

    def pieces(self, row: int) -> list[Piece]:
        """The pieces of documents in `row`, in its order; what follows them is padding."""
        spans = self._spans(row)
        return [Piece(self._document(start), start, stop - start) for start, stop in spans]

    def _spans(self, row: int) -> list[tuple[int, int]]:
        """(start, stop) in the source's stream of each piece of `row`."""
        if not 0 <= row < len(self):
            raise IndexError(row)
        if self.packing == "stream":
            start, stop = row * self.length, min((row + 1) * self.length, self.source.num_tokens)
            borders = self.source.documents_between(start, stop).tolist()
            if not borders or borders[-1] < stop:
                borders.append(stop)
            return list(zip([start, *borders[:-1]], borders, strict=True))
        shard = bisect_right(self._row_starts, row) - 1
        before = self.source.token_starts[shard]
        spans = self._index(shard).spans(row - self._row_starts[shard])
        return [(before + start, before + stop) for start, stop in spans]

    def _index(self, shard: int) -> RowIndex:
        # by the digest of the documents' ends: a shard that was prepared anew must not get the old one's rows
        digest = self.source.shards[shard]["sha256"]["ends.npy"][:12]
        file = self.source.shard_file(shard, f"rows-{self.length}-{_INDEX_FORMAT}-{digest}.npy")
        found: RowIndex = self._indices.get(
            shard, lambda: RowIndex.beside(file, self.source.shard_ends(shard), self.length)
        )
        return found

    def _document(self, start: int) -> int:
        """The number of the document that holds token `start` of the stream."""
        shard = bisect_right(self.source.token_starts, start) - 1
        within = start - self.source.token_starts[shard]
        at = np.searchsorted(self.source.shard_ends(shard), within, side="right")
        return self.source.document_starts[shard] + int(at)


class TrainingRows:
    """The rows of a whole training in order, as a map-style dataset: one mixture, whoever reads which of them.

    Item `number` is the sample `number` of the mixture, but that the batches in `skipped` are passed over, and read
    last where `max_epochs` leaves no others; it holds numpy arrays. Reading costs a few copies of the row's tokens, and
    nothing is held in memory.
    """

    def __init__(
        self,
        sources: Sequence[SourceRows],
        mixture: Mixture,
        rows_per_batch: int,
        steps: int,
        skipped: Sequence[int] = (),
    ) -> None:
        assert len(sources) == len(mixture.sources)
        self.sources, self.mixture, self.rows_per_batch, self.steps = list(sources), mixture, rows_per_batch, steps
        self.skipped = sorted(set(skipped))
        mixture.check(steps, rows_per_batch, sources[0].length)

    def __len__(self) -> int:
        return self.steps * self.rows_per_batch

    def __getitem__(self, number: int) -> Row:
        sample = self.sample(number)
        return self.sources[sample.source][sample.row]

    def sample(self, number: int) -> Sample:
        """Source, epoch and row of item `number`."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        step, position = divmod(number, self.rows_per_batch)
        return self.mixture.sample(self._batch(step) * self.rows_per_batch + position)

    def changes_at(self, step: int) -> bool:
        """Whether step `step` (from 0) begins to read other sources than the one before, so that its loss may jump."""
        if step == 0:
            return False
        last = [(self._batch(each) + 1) * self.rows_per_batch - 1 for each in (step - 1, step)]
        return self.mixture.phase(last[0]) != self.mixture.phase(last[1])

    def _batch(self, step: int) -> int:
        """Which of the mixture's batches a step reads."""
        batch = batch_number(step, self.skipped)
        if self.mixture.num_samples is None:
            return batch
        there_are = self.mixture.num_samples // self.rows_per_batch
        if batch < there_are:
            return batch
        # the text is used up: what was passed over did no harm by itself, but to the weights of then
        passed_over = [each for each in self.skipped if each < there_are]
        return passed_over[(batch - there_are) % len(passed_over)]

    def sample_id(self, number: int) -> str:
        """What item `number` is, for people to look at: where its text lies."""
        sample = self.sample(number)
        rows = self.sources[sample.source]
        documents = [str(piece.document) for piece in rows.pieces(sample.row)]
        return f"{rows.source.name}, epoch {sample.epoch}, row {sample.row}: documents {', '.join(documents)}"

    def pieces(self, number: int) -> list[Piece]:
        """The pieces of documents in item `number`."""
        sample = self.sample(number)
        return self.sources[sample.source].pieces(sample.row)

    def report(self) -> str:
        """A line a source: its part of the training, how often it is read, its padding."""
        counts = self.mixture.counts(len(self))
        tokens = [count * rows.num_tokens / len(rows) for count, rows in zip(counts, self.sources, strict=True)]
        lines = []
        for count, own, rows in zip(counts, tokens, self.sources, strict=True):
            lines.append(
                f"{rows.source.name}: {own / sum(tokens):.1%} of the training's tokens, {count / len(rows):.2f} epochs "
                f"of {len(rows):,} rows, {rows.padding_share:.1%} padding"
            )
        padding = 1 - sum(tokens) / (sum(counts) * self.sources[0].length)
        lines.append(f"{len(self):,} rows of {self.sources[0].length:,} in all, {padding:.2%} padding")
        return "\n".join(lines)


def training_rows(
    corpus: Corpus, data: CorpusData, train: TokenTrain, pad_id: int, skipped: Sequence[int] = ()
) -> TrainingRows:
    """The rows of a training by its recipe, without the batches `skipped`; indices that are missing are made.

    Raises UserError where a source is empty, or the text does not suffice for `train.steps` under `max_epochs`.
    """
    assert len(corpus.train) == len(data.train), (len(corpus.train), len(data.train))
    sources = [SourceRows(source, train.sequence_length, pad_id, data.packing) for source in corpus.train]
    mixed = [
        MixedSource(rows.source.name, len(rows), rows.num_tokens, wanted.weight, wanted.share, wanted.max_epochs)
        for rows, wanted in zip(sources, data.train, strict=True)
    ]
    return TrainingRows(sources, Mixture(mixed, train.seed), train.rows_per_batch, train.steps, skipped)
