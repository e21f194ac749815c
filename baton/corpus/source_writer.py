"""Writing a source's shards: finished ones are found again, near duplicates are left out, a full one is closed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from baton.corpus.documents import Batch, DigestSet, Dropped, add_dropped
from baton.corpus.encode import Encoded
from baton.corpus.shards import ShardWriter, read_json
from baton.corpus_sections import CorpusData

if TYPE_CHECKING:
    from baton.corpus.near_duplicates import NearDuplicateIndex


class Seen:
    """What documents are compared with: those of the uses before, and those of the use that is being read."""

    def __init__(self, data: CorpusData) -> None:
        self.held_out, self.train = DigestSet(), DigestSet()
        self.alike: NearDuplicateIndex | None = None
        if data.near_duplicates is not None:
            from baton.corpus.near_duplicates import NearDuplicateIndex

            self.alike = NearDuplicateIndex(data.near_duplicates.threshold, data.near_duplicates.permutations)

    def of(self, use: str) -> tuple[DigestSet, DigestSet | None]:
        """(what this use's documents are added to, what they must not be in)."""
        return (self.held_out, None) if use == "eval" else (self.train, self.held_out)


class SourceWriter:
    """The shards of one source: finished ones found again, the next one written as batches come."""

    def __init__(self, folder: Path, data: CorpusData, dtype: np.dtype, seen: Seen, use: str) -> None:
        self.folder, self.data, self.dtype, self.seen, self.use = folder, data, dtype, seen, use
        self.entries: list[dict[str, Any]] = []
        self.codes: list[str] = []
        self.dropped: Dropped = {}
        self.num_read = 0
        self._shard: ShardWriter | None = None
        self._digests: list[np.ndarray] = []
        self._signatures: list[np.ndarray] = []
        self._shard_dropped: Dropped = {}

    def resume(self) -> None:
        """Take over the shards that are finished: what they hold has been seen."""
        while entry := read_json(self.folder / f"{len(self.entries):05d}.json"):
            name = entry["file"]
            if self.data.deduplicate:
                self.seen.of(self.use)[0].add(np.load(self.folder / f"{name}.resume-digests.npy"))
            if self.seen.alike is not None:
                self.seen.alike.restore(self.folder / f"{name}.resume-signatures.npy", self.use)
            self._take(entry)

    def add(self, batch: Batch, encoded: Encoded) -> None:
        """Append a batch's documents, near duplicates left out, and finish the shard where it is full."""
        self._shard = self._shard or ShardWriter(self.folder, len(self.entries), self.dtype)
        dropped = {reason: dict(facts) for reason, facts in batch.dropped.items()}
        digests = batch.digests
        if self.seen.alike is not None and encoded.signatures is not None:
            keep, reasons = self.seen.alike.judge(encoded.signatures, self.use)
            counted = Batch(dropped=dropped)
            for at, reason in reasons:
                counted.drop(reason, *batch.places[at])
            encoded, digests = _only(encoded, keep), digests[keep]
            assert encoded.signatures is not None
            self._signatures.append(encoded.signatures)
        for code in dict.fromkeys(encoded.languages):
            if code not in self.codes:
                self.codes.append(code)
        self._shard.add(
            encoded.tokens,
            encoded.lengths.tolist(),
            encoded.num_bytes.tolist(),
            [self.codes.index(code) for code in encoded.languages],
        )
        self._digests.append(digests)
        add_dropped(self._shard_dropped, dropped)
        self.num_read = batch.read
        if self._shard.num_tokens >= self.data.shard_tokens:
            self.close_shard()

    def close_shard(self) -> None:
        """Finish the shard that is being written, if one is."""
        if self._shard is None:
            return
        scratch: dict[str, np.ndarray] = {}
        if self.data.deduplicate:
            scratch["resume-digests"] = np.concatenate([np.zeros(0, "S16"), *self._digests])
        if self.seen.alike is not None:
            empty = np.zeros((0, self.seen.alike.permutations), np.uint32)
            scratch["resume-signatures"] = np.concatenate([empty, *self._signatures])
        facts = {"read": self.num_read, "languages": list(self.codes), "dropped": self._shard_dropped}
        entry = self._shard.close(facts, scratch)
        if self.seen.alike is not None:
            self.seen.alike.settle(self.folder / f"{entry['file']}.resume-signatures.npy")
        self._shard, self._digests, self._signatures, self._shard_dropped = None, [], [], {}
        self._take(entry)

    def abandon(self) -> None:
        """Close what was left half-written."""
        if self._shard is not None:
            self._shard.abandon()

    def _take(self, entry: dict[str, Any]) -> None:
        self.num_read, self.codes = entry.pop("read"), entry.pop("languages")
        add_dropped(self.dropped, entry.pop("dropped"))
        self.entries.append(entry)


def _only(encoded: Encoded, keep: np.ndarray) -> Encoded:
    """The documents of a batch that are kept: (documents,) bool."""
    if keep.all():
        return encoded
    return Encoded(
        tokens=encoded.tokens[np.repeat(keep, encoded.lengths)],
        lengths=encoded.lengths[keep],
        num_bytes=encoded.num_bytes[keep],
        languages=[code for code, kept in zip(encoded.languages, keep, strict=True) if kept],
        signatures=None if encoded.signatures is None else encoded.signatures[keep],
    )
