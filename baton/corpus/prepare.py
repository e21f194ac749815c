"""Preparing a corpus: the recipe's text, tokenised once, in shards that a killed command does not write again.

The order of everything is the order of the sources: this process reads documents, drops duplicates and hands out
batches; others encode them; this one writes what comes back, in the order in which it was handed out. So the shards are
the same however many processes there are, and memory is bounded by a few batches, whatever the corpus.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from baton.corpus.documents import Batch, Dropped, batches, without_duplicates
from baton.corpus.encode import UNKNOWN, Encoded, Encoders, Texts, can_detect, encoding_of, usable_cores
from baton.corpus.names import names_of, sources_of
from baton.corpus.places import corpora_folder, locked
from baton.corpus.shards import FORMAT, MANIFEST, TOKENIZER, Corpus, read_json, write_json
from baton.corpus.source_writer import Seen, SourceWriter
from baton.corpus.summary import summary
from baton.corpus.tokenizer import recipe_tokenizer
from baton.corpus_sections import CorpusData, CorpusSource
from baton.data import fingerprint
from baton.data.files import place_unit
from baton.errors import UserError
from baton.registry.vocabulary import TOKENIZER_FILES, tokenizer_identity

if TYPE_CHECKING:
    from baton.pretrain_sections import PretrainRecipe

Say = Callable[[str], None]

TELL_EVERY_S = 30.0
"""How often a long preparation says how far it is."""


def prepared_corpus(
    recipe: PretrainRecipe, tokenizer_folder: Path | None = None, workers: int | None = None, say: Say = print
) -> Corpus:
    """The recipe's corpus, opened where it is prepared already, else prepared now.

    `tokenizer_folder` holds the tokenizer; without it the recipe says which, and it may be trained first. One process
    calls this; the others open `corpus.folder`.
    """
    if recipe.data is not None and recipe.data.near_duplicates is not None:
        from baton.corpus.near_duplicates import check_installed

        check_installed()  # before a tokenizer is trained
    return prepare(recipe, tokenizer_folder or recipe_tokenizer(recipe, say), workers=workers, say=say)


def prepare(
    recipe: PretrainRecipe,
    tokenizer_folder: Path,
    out: Path | None = None,
    workers: int | None = None,
    say: Say = print,
) -> Corpus:
    """Tokenise the recipe's sources into `out` (by default `data.prepared`, else one folder a key), and open it.

    Another call, after whatever ended the first one, goes on after the last finished shard. Raises UserError for what
    is wrong with a source, by file and line; where a source has no document left; and where the folder holds a corpus
    of other sources, tokenizer or settings.
    """
    data = recipe.data
    assert data is not None
    key, facts = corpus_key(data, recipe.folder, tokenizer_folder)
    folder = out or (Path(data.prepared) if data.prepared else corpora_folder(recipe) / key[:16])
    with locked(folder):
        if (folder / MANIFEST).exists():
            corpus = Corpus.open(folder)
            _check_key(folder, corpus.manifest, key, facts)
            return corpus
        begun = read_json(folder / "preparing.json")
        if begun is not None:
            _check_key(folder, begun, key, facts)
        write_json(folder / "preparing.json", {"key": key, "inputs": facts})
        _copy_tokenizer(tokenizer_folder, folder / TOKENIZER)
        _Preparation(recipe.folder, data, folder, workers or usable_cores(), say).run(key, facts)
        (folder / "preparing.json").unlink()
    return Corpus.open(folder)


def corpus_key(data: CorpusData, folder: Path, tokenizer_folder: Path) -> tuple[str, dict[str, Any]]:
    """(key, what it is the digest of): all that decides what a prepared folder holds."""
    kept = data.model_dump(mode="json", include={"deduplicate", "near_duplicates", "shard_tokens"})
    facts: dict[str, Any] = {"format": FORMAT, "tokenizer": tokenizer_identity(tokenizer_folder), "settings": kept}
    if any(source.language is None for source in (*data.train, *data.eval)):
        facts["languages_by"] = _detector_name() if can_detect() else None
    for use in ("train", "eval"):
        facts[use] = [
            # how often a source is read says nothing about what it holds
            {**fingerprint(source, folder), "language": source.language, "weight": None}
            for source in sources_of(data, use)
        ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(), facts


class _Task(NamedTuple):
    batch: Batch
    encoded: Future[Encoded]


class _Preparation:
    """One run of `prepare`, source by source."""

    def __init__(self, base: Path, data: CorpusData, out: Path, workers: int, say: Say) -> None:
        self.base, self.data, self.out, self.workers, self.say = base, data, out, workers, say
        self.seen = Seen(data)
        permutations = data.near_duplicates.permutations if data.near_duplicates else 0
        self.encoding = encoding_of(out / TOKENIZER, permutations)
        self.detects = can_detect()
        self.dtype = np.dtype(self.encoding.dtype)

    def run(self, key: str, inputs: dict[str, Any]) -> None:
        """Every source, held-out text first: what is held out is not trained on; then the manifest."""
        done: dict[str, list[dict[str, Any]]] = {"eval": [], "train": []}
        with Encoders(self.encoding, self.workers) as encoders:
            for use in ("eval", "train"):
                for at, source in enumerate(sources_of(self.data, use)):
                    done[use].append(self._source(use, at, source, encoders))
        manifest = {
            "format": FORMAT,
            "key": key,
            "tokenizer_digest": inputs["tokenizer"]["digest"],
            "dtype": self.dtype.name,
            "languages_by": _detector_name() if self.detects else None,
            "inputs": inputs,
            "sources": done["train"] + done["eval"],
        }
        write_json(self.out / MANIFEST, manifest)
        for scratch in self.out.glob("*/*.resume-*.npy"):
            scratch.unlink()

    def _source(self, use: str, at: int, source: CorpusSource, encoders: Encoders) -> dict[str, Any]:
        place = f"{use}-{at:02d}"
        writer = SourceWriter(self.out / place, self.data, self.dtype, self.seen, use)
        facts = read_json(self.out / place / "source.json")
        writer.resume()
        if facts is not None:
            return facts
        if writer.entries:
            self.say(f"{source.path}: going on after {len(writer.entries)} finished shards")
        told = started = time.monotonic()
        num_bytes = 0
        try:
            for batch, encoded in self._encoded(use, source, encoders, writer.num_read):
                writer.add(batch, encoded)
                num_bytes += int(encoded.num_bytes.sum())
                if time.monotonic() - told > TELL_EVERY_S:
                    told = time.monotonic()
                    rate = num_bytes / 1e6 / (told - started)
                    self.say(f"{source.path}: {writer.num_read:,} documents read, {rate:.1f} MB of text a second")
            writer.close_shard()
        finally:
            writer.abandon()
        facts = {
            "use": use,
            "folder": place,
            "path": source.path,
            "name": names_of(sources_of(self.data, use))[at],
            "licence": source.licence,
            **summary(self.out / place, writer.entries, writer.codes, self.dtype),
            "dropped": writer.dropped,
            "shards": writer.entries,
        }
        if not facts["documents"]:
            shutil.rmtree(self.out / place, ignore_errors=True)
            raise UserError(f"{source.path}: no document is left ({_reasons(writer.dropped)})")
        write_json(self.out / place / "source.json", facts)
        return facts

    def _encoded(
        self, use: str, source: CorpusSource, encoders: Encoders, start: int
    ) -> Iterator[tuple[Batch, Encoded]]:
        """The source's batches from document `start` on, encoded, in order; some more than processes are under way."""
        tasks: deque[_Task] = deque()
        language = source.language or (None if self.detects else UNKNOWN)
        read = batches(source, self.base, start)
        batch = next(read, None)
        is_small = True
        while batch is not None:
            following = next(read, None)
            is_small = is_small and following is None
            if self.data.deduplicate:
                batch = without_duplicates(batch, *self.seen.of(use))
            tasks.append(_Task(batch, encoders.submit(Texts(batch.texts, language), here=is_small)))
            while tasks and (len(tasks) > self.workers + 2 or tasks[0].encoded.done()):
                task = tasks.popleft()
                yield task.batch, task.encoded.result()
            batch = following
        while tasks:
            task = tasks.popleft()
            yield task.batch, task.encoded.result()


def _reasons(dropped: Dropped) -> str:
    told = [
        f"{facts['count']:,} × {reason}, first at {facts['file']} {place_unit(str(facts['file']))} {facts['line']}"
        for reason, facts in dropped.items()
    ]
    return "; ".join(told) or "it holds none"


def _detector_name() -> str:
    from importlib.metadata import version

    return f"py3langid {version('py3langid')}"


def _copy_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer's files, and no weights that may lie beside them."""
    if target.is_dir():
        return
    aside = target.with_name(target.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, aside / name)
    aside.rename(target)


def _check_key(folder: Path, found: dict[str, Any], key: str, facts: dict[str, Any]) -> None:
    if found.get("key") == key:
        return
    before = found.get("inputs", {})
    differing = [name for name in facts if before.get(name) != facts[name]]
    raise UserError(
        f"data.prepared: {folder} was prepared with other {', '.join(differing) or 'inputs'} than the recipe has now. "
        "Name another folder, or delete this one"
    )
