"""Shards: the files of a prepared source, written aside and renamed, and read through memory maps.

A prepared folder holds `manifest.json`, `tokenizer/` and a folder a source with, for every shard, `00000.tokens`
(uint16 or uint32, little-endian: the documents one after the other, each `end-token, ids, end-token`),
`00000.ends.npy` (int64: where each document ends in the shard, its end token included), `00000.bytes.npy` (int64: a
document's UTF-8 bytes), `00000.language.npy` (uint8: an index into the source's `languages`), and, last of all,
`00000.json`: a shard without it does not exist. The manifest comes when everything is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np

from baton.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
_MOST_FILES = 1 << 16


class Recent:
    """What was asked for last, by a key: memory maps, each of which holds a file open."""

    def __init__(self) -> None:
        self._held: OrderedDict[Any, Any] = OrderedDict()

    def __reduce__(self) -> Any:
        return Recent, ()  # another process opens its own

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value of `key`, made where it is not among those that are held."""
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        while len(self._held) >= files_of_a_source():
            self._held.popitem(last=False)
        self._held[key] = found = make()
        return found


@cache
def files_of_a_source() -> int:
    """How many files a source may hold open at once: a sixteenth of what this process may open.

    A process may commonly open 1,024, and many more where it asks, which is done here.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(most // 16, 8)


def token_dtype(vocabulary: int) -> np.dtype:
    """The narrowest number that holds every token id of a vocabulary."""
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")


class ShardWriter:
    """One shard, written as its documents come; it counts once `close` has returned."""

    def __init__(self, folder: Path, number: int, dtype: np.dtype) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name, self.dtype = folder, f"{number:05d}", dtype
        self.num_tokens = self.num_bytes = 0
        self._ends: list[np.ndarray] = []
        self._bytes: list[np.ndarray] = []
        self._languages: list[np.ndarray] = []
        self._sha256 = hashlib.sha256()
        self._tokens: IO[bytes] = self._aside("tokens").open("wb")

    def add(
        self, tokens: np.ndarray, lengths: Sequence[int], num_bytes: Sequence[int], languages: Sequence[int]
    ) -> None:
        """Append whole documents: their tokens one after the other, and each one's tokens, bytes and language index."""
        assert len(lengths) == len(num_bytes) == len(languages) and sum(lengths) == len(tokens)
        content = np.ascontiguousarray(tokens, self.dtype).data
        self._tokens.write(content)
        self._sha256.update(content)
        self._ends.append(self.num_tokens + np.cumsum(np.asarray(lengths, np.int64)))
        self._bytes.append(np.asarray(num_bytes, np.int64))
        self._languages.append(np.asarray(languages, np.uint8))
        self.num_tokens += len(tokens)
        self.num_bytes += sum(num_bytes)

    def close(self, facts: dict[str, Any], scratch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Finish the shard; its entry, with further `facts` in it.

        `scratch` are arrays for a resume, saved as NAME.npy without a digest: the manifest is not about them.
        """
        _sync(self._tokens)
        self._tokens.close()
        os.replace(self._aside("tokens"), self.folder / f"{self.name}.tokens")
        ends = np.concatenate([np.zeros(0, np.int64), *self._ends])
        digests = {"tokens": self._sha256.hexdigest()}
        own = {
            "ends": ends,
            "bytes": np.concatenate([np.zeros(0, np.int64), *self._bytes]),
            "language": np.concatenate([np.zeros(0, np.uint8), *self._languages]),
        }
        for kind, array in (own | scratch).items():
            aside = self._aside(f"{kind}.npy")
            with aside.open("wb") as stream:
                np.save(stream, array)
                _sync(stream)
            if kind in own:
                digests[f"{kind}.npy"] = _sha256_of(aside)
            os.replace(aside, self.folder / f"{self.name}.{kind}.npy")
        entry = {
            "file": self.name,
            "documents": len(ends),
            "tokens": self.num_tokens,
            "bytes": self.num_bytes,
            "sha256": digests,
            **facts,
        }
        write_json(self.folder / f"{self.name}.json", entry)
        return entry

    def abandon(self) -> None:
        """Close the half-written file; what lies aside is written over by the next attempt."""
        self._tokens.close()

    def _aside(self, kind: str) -> Path:
        return self.folder / f"{self.name}.{kind}.new"


class PreparedSource:
    """One source of one use (train, eval), over all its shards, memory-mapped as they are read."""

    def __init__(self, folder: Path, facts: dict[str, Any], dtype: np.dtype) -> None:
        self.folder, self.facts, self.dtype = folder, facts, dtype
        self.name: str = facts["name"]
        self.path: str = facts["path"]
        self.use: str = facts["use"]
        self.licence: str | None = facts.get("licence")
        self.languages: list[str] = list(facts["languages"])
        self.shards: list[dict[str, Any]] = facts["shards"]
        self.token_starts = [0, *accumulate(shard["tokens"] for shard in self.shards)]
        self.document_starts = [0, *accumulate(shard["documents"] for shard in self.shards)]
        self._open = Recent()

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole stream, both end tokens of every document included."""
        return self.token_starts[-1]

    @property
    def num_documents(self) -> int:
        """Documents over all shards."""
        return self.document_starts[-1]

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the documents' text."""
        return sum(shard["bytes"] for shard in self.shards)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) token ids of the source's whole stream; a view of the map where one shard holds them."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        parts = [
            self.shard_tokens(shard)[first:last] for shard, first, last in self._spans(self.token_starts, start, stop)
        ]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.zeros(0, self.dtype)

    def read_through(self, most: int = 1 << 24) -> Iterator[np.ndarray]:
        """All tokens once, at most `most` of them at a time, read and not mapped: what is read does not stay."""
        for shard, entry in enumerate(self.shards):
            file = self.shard_file(shard, "tokens")
            for at in range(0, entry["tokens"], most):
                yield np.fromfile(file, self.dtype, count=most, offset=at * self.dtype.itemsize)

    def documents_between(self, start: int, stop: int) -> np.ndarray:
        """(n,) int64: where documents end within (start, stop] of the stream, ascending."""
        found = []
        for shard, first, last in self._spans(self.token_starts, start, stop):
            ends = self.shard_ends(shard)
            low, high = np.searchsorted(ends, [first, last], side="right")
            found.append(ends[low:high] + self.token_starts[shard])
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def document_span(self, number: int) -> tuple[int, int]:
        """(start, stop) of document `number` in the stream."""
        shard, at = self._place(number)
        ends, before = self.shard_ends(shard), self.token_starts[shard]
        return before + (int(ends[at - 1]) if at else 0), before + int(ends[at])

    def document(self, number: int) -> np.ndarray:
        """(n,) token ids of document `number`, between its two end tokens."""
        return self.tokens(*self.document_span(number))

    def document_bytes(self, number: int) -> int:
        """UTF-8 bytes of document `number`."""
        shard, at = self._place(number)
        return int(self._array(shard, "bytes.npy")[at])

    def document_language(self, number: int) -> str:
        """The language of document `number`, as the source or the detector says; `und` where none does."""
        shard, at = self._place(number)
        return self.languages[int(self._array(shard, "language.npy")[at])]

    def shard_tokens(self, shard: int) -> np.ndarray:
        """The tokens of a shard."""
        return self._array(shard, "tokens")

    def shard_ends(self, shard: int) -> np.ndarray:
        """(documents,) int64: where the shard's documents end, counted from the shard's start."""
        return self._array(shard, "ends.npy")

    def shard_bytes(self, shard: int) -> np.ndarray:
        """(documents,) int64: the UTF-8 bytes of the shard's documents."""
        return self._array(shard, "bytes.npy")

    def shard_languages(self, shard: int) -> np.ndarray:
        """(documents,) uint8: indices into `languages` of the shard's documents."""
        return self._array(shard, "language.npy")

    def shard_file(self, shard: int, kind: str) -> Path:
        """The path of a shard's file of a kind, such as `ends.npy`; others keep what they derive from a shard there."""
        return self.folder / f"{self.shards[shard]['file']}.{kind}"

    def _place(self, number: int) -> tuple[int, int]:
        assert 0 <= number < self.num_documents, (number, self.num_documents)
        shard = bisect_right(self.document_starts, number) - 1
        return shard, number - self.document_starts[shard]

    def _spans(self, starts: list[int], start: int, stop: int) -> list[tuple[int, int, int]]:
        """(shard, first, last) of each shard that holds a part of [start, stop), counted from the shard's start."""
        spans = []
        shard = bisect_right(starts, start) - 1
        while start < stop:
            last = min(stop, starts[shard + 1])
            if last > start:
                spans.append((shard, start - starts[shard], last - starts[shard]))
            start, shard = last, shard + 1
        return spans

    def _array(self, shard: int, kind: str) -> np.ndarray:
        found: np.ndarray = self._open.get((shard, kind), lambda: self._map(shard, kind))
        return found

    def _map(self, shard: int, kind: str) -> np.ndarray:
        file, num_tokens = self.shard_file(shard, kind), self.shards[shard]["tokens"]
        try:
            if kind == "tokens":
                if file.stat().st_size != num_tokens * self.dtype.itemsize:
                    raise ValueError(f"expected {num_tokens:,} tokens of {self.dtype.itemsize} bytes")
                if not num_tokens:
                    return np.zeros(0, self.dtype)
                return np.memmap(file, self.dtype, mode="r")
            return np.load(file, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}). Delete {self.folder.parent} and prepare again") from None


