"""The recipe of stage 1 and its sections: the tokenizer, the decoder's shape, where the weights come from."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from baton.bpe import RESERVED
from baton.corpus_sections import CorpusData
from baton.errors import UserError
from baton.recipe_base import TrainedRecipe
from baton.sizes import SIZES, Shape, learning_rate_of, shape_of, tokens_per_batch_of
from baton.strict import NonNegative, NonNegativeFloat, Positive, Strict
from baton.train_sections import TokenTrain

REWARM = 0.02
"""The share of a continued training's steps in which the learning rate rises again (Gupta et al. 2023: 1-2%)."""


class Tokenizer(Strict):
    """A byte-level BPE of `vocab_size` tokens, trained on `sample_bytes` of the mixture; or an existing one at `path`.

    `vocab_size` includes the bytes, the chat tokens and `reserved` spare ones for other chat templates. `path` is a
    folder, a hub id@revision or a version in the registry.
    """

    vocab_size: Annotated[int, Field(ge=300)] | None = None
    sample_bytes: Positive = 50_000_000
    reserved: NonNegative = RESERVED
    path: str | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.vocab_size is None) == (self.path is None):
            raise ValueError("give vocab_size, to train a tokenizer, or path, to take an existing one")
        ignored = sorted(self.model_fields_set & {"sample_bytes", "reserved"})
        if self.path is not None and ignored:
            raise ValueError(f"a tokenizer at path is taken as it is and would ignore {', '.join(ignored)}")
        return self


