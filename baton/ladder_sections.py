"""The recipe of a ladder: sizes of one family on one corpus, from whose small ones the last one's loss is predicted."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from baton.corpus_sections import CorpusData
from baton.pretrain_sections import Decoder, PretrainRecipe, Tokenizer
from baton.recipe_base import TrainedRecipe
from baton.registry.reference import check_name
from baton.scaling import LEAST_POINTS
from baton.strict import PositiveFloat, Strict, explain

DERIVED = ("steps",)
"""Keys of a pretrain recipe's `train` that follow from a size."""


class Size(Strict):
    """One size: its name, the decoder, and what of `train` is different for it."""

    name: Annotated[str, Field(min_length=1)]
    model: Decoder
    train: dict[str, Any] = {}


class LadderRecipe(TrainedRecipe):
    """A ladder: each of `sizes` is pretrained on `tokens_per_parameter` tokens and published as `publish.name`-size.

    `train` has the keys of a pretrain recipe's `train`, for all sizes; `steps` follows from the tokens, and
    `learning_rate`, `tokens_per_batch` and `warmup_steps` from the compute where they are left out. The loss of the
    last size is predicted from the others' before it is trained. `config_file` is an accelerate config to launch by.
    """

    stage: Literal["ladder"]
    data: CorpusData
    tokenizer: Tokenizer
    sizes: Annotated[list[Size], Field(min_length=LEAST_POINTS + 1)]
    tokens_per_parameter: PositiveFloat = 20.0
    train: dict[str, Any]
    config_file: str | None = None

    @property
    def rows_per_batch(self) -> int:
        """None of its own: its sizes have them."""
        return 0

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        names = [size.name for size in self.sizes]
        if len(set(names)) < len(names):
            raise ValueError(f"two sizes are called {max(names, key=names.count)}; a size's name is its model's")
        for name in names:
            check_name(f"{self.publish.name}-{name}")
        if not self.data.eval:
            raise ValueError("a ladder compares losses on held-out text: it needs data.eval")
        if not isinstance(self.train.get("sequence_length"), int):
            raise ValueError("train.sequence_length is missing: the tokens of a row")
        for size in self.sizes:
            self._check_size(size)
        return self

    def _check_size(self, size: Size) -> None:
        """That the size makes a pretrain recipe, with anything for what is derived. Raises ValueError."""
        for where, section in (("train", self.train), (f"sizes.{size.name}.train", size.train)):
            for key in DERIVED:
                if key in section:
                    raise ValueError(
                        f"{where}.{key} follows from tokens_per_parameter and tokens_per_batch; leave it out"
                    )
        try:
            self.rung(size, steps=10**9)
        except ValidationError as error:
            raise ValueError(explain(f"size {size.name}", PretrainRecipe, error)) from None

    def rung(self, size: Size, steps: int, rule: dict[str, Any] | None = None) -> PretrainRecipe:
        """The pretrain recipe of one size; `rule` is what its compute chooses where the recipe does not.

        Raises ValidationError.
        """
        return PretrainRecipe.model_validate(self.rung_content(size, steps, rule or self.placeholder))

    @property
    def placeholder(self) -> dict[str, Any]:
        """Something for what the compute chooses."""
        return {"learning_rate": 1e-3, "tokens_per_batch": self.train["sequence_length"], "warmup_steps": 0}

    def rung_content(self, size: Size, steps: int, rule: dict[str, Any]) -> dict[str, Any]:
        """The pretrain recipe of one size as its file holds it: what this recipe says outright, nothing defaulted."""
        shared = self.model_dump(
            mode="json",
            exclude_unset=True,
            include={"registry", "processes", "dtype", "licence", "allowed_licences", "data", "tokenizer"},
        )
        return {
            "stage": "pretrain",
            "mode": "scratch",
            "publish": {"name": f"{self.publish.name}-{size.name}", "alias": self.publish.alias},
            "run_dir": f"{self.run_dir}/{size.name}",
            **shared,
            "registry": self.registry,
            "model": size.model.model_dump(mode="json", exclude_unset=True),
            "train": {**rule, **self.train, **size.train, "steps": steps},
        }
