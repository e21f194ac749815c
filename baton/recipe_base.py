"""What recipes have in common: data sources, where a version goes, optimiser settings, the keys of every stage."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from baton.errors import UserError
from baton.strict import NonNegative, Positive, PositiveFloat, Strict
from baton.train_sections import Train

Stage = Literal["world", "ladder", "pretrain", "sft", "reward", "ppo"]

BOOKKEEPING = ("save_every", "keep", "log_every")
"""Keys of `train:` that no step depends on."""


class Source(Strict):
    """One data source: a file, glob or folder (relative to the recipe's folder), or a hub dataset id."""

    path: str
    format: (
        Literal[
            "text",
            "lines",
            "messages",
            "prompt_completion",
            "alpaca",
            "sharegpt",
            "oasst",
            "hh",
            "preference",
            "arena",
            "prompts",
        ]
        | None
    ) = None
    weight: PositiveFloat = 1.0
    rows: tuple[NonNegative | None, NonNegative | None] | None = None
    licence: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None


class Publish(Strict):
    """Where the stage's version goes: the model's name, and the alias that is moved to it."""

    name: str
    alias: str = "candidate"


class TextData(Strict):
    """Training and held-out text, and questions asked of the trained model."""

    train: Annotated[list[Source], Field(min_length=1)]
    eval: list[Source] = []
    questions: list[Source] = []


class Recipe(Strict):
    """The keys that every stage shares."""

    stage: Stage
    registry: str = Field(default_factory=lambda: os.environ.get("BATON_REGISTRY") or ".baton/registry")
    run_dir: str
    processes: Positive | None = None

    _path: Path = PrivateAttr(default=Path("recipe.yaml"))

    @property
    def path(self) -> Path:
        """The file that the recipe was read from."""
        return self._path

    @property
    def folder(self) -> Path:
        """Relative data paths start here."""
        return self._path.parent

    def digest(self, bookkeeping: bool = True) -> str:
        """sha256 of everything that can change the result: where it runs, is kept and may be refused is left out.

        Without `bookkeeping`, so is how often a training is saved and told of: it may be changed on the way.
        """
        content = self.model_dump(mode="json", exclude={"registry", "run_dir", "processes", "allowed_licences"})
        if isinstance(content.get("data"), dict):
            content["data"].pop("prepared", None)
        if not bookkeeping and isinstance(content.get("train"), dict):
            for key in BOOKKEEPING:
                content["train"].pop(key, None)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class TrainedRecipe(Recipe):
    """The keys of every stage that publishes a version."""

    publish: Publish
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    licence: str | None = None
    allowed_licences: list[str] | None = None

    @model_validator(mode="after")
    def _one_licence_an_entry(self) -> Self:
        from baton.registry.history.licences import check_allowed

        try:
            check_allowed(self.allowed_licences or [])
        except UserError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def rows_per_batch(self) -> int:
        """Rows, pairs or episodes of one optimizer batch on all processes together; 0 where nothing is trained."""
        train: Train | None = getattr(self, "train", None)
        return train.rows_per_batch if train else 0