class Decoder(Strict):
    """A Llama: by `size`, of which single figures may be set otherwise, or by all the figures of its shape.

    A size (baton/sizes.py) also says `train.learning_rate` and `train.tokens_per_batch` where the recipe does not.
    """

    size: Literal["2M", "10M", "50M", "124M", "350M", "1B"] | None = None
    hidden_size: Positive | None = None
    layers: Positive | None = None
    heads: Positive | None = None
    kv_heads: Positive | None = None
    intermediate_size: Positive | None = None
    tie_embeddings: bool = True
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    @model_validator(mode="after")
    def _complete(self) -> Self:
        figures = ("hidden_size", "layers", "heads", "intermediate_size")
        missing = [name for name in figures if getattr(self, name) is None]
        if self.size is None and missing:
            raise ValueError(f"{', '.join(missing)} missing; give all of {', '.join(figures)}, or a size")
        if self.size is not None and not missing:
            raise ValueError(f"with {', '.join(figures)} given, size would be ignored; leave it out")
        if not missing:
            _check_heads(self.shape(0))
        return self

    def shape(self, vocabulary: int) -> Shape:
        """The shape of a decoder of `vocabulary` tokens. Raises UserError where size and given figures do not fit."""
        if self.size is None:
            assert self.hidden_size and self.layers and self.heads and self.intermediate_size
            kv_heads = self.kv_heads or self.heads
            return Shape(self.hidden_size, self.layers, self.heads, kv_heads, self.intermediate_size)
        found = shape_of(self.size, vocabulary, self.tie_embeddings)
        if self.hidden_size and not self.heads:  # heads of about 64
            per_group = found.heads // found.kv_heads
            heads = max(1, self.hidden_size // 64 // per_group) * per_group
            found = found._replace(heads=heads, kv_heads=heads // per_group)
        elif self.heads and not self.kv_heads:
            found = found._replace(kv_heads=self.heads)
        given = {name: value for name in Shape._fields if (value := getattr(self, name)) is not None}
        shape = found._replace(**given)
        try:
            _check_heads(shape)
        except ValueError as error:
            raise UserError(f"model.size: {self.size} with {given}: {error}") from None
        return shape


def _check_heads(shape: Shape) -> None:
    """Raises ValueError where the width is not an even multiple of the heads, or those not one of the key heads."""
    if shape.hidden_size % shape.heads or (shape.hidden_size // shape.heads) % 2:
        raise ValueError(f"hidden_size ({shape.hidden_size}) must be an even multiple of heads ({shape.heads})")
    if shape.heads % shape.kv_heads:
        raise ValueError(f"heads ({shape.heads}) must be a multiple of kv_heads ({shape.kv_heads})")


class PretrainTrain(TokenTrain):
    """Training on rows of text.

    `compile` (torch.compile): `auto` where a compiler is at hand and the training is long enough to pay for it.
    `z_loss` is the weight of the squared log of the softmax's normaliser (Chowdhery et al. 2022, section 5: 1e-4). With
    `ema` the weights' exponential moving average of that decay is what is measured and published.
    """

    compile: bool | Literal["auto"] = "auto"
    z_loss: NonNegativeFloat = 0.0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None


class PretrainRecipe(TrainedRecipe):
    """Stage 1, by `mode`: a decoder from `scratch`; to `continue` the training of a base; or to `load` one as it is.

    `continue` takes any base (a registry reference, a folder, a hub id@revision) with its own tokenizer. Sources with
    `replay: true` are general text, mixed in so that what the base knows is not lost (Ibrahim et al. 2024).
    """

    stage: Literal["pretrain"]
    mode: Literal["scratch", "continue", "load"]
    base: str | None = None
    data: CorpusData | None = None
    tokenizer: Tokenizer | None = None
    model: Decoder | None = None
    train: PretrainTrain | None = None
    ngram_order: Annotated[int, Field(ge=2, le=8)] | None = None
    continuations: NonNegative = 3

    @model_validator(mode="before")
    @classmethod
    def _by_size(cls, given: Any) -> Any:
        """Write out what size and mode say of the training, so that the recipe that is recorded has it in figures."""
        if not isinstance(given, dict):
            return given
        if given.get("mode") == "continue" and isinstance(given.get("train"), dict):
            steps = given["train"].get("steps")
            rewarm = {"warmup_steps": max(1, round(REWARM * steps))} if isinstance(steps, int) else {}
            given = {**given, "train": {**rewarm, **given["train"]}}
        model, train = given.get("model"), given.get("train")
        if isinstance(model, Decoder):
            model = model.model_dump(exclude_unset=True)
        size = model.get("size") if isinstance(model, dict) else None
        if size not in SIZES or not isinstance(train, dict):
            return given
        length = train.get("sequence_length")
        advised: dict[str, Any] = {"learning_rate": learning_rate_of(size)}
        if isinstance(length, int) and length > 0:
            advised["tokens_per_batch"] = tokens_per_batch_of(size, length)
        return {**given, "train": {**advised, **train}}

    @model_validator(mode="after")
    def _mode(self) -> Self:
        sections = {"data": self.data, "tokenizer": self.tokenizer, "model": self.model, "train": self.train}
        needed = {"scratch": list(sections), "continue": ["data", "train"], "load": []}[self.mode]
        missing = [key for key in needed if sections[key] is None]
        if missing:
            raise ValueError(f"mode: {self.mode} needs {', '.join(missing)}")
        ignored = [key for key, section in sections.items() if section is not None and key not in needed]
        if self.mode == "load":
            told = ("ngram_order", "continuations")
            ignored += [key for key in told if key in self.model_fields_set and getattr(self, key)]
        if self.mode == "scratch":
            if self.base is not None:
                raise ValueError(
                    "mode: scratch takes no base; to register an existing model, set mode: load; to train it further, "
                    "mode: continue"
                )
        elif self.base is None:
            kinds = "a local folder, a .gguf file or a hub id with @revision"
            raise ValueError(f"mode: {self.mode} needs base: {kinds}{' or a registry reference' * self.is_continued}")
        if ignored:
            why = "trains nothing" if self.mode == "load" else "takes the base's own tokenizer and shape"
            raise ValueError(f"mode: {self.mode} {why} and would ignore {', '.join(ignored)}")
        return self

    @model_validator(mode="after")
    def _measured(self) -> Self:
        data = self.data
        for key in ("ngram_order", "continuations"):
            if key in self.model_fields_set and getattr(self, key) and data is not None and not data.eval:
                reason = {"ngram_order": "the n-gram model is compared on held-out text"}.get(key, "they continue it")
                raise ValueError(f"{key} needs data.eval: {reason}")
        replayed = [source.path for source in data.train if source.replay] if data else []
        if replayed and not self.is_continued:
            raise ValueError(f"{replayed[0]}: replay is for mode: continue; from scratch all text is new")
        if data and replayed and len(replayed) == len(data.train):
            raise ValueError("every training source is replay: there is no text to continue on")
        return self

    @property
    def is_continued(self) -> bool:
        """Whether the training starts from a base's weights."""
        return self.mode == "continue"
