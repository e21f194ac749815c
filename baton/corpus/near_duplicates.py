"""Near duplicates: documents whose runs of words are mostly the same, found by minimal hashes (Broder 1997).

datasketch makes the hashes and chooses the bands (Leskovec et al., Mining of Massive Datasets, chapter 3); the index is
our own, because the library's takes some ten kilobytes a document: sorted arrays of 12 bytes a band, and the signatures
stay on the disk.
"""

from __future__ import annotations

import re
from collections import defaultdict
from itertools import accumulate
from pathlib import Path

import numpy as np

from baton.errors import UserError

RUN = 5
"""Words in a run, as in GPT-3's filter (Brown et al. 2020, appendix A) and its successors."""

LIKE_HELD_OUT = "like a held-out document"
NEAR_DUPLICATE = "near duplicate"

# A script without spaces between words has its characters for words.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af\u0e00-\u0eff\u1000-\u109f]|[^\W_]+")
_CHUNK = 1 << 13
_RECENT = 1 << 18
_MOST_CANDIDATES = 16
_MIX = np.uint64(0x9E3779B97F4A7C15)


def check_installed() -> None:
    """Raises UserError where datasketch is not there."""
    from importlib.util import find_spec

    if find_spec("datasketch") is None:
        raise UserError("data.near_duplicates needs the datasketch library: pip install 'baton[corpus]'")


class Signer:
    """Signatures of texts: the least of each permutation of the hashes of their runs of words."""

    def __init__(self, permutations: int) -> None:
        from datasketch import MinHash

        self._empty = MinHash(permutations, seed=1, scheme="affine32", hashfunc=int)

    def __call__(self, text: str) -> np.ndarray:
        """(permutations,) uint32."""
        signature = self._empty.copy()
        hashes = _run_hashes(text)
        for start in range(0, len(hashes), _CHUNK):
            signature.update_batch(hashes[start : start + _CHUNK].tolist())
        return signature.hashvalues.astype(np.uint32)