class Corpus:
    """A whole prepared folder: its tokenizer, and its sources in the recipe's order."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.tokenizer_folder = folder / TOKENIZER
        self.dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        sources = [PreparedSource(folder / facts["folder"], facts, self.dtype) for facts in manifest["sources"]]
        self.train = [source for source in sources if source.use == "train"]
        self.eval = [source for source in sources if source.use == "eval"]

    @classmethod
    def open(cls, folder: Path, verify: bool = False) -> Corpus:
        """The corpus of a prepared folder; `verify` reads every shard and compares its digest.

        Raises UserError where the folder is not prepared, of another format, or damaged.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{folder} is not a prepared corpus: it has no {MANIFEST}. Run baton prepare") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / MANIFEST} cannot be read: {error}. Delete the folder, prepare again") from None
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"{folder} is a prepared corpus of format {manifest.get('format')}; this Baton reads format {FORMAT}. "
                "Delete it and run baton prepare"
            )
        corpus = cls(folder, manifest)
        if verify:
            corpus.verify()
        return corpus

    @property
    def key(self) -> str:
        """What the corpus was made of and how, as one digest."""
        return self.manifest["key"]

    def verify(self) -> None:
        """Raises UserError where a shard's file differs from its digest."""
        for source in [*self.train, *self.eval]:
            for number, shard in enumerate(source.shards):
                for kind, expected in shard["sha256"].items():
                    file = source.shard_file(number, kind)
                    if not file.is_file() or _sha256_of(file) != expected:
                        state = "has changed since it was written" if file.is_file() else "is missing"
                        raise UserError(f"{file} {state}. Delete {self.folder} and prepare again")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file that `write_json` wrote, or None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write aside, flush to the disk and rename: the file is whole or absent."""
    aside = path.with_name(path.name + ".new")
    with aside.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1)
        stream.write("\n")
        _sync(stream)
    os.replace(aside, path)


def _sync(stream: IO[Any]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
