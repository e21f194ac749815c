"""The command `baton prepare`: a recipe's text, tokenised ahead of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from baton.errors import UserError
from baton.recipe import PretrainRecipe, load_recipe


def prepare(recipe_path: Path, overrides: list[str], workers: int | None, verify: bool, as_json: bool) -> None:
    """Prepare the corpus of a recipe for stage 1, and show what it holds."""
    from baton.corpus.prepare import prepared_corpus
    from baton.corpus.table import corpus_table
    from baton.registry.commands.options import print_json, print_rich

    recipe = load_recipe(recipe_path, overrides, PretrainRecipe)
    if recipe.data is None:
        raise UserError(f"{recipe_path}: mode: {recipe.mode} has no data to prepare")
    corpus = prepared_corpus(recipe, workers=workers, say=_silent if as_json else print)
    if verify:
        corpus.verify()
    if as_json:
        print_json(_summary(corpus.manifest) | {"folder": str(corpus.folder)})
        return
    print_rich(corpus_table(corpus))
    print(f"prepared in {corpus.folder}")


def _summary(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest without the shards, of which there may be thousands."""
    sources = [{key: value for key, value in facts.items() if key != "shards"} for facts in manifest["sources"]]
    return {key: manifest[key] for key in ("key", "tokenizer_digest", "dtype")} | {"sources": sources}


def _silent(text: str) -> None:
    """Where data are printed nothing else is."""