class NearDuplicateIndex:
    """The signatures of all documents that were kept, by bands: alike ones share one of them with a high probability.

    Of documents exactly as alike as `threshold`, datasketch's choice of bands finds most; a candidate counts if the
    two signatures agree in at least `threshold` of their places.
    """

    def __init__(self, threshold: float, permutations: int) -> None:
        check_installed()
        from datasketch import MinHashLSH

        bands = MinHashLSH(threshold, permutations, weights=(0.1, 0.9))  # a false candidate costs a look, no document
        self.permutations, self._threshold = permutations, threshold
        self._bands, self._rows = bands.b, bands.r
        self._recent: dict[int, list[int]] = defaultdict(list)
        self._levels: list[tuple[np.ndarray, np.ndarray]] = []
        self._settled: list[np.ndarray] = []
        self._pending: list[np.ndarray] = []
        self._num_settled = self._num_documents = self._num_held_out = 0

    def judge(self, signatures: np.ndarray, use: str) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """(documents,) bool, which to keep, and for each other one its place and the reason; the kept ones are added.

        signatures: (documents, permutations) uint32.
        """
        keys = self._keys(signatures)
        older = self._older(keys)
        keep = np.ones(len(signatures), bool)
        reasons = []
        for at, (signature, own) in enumerate(zip(signatures, keys.tolist(), strict=True)):
            candidates = dict.fromkeys([*older[at], *(found for key in own for found in self._recent.get(key, ()))])
            alike = next((number for number in candidates if self._is_alike(signature, number)), None)
            if alike is not None:
                keep[at] = False
                reasons.append((at, LIKE_HELD_OUT if use == "train" and alike < self._num_held_out else NEAR_DUPLICATE))
                continue
            self._insert(own)
            self._pending.append(signature)
        if use == "eval":
            self._num_held_out = self._num_documents
        if len(self._recent) > _RECENT:
            self._merge()
        return keep, reasons

    def settle(self, file: Path) -> None:
        """What was kept since the last call lies in `file` now, and is read from there."""
        if self._pending:
            self._settled.append(np.load(file, mmap_mode="r"))
            assert len(self._settled[-1]) == len(self._pending)
            self._num_settled += len(self._pending)
            self._pending = []

    def restore(self, file: Path, use: str) -> None:
        """Add the documents of a finished shard without judging them once more."""
        signatures = np.load(file, mmap_mode="r")
        for start in range(0, len(signatures), _CHUNK):
            for own in self._keys(signatures[start : start + _CHUNK]).tolist():
                self._insert(own)
            if len(self._recent) > _RECENT:
                self._merge()
        if len(signatures):
            self._settled.append(signatures)
            self._num_settled += len(signatures)
        if use == "eval":
            self._num_held_out = self._num_documents

    def _insert(self, keys: list[int]) -> None:
        for key in keys:
            self._recent[key].append(self._num_documents)
        self._num_documents += 1

    def _keys(self, signatures: np.ndarray) -> np.ndarray:
        """(documents, bands) uint64: a hash of each band of each signature."""
        used = signatures[:, : self._bands * self._rows].astype(np.uint64)
        parts = used.reshape(len(signatures), self._bands, self._rows)
        keys = np.broadcast_to(np.arange(1, self._bands + 1, dtype=np.uint64) * _MIX, parts.shape[:2]).copy()
        for row in range(self._rows):
            keys = (keys ^ parts[:, :, row]) * _MIX
            keys ^= keys >> np.uint64(29)
        return keys

    def _older(self, keys: np.ndarray) -> list[list[int]]:
        """For each document the numbers of those in the sorted arrays that share a band with it."""
        found: list[list[int]] = [[] for _ in keys]
        for level, numbers in self._levels:
            first = np.searchsorted(level, keys)
            last = np.searchsorted(level, keys, side="right")
            for at, band in zip(*np.nonzero(last > first), strict=True):
                # text that stands in millions of documents would make each of them look at all of the others
                stop = min(last[at, band], first[at, band] + _MOST_CANDIDATES)
                found[at] += numbers[first[at, band] : stop].tolist()
        return found

    def _is_alike(self, signature: np.ndarray, number: int) -> bool:
        return float((self._signature(number) == signature).mean()) >= self._threshold

    def _signature(self, number: int) -> np.ndarray:
        if number >= self._num_settled:
            return self._pending[number - self._num_settled]
        for array, stop in zip(self._settled, accumulate(map(len, self._settled)), strict=True):
            if number < stop:
                return array[number - stop + len(array)]
        raise AssertionError(number)

    def _merge(self) -> None:
        """The recent keys become a sorted array, merged with those that are not much larger."""
        keys = np.fromiter((key for key, numbers in self._recent.items() for _ in numbers), np.uint64)
        numbers = np.fromiter((number for numbers in self._recent.values() for number in numbers), np.uint32)
        self._recent = defaultdict(list)
        while True:
            order = np.argsort(keys, kind="stable")
            keys, numbers = keys[order], numbers[order]
            if not self._levels or len(self._levels[-1][0]) >= 2 * len(keys):
                break
            before = self._levels.pop()
            keys, numbers = np.concatenate([before[0], keys]), np.concatenate([before[1], numbers])
        self._levels.append((keys, numbers))


def _run_hashes(text: str) -> np.ndarray:
    """(runs,) uint32: a hash of each different run of RUN words; a shorter text is one run."""
    words = _WORD.findall(text.lower()) or [text]
    ids = np.array([_word_hash(word) for word in words], np.uint64)
    length = min(RUN, len(ids))
    runs = np.zeros(len(ids) - length + 1, np.uint64)
    for at in range(length):
        runs = (runs ^ ids[at : at + len(runs)]) * _MIX
        runs ^= runs >> np.uint64(29)
    return np.unique((runs >> np.uint64(32)).astype(np.uint32))


def _word_hash(word: str) -> int:
    from zlib import adler32, crc32

    raw = word.encode()
    return crc32(raw) << 32 | adler32(raw)
