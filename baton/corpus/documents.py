"""Documents of a source, streamed one after the other, and those that were there before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from baton.data import examples
from baton.recipe_base import Source

LONGEST = 1 << 22
"""A text of more characters is cut, between lines where it has some, into documents of about this length: encoding one
takes some 100 times its bytes of memory, and only whole documents can be handed to different processes."""

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 1 << 12

Dropped = dict[str, dict[str, int | str]]
"""By reason: how many (`count`), and the first one's `file` and `line`."""


@dataclass
class Batch:
    """Consecutive documents of a source, as they are handed to a process.

    `read` counts the source's documents up to the batch's end, dropped ones included: what a resume passes over.
    """

    texts: list[str] = field(default_factory=list)
    places: list[tuple[str, int]] = field(default_factory=list)
    digests: np.ndarray = field(default_factory=lambda: np.zeros(0, "S16"))
    dropped: Dropped = field(default_factory=dict)
    read: int = 0

    def drop(self, reason: str, file: str, line: int, count: int = 1) -> None:
        """Count a document that was left out."""
        seen = self.dropped.setdefault(reason, {"count": 0, "file": file, "line": line})
        seen["count"] = int(seen["count"]) + count


def texts_of(source: Source, folder: Path) -> Iterator[str]:
    """The usable documents of a source, in order, streamed; what `prepare` encodes before it drops duplicates."""
    for text, _, _, _ in _parts(source, folder):
        if text is not None:
            yield text


def batches(source: Source, folder: Path, start: int = 0) -> Iterator[Batch]:
    """The documents of a source from number `start` on, in batches whose borders depend on the texts alone.

    A batch ends at BATCH_CHARACTERS or BATCH_DOCUMENTS, so a batch that begins where another ended is always the same.
    """
    batch, num_characters = Batch(read=start), 0
    for text, reason, file, line in islice(_parts(source, folder), start, None):
        batch.read += 1
        if text is None:
            batch.drop(reason, file, line)
        else:
            batch.texts.append(text)
            batch.places.append((file, line))
            num_characters += len(text)
        if num_characters >= BATCH_CHARACTERS or len(batch.texts) >= BATCH_DOCUMENTS:
            yield batch
            batch, num_characters = Batch(read=batch.read), 0
    if batch.texts or batch.dropped:
        yield batch


def add_dropped(total: Dropped, more: Dropped) -> None:
    """Add counts to `total`, in place; the first place stays."""
    for reason, facts in more.items():
        seen = total.setdefault(reason, {**facts, "count": 0})
        seen["count"] = int(seen["count"]) + int(facts["count"])


def without_duplicates(batch: Batch, seen: DigestSet, held_out: DigestSet | None) -> Batch:
    """The batch without documents that are in `seen` or `held_out`; its own are added to `seen`.

    Two documents are the same when their texts are, white space around them aside.
    """
    kept = Batch(dropped={reason: dict(facts) for reason, facts in batch.dropped.items()}, read=batch.read)
    digests = np.array([digest_of(text) for text in batch.texts], "S16")
    leaked = held_out.contains(digests) if held_out is not None else np.zeros(len(digests), bool)
    fresh = seen.add(digests)
    for at, (text, place) in enumerate(zip(batch.texts, batch.places, strict=True)):
        if leaked[at]:
            kept.drop("held out too", *place)
        elif not fresh[at]:
            kept.drop("duplicate", *place)
        else:
            kept.texts.append(text)
            kept.places.append(place)
    kept.digests = digests[~leaked & fresh]
    return kept


def digest_of(text: str) -> bytes:
    """16 bytes of BLAKE2: of 10^12 documents two different ones meet with a chance of 1 in 10^15."""
    return hashlib.blake2b(text.strip().encode(), digest_size=16).digest()


class DigestSet:
    """Digests in 16 bytes each: sorted arrays, every one at least twice as large as the next (O'Neil et al. 1996)."""

    _RECENT = 1 << 16

    def __init__(self) -> None:
        self._levels: list[np.ndarray] = []
        self._recent: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._recent) + sum(len(level) for level in self._levels)

    def contains(self, digests: np.ndarray) -> np.ndarray:
        """(n,) bool: which of the (n,) S16 digests are there."""
        found = np.array([digest in self._recent for digest in digests.tolist()], bool)
        for level in self._levels:
            at = np.minimum(np.searchsorted(level, digests), len(level) - 1)
            found |= level[at] == digests
        return found

    def add(self, digests: np.ndarray) -> np.ndarray:
        """(n,) bool: which were not there yet, nor earlier among the n; all are there afterwards."""
        fresh = ~self.contains(digests)
        for at in np.flatnonzero(fresh):
            digest = bytes(digests[at])
            if digest in self._recent:
                fresh[at] = False
            self._recent.add(digest)
        if len(self._recent) >= self._RECENT:
            self._settle()
        return fresh

    def _settle(self) -> None:
        """The recent ones become a sorted array, merged with those that are not much larger."""
        level = np.sort(np.array(list(self._recent), "S16"))
        self._recent = set()
        while self._levels and len(self._levels[-1]) < 2 * len(level):
            level = np.concatenate([self._levels.pop(), level])
            level.sort(kind="stable")
        self._levels.append(level)


def _parts(source: Source, folder: Path) -> Iterator[tuple[str | None, str, str, int]]:
    """(text, "", file, line) of each document, (None, reason, file, line) of each that is unusable."""
    for record, result in examples(source, folder, "text", LONGEST):
        if isinstance(result, str):
            yield None, result, record.file, record.number
        else:
            for part in _cut(result["text"]):
                yield part, "", record.file, record.number


def _cut(text: str) -> Iterable[str]:
    """The text in parts of at most 1.5 × LONGEST characters, each cut after a line or else a word, if there is one."""
    if len(text) <= LONGEST + LONGEST // 2:
        return (text,)
    parts, start = [], 0
    while len(text) - start > LONGEST + LONGEST // 2:
        stop = start + LONGEST
        mark = next((at for mark in ("\n", " ") if (at := text.rfind(mark, start + LONGEST // 2, stop)) >= 0), stop - 1)
        parts.append(text[start : mark + 1])
        start = mark + 1
    return [*parts, text[start:]]
