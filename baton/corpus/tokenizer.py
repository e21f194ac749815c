"""The tokenizer of a corpus: an existing one, or trained once on a weighted sample of the training text."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.corpus.documents import texts_of
from baton.corpus.places import corpora_folder, locked
from baton.corpus_sections import CorpusSource
from baton.data import fingerprint
from baton.data.files import COMPRESSIONS
from baton.errors import UserError

if TYPE_CHECKING:
    from baton.pretrain_sections import PretrainRecipe

_COMPRESSED = 3.0
"""Text is about so many times its compressed size."""


def recipe_tokenizer(recipe: PretrainRecipe, say: Callable[[str], None] = print) -> Path:
    """The folder of the tokenizer of a recipe: the one at `tokenizer.path`, the base's to continue, or a trained one.

    It is kept beside the corpora. Raises UserError where it cannot be had.
    """
    from baton.build import model_source
    from baton.registry import Registry
    from baton.tokenizer_source import existing_tokenizer

    home = corpora_folder(recipe) / "tokenizers"
    if recipe.is_continued:
        assert recipe.base is not None
        if recipe.base.endswith(".gguf"):
            raise UserError(f"base: {recipe.base}: to continue a GGUF file register it first, by mode: load")
        if model_source(recipe.base, recipe.folder) is None:  # of the registry: its files as they are, as in stage 1
            registry = Registry(recipe.registry)
            return registry.materialise(registry.resolve(recipe.base))
        return existing_tokenizer(recipe.base, recipe.folder, recipe.registry, home, say)
    assert recipe.tokenizer is not None
    if recipe.tokenizer.path is not None:
        return existing_tokenizer(recipe.tokenizer.path, recipe.folder, recipe.registry, home, say)
    return _trained(recipe, home, say)


def _trained(recipe: PretrainRecipe, home: Path, say: Callable[[str], None]) -> Path:
    from baton.bpe import TextStream, train_tokenizer, weighted_sample

    data, settings = recipe.data, recipe.tokenizer
    assert data is not None and settings is not None and settings.vocab_size is not None
    sources = [{**fingerprint(source, recipe.folder), "share": source.share} for source in data.train]
    facts: dict[str, Any] = {"format": 1, "settings": settings.model_dump(mode="json"), "sources": sources}
    folder = home / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    with locked(home):
        if not folder.is_dir():
            say(f"training a tokenizer of {settings.vocab_size:,} tokens")
            streams = [
                TextStream(
                    _again(source, recipe.folder),
                    source.weight,
                    source.share,
                    _text_bytes(source, facts["size"], settings.sample_bytes),
                )
                for source, facts in zip(data.train, sources, strict=True)
            ]
            sample = weighted_sample(streams, settings.sample_bytes)
            tokenizer = train_tokenizer(sample, settings.vocab_size, settings.sample_bytes, settings.reserved)
            aside = folder.with_name(folder.name + ".new")
            shutil.rmtree(aside, ignore_errors=True)
            tokenizer.save_pretrained(aside)
            aside.rename(folder)
    return folder


def _again(source: CorpusSource, folder: Path) -> Callable[[], Iterator[str]]:
    return lambda: texts_of(source, folder)


def _text_bytes(source: CorpusSource, file_bytes: int | None, sample_bytes: int) -> int | None:
    """About how much text a large source holds, by its files' size; None where that has to be counted."""
    if file_bytes is None or source.rows or file_bytes < sample_bytes:
        return None
    return int(file_bytes * (_COMPRESSED if source.path.endswith((*COMPRESSIONS, ".parquet")) else 1.0))
