"""The sections of a recipe that tell what stage 1 reads: sources with language and share, duplicates, packing."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from baton.recipe_base import Source
from baton.strict import Positive, PositiveFloat, Strict

SHARES_TOLERANCE = 0.01
"""Shares may miss 1 by this much, as figures rounded to two places do; they are scaled to 1."""
Language = Annotated[str, StringConstraints(pattern=r"^[a-z]{2,3}([-_][A-Za-z0-9]+)*$")]


class CorpusSource(Source):
    """A source of documents. `language` (en, ja, zh-Hant) is that of all its documents; left out, it is detected.

    Of training text `weight` multiplies the source's own tokens; `share` is its part of all tokens instead (every
    source has one, or none). After `max_epochs` the other sources take its place. `replay` marks the general text of a
    continued pretraining.
    """

    language: Language | None = None
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    max_epochs: PositiveFloat | None = None
    replay: bool = False


class NearDuplicates(Strict):
    """Documents whose sets of word runs are alike (Broder 1997): the first is kept, the others are dropped.

    `threshold` is the Jaccard similarity from which on two are alike, estimated by `permutations` minimal hashes.
    """

    threshold: Annotated[float, Field(ge=0.3, lt=1)] = 0.8
    permutations: Annotated[int, Field(ge=16, le=1024)] = 128


class CorpusData(Strict):
    """Training and held-out text, and questions asked of the trained model.

    `prepared` is the folder of the tokenised text; by default one for every set of sources, tokenizer and settings.
    `deduplicate` drops documents that were there before, and those of the training text that are held out.
    `packing`: documents are kept whole where a row can hold them (`best_fit`, Ding et al. 2024), or follow each other,
    cut at the rows' ends (`stream`).
    """

    train: Annotated[list[CorpusSource], Field(min_length=1)]
    eval: list[CorpusSource] = []
    questions: list[Source] = []
    prepared: str | None = None
    deduplicate: bool = True
    near_duplicates: NearDuplicates | None = None
    shard_tokens: Positive = 1 << 25
    packing: Literal["best_fit", "stream"] = "best_fit"

    @model_validator(mode="after")
    def _duplicates(self) -> Self:
        if self.near_duplicates is not None and not self.deduplicate:
            raise ValueError("near_duplicates without deduplicate would keep the exact ones; leave one of them out")
        return self

    @model_validator(mode="after")
    def _mixture(self) -> Self:
        shares = [source.share for source in self.train if source.share is not None]
        if shares and len(shares) < len(self.train):
            without = ", ".join(source.path for source in self.train if source.share is None)
            raise ValueError(
                f"some training sources have a share and {without} has none; give all of them one, or none"
            )
        if shares and abs(sum(shares) - 1) > SHARES_TOLERANCE:
            shown = " + ".join(f"{share:g}" for share in shares)
            raise ValueError(f"the shares are {shown} = {sum(shares):g} of the tokens; they must add up to 1")
        for source in self.train:
            if source.share is not None and "weight" in source.model_fields_set:
                raise ValueError(
                    f"{source.path} has a share and a weight, which would be ignored; leave one of them out"
                )
        for source in self.eval:
            ignored = source.model_fields_set & {"weight", "share", "max_epochs", "replay"}
            if ignored:
                raise ValueError(
                    f"{source.path} is held out: every document of it is measured once, and "
                    f"{', '.join(sorted(ignored))} would be ignored"
                )
        return self
