"""A recipe: one YAML file for one stage, read with OmegaConf, typed and strict, with dotted overrides and a digest."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from baton.errors import UserError, nearest
from baton.ppo_sections import Algorithm, RewardSource, Rollout
from baton.strict import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Strict, explain

Stage = Literal["world", "pretrain", "sft", "reward", "ppo"]
R = TypeVar("R", bound="Recipe")


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


class Train(Strict):
    """What every optimised stage has in common; sizes are global, whatever the number of processes."""

    steps: Positive
    learning_rate: PositiveFloat
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: NonNegative = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta2: Fraction = 0.999
    max_grad_norm: PositiveFloat = 1.0
    save_every: Positive = 100


class TokenTrain(Train):
    """Training on packed rows of `sequence_length` tokens."""

    log_every: Positive = 10
    tokens_per_batch: Positive
    tokens_per_micro_batch: Positive | None = None
    sequence_length: Positive

    @model_validator(mode="after")
    def _whole_rows(self) -> Self:
        rows = self.tokens_per_batch / self.sequence_length
        if rows != int(rows):
            raise ValueError(
                f"tokens_per_batch ({self.tokens_per_batch}) must be a multiple of sequence_length "
                f"({self.sequence_length})"
            )
        if self.tokens_per_micro_batch and self.tokens_per_micro_batch % self.sequence_length:
            raise ValueError(
                f"tokens_per_micro_batch ({self.tokens_per_micro_batch}) must be a multiple of sequence_length "
                f"({self.sequence_length})"
            )
        return self


class PairTrain(Train):
    """Training on preference pairs; pairs with a side longer than `max_length` tokens are dropped and counted.

    A micro-batch holds pairs of like length, at most `tokens_per_micro_batch` tokens, padding included; with
    `share_prompt` a pair's prompt is computed once, where the base allows it. Every `eval_every` steps the held-out
    loss is measured and the best weights are kept; after `patience` measurements without a better one training ends.
    """

    log_every: Positive = 10
    pairs_per_batch: Positive
    tokens_per_micro_batch: Positive = 2048
    share_prompt: bool = True
    max_length: Positive
    eval_every: Positive | None = None
    patience: Positive | None = None

    @model_validator(mode="after")
    def _evaluations(self) -> Self:
        if self.patience is not None and self.eval_every is None:
            raise ValueError("patience counts evaluations: it needs eval_every")
        if self.eval_every is not None and self.eval_every > self.steps:
            raise ValueError("eval_every exceeds steps: nothing would be measured on the way")
        return self


class PairLoss(Strict):
    """What is added to the Bradley-Terry loss of a pair (reward/losses.py)."""

    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    margin_weight: NonNegativeFloat = 0.0
    centring: NonNegativeFloat = 0.0


class RewardMeasures(Strict):
    """How much is measured of a trained reward model: each measure is a pass over texts that training did not see.

    `sft_samples` replies of the SFT model, of at most `max_new_tokens`, give the score's mean and deviation;
    `perturbed` held-out pairs, evenly taken, are scored again with every perturbation of either side.
    """

    sft_samples: NonNegative = 64
    max_new_tokens: Positive = 64
    perturbed: NonNegative = 64


class EpisodeTrain(Train):
    """PPO: `steps` rollouts of `episodes_per_batch` replies each; the critic may have its own learning rate.

    A micro-batch holds replies of like length, at most `tokens_per_micro_batch` real tokens of them; `eval_every` steps
    the policy is measured on held-out prompts, and the last `keep` checkpoints are kept.
    """

    episodes_per_batch: Positive
    tokens_per_micro_batch: Positive = 2048
    critic_learning_rate: PositiveFloat | None = None
    eval_every: Positive | None = None
    keep: Annotated[int, Field(ge=1)] = 2


class TextData(Strict):
    """Training and held-out text, and questions asked of the trained model."""

    train: Annotated[list[Source], Field(min_length=1)]
    eval: list[Source] = []
    questions: list[Source] = []


class PromptData(TextData):
    """PPO's prompts, and text or dialogues whose loss is mixed in (`ptx`)."""

    ptx: list[Source] = []


class PairData(Strict):
    """Training and held-out preference pairs.

    `repeated`: of a pair judged more than once the majority's one row (`vote`), every row (`keep`), or one row unless
    the judgements differ (`drop`). `leakage`: held-out prompts that are trained on too are an error (`refuse`), or
    left out of training (`drop`). `every_turn`: replies of several turns are compared after each of their turns.
    """

    train: Annotated[list[Source], Field(min_length=1)]
    eval: list[Source] = []
    repeated: Literal["vote", "keep", "drop"] = "vote"
    leakage: Literal["refuse", "drop"] = "refuse"
    every_turn: bool = False

    @model_validator(mode="after")
    def _has_held_out(self) -> Self:
        if self.leakage == "drop" and not self.eval:
            raise ValueError("leakage: drop needs data.eval: without held-out prompts it would be ignored")
        return self


class Lora(Strict):
    """Low-rank adaptation (Hu et al. 2021): `r`, scaling `alpha / r`, and the linear layers that get it."""

    r: Positive = 16
    alpha: Positive = 32
    dropout: Fraction = 0.0
    targets: Literal["all-linear"] | list[str] = "all-linear"


class Tokenizer(Strict):
    """A byte-level BPE trained on the training text; the chat tokens are part of `vocab_size`."""

    vocab_size: Annotated[int, Field(ge=300)]
    sample_bytes: Positive = 50_000_000


class Decoder(Strict):
    """A Llama by configuration."""

    hidden_size: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive | None = None
    intermediate_size: Positive
    tie_embeddings: bool = True
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be an even multiple of heads ({self.heads})")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        return self


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

    def digest(self) -> str:
        """sha256 of everything that can change the result: where it runs, is kept and may be refused is left out."""
        content = self.model_dump(mode="json", exclude={"registry", "run_dir", "processes", "allowed_licences"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class WorldRecipe(Recipe):
    """Stage 0 of recipes/micro: writes an invented world, whose truth is known, as JSONL files."""

    stage: Literal["world"]
    out: str
    seed: NonNegative = 0
    people: Positive
    text_only: Positive
    documents: Positive
    dialogues: Positive = 4000
    preferences: Positive = 2000
    prompts: Positive = 800
    unknown_share: Fraction = 0.2
    guess_share: Fraction = 0.5


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
        train: Any = getattr(self, "train", None)
        if isinstance(train, TokenTrain):
            return train.tokens_per_batch // train.sequence_length
        if isinstance(train, PairTrain):
            return train.pairs_per_batch
        return train.episodes_per_batch if train else 0


class PretrainRecipe(TrainedRecipe):
    """Stage 1: a decoder from scratch (`mode: scratch`), or registering an existing base (`mode: load`)."""

    stage: Literal["pretrain"]
    mode: Literal["scratch", "load"]
    base: str | None = None
    data: TextData | None = None
    tokenizer: Tokenizer | None = None
    model: Decoder | None = None
    train: TokenTrain | None = None
    ngram_order: Annotated[int, Field(ge=2, le=8)] | None = None

    @model_validator(mode="after")
    def _mode(self) -> Self:
        scratch = {"data": self.data, "tokenizer": self.tokenizer, "model": self.model, "train": self.train}
        if self.mode == "scratch":
            missing = [key for key, section in scratch.items() if section is None]
            if missing:
                raise ValueError(f"mode: scratch needs {', '.join(missing)}")
            if self.base is not None:
                raise ValueError("mode: scratch takes no base; to register an existing model, set mode: load")
            if self.ngram_order and self.data and not self.data.eval:
                raise ValueError("ngram_order needs data.eval: the n-gram model is compared on held-out text")
        else:
            if self.base is None:
                raise ValueError("mode: load needs base: a local folder, a .gguf file or a hub id with @revision")
            ignored = [key for key, section in scratch.items() if section is not None]
            if self.ngram_order:
                ignored.append("ngram_order")
            if ignored:
                raise ValueError(f"mode: load trains nothing and would ignore {', '.join(ignored)}")
        return self


class SFTRecipe(TrainedRecipe):
    """Stage 2: a LoRA adapter trained on dialogues, with the loss on the assistant's turns."""

    stage: Literal["sft"]
    base: str
    data: TextData
    lora: Lora = Lora()
    chat_template: str = "chatml"
    train: TokenTrain


class RewardRecipe(TrainedRecipe):
    """The reward model: SFT's adapter goes on as the reward's adapter, with a score head, on preference pairs.

    `trained: adapter` trains adapter and head, `full` every weight (with SFT's adapter merged in), `head` only the
    head. `ensemble` members differ by the order of their data and by their first head.
    """

    stage: Literal["reward"]
    sft: str
    trained: Literal["adapter", "full", "head"] = "adapter"
    ensemble: Positive = 1
    data: PairData
    loss: PairLoss = PairLoss()
    train: PairTrain
    measure: RewardMeasures = RewardMeasures()

    @model_validator(mode="after")
    def _read(self) -> Self:
        if self.trained == "full" and self.ensemble > 1:
            raise ValueError("an ensemble is adapters or heads on one base: trained: full has ensemble: 1")
        if self.train.eval_every and not self.data.eval:
            raise ValueError("train.eval_every needs data.eval: held-out pairs to measure on")
        return self


class PPORecipe(TrainedRecipe):
    """Stage 3: the policy, which starts as SFT's model, is optimised against rewards by PPO.

    `policy: adapter` trains a LoRA adapter, SFT's own or, on a merged or base model, a new one by `lora`;
    `policy: full` trains every weight. `reward` is a reference, or a list of weighted rewards; `gold` is only measured.
    """

    stage: Literal["ppo"]
    sft: str
    reward: str | Annotated[list[RewardSource], Field(min_length=1)]
    gold: RewardSource | None = None
    policy: Literal["adapter", "full"] = "adapter"
    lora: Lora | None = None
    data: PromptData
    rollout: Rollout
    ppo: Algorithm = Algorithm()
    train: EpisodeTrain
    publish_value: Publish | None = None
    samples: NonNegative = 3
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []

    @model_validator(mode="after")
    def _read(self) -> Self:
        labels = [source.label for source in self.rewards]
        if len(set(labels)) < len(labels):
            raise ValueError(f"two rewards are both called {max(labels, key=labels.count)}; give them a name each")
        if bool(self.data.ptx) != bool(self.ppo.ptx_coefficient):
            raise ValueError("data.ptx and ppo.ptx_coefficient need each other: one of them would be ignored")
        if self.policy == "full" and self.ppo.critic == "shared" and self.publish_value is not None:
            raise ValueError(
                "the critic of policy: full, critic: shared has no weights of its own; leave publish_value out"
            )
        if self.policy == "full" and self.rollout.engine == "vllm":
            raise ValueError("engine: vllm takes the policy as an adapter; policy: full needs another engine")
        if self.ppo.critic_warmup_steps >= self.train.steps:
            raise ValueError("ppo.critic_warmup_steps must be below train.steps: the policy would never be trained")
        if self.gold is not None and (self.gold.name or "weight" in self.gold.model_fields_set):
            raise ValueError("gold is one reward that is only measured: name and weight would be ignored")
        if self.ppo.overlong_tokens is not None and self.ppo.overlong_tokens > self.rollout.max_new_tokens:
            raise ValueError("ppo.overlong_tokens exceeds rollout.max_new_tokens: every reply would be overlong")
        if self.lora is not None and self.lora.dropout:
            raise ValueError("PPO trains without dropout: old and new log-probabilities must come from one function")
        if self.policy == "full" and self.lora is not None:
            raise ValueError("policy: full trains every weight and would ignore lora")
        if self.train.eval_every and not self.data.eval:
            raise ValueError("train.eval_every needs data.eval: held-out prompts to measure on")
        if self.gold is not None and not self.data.eval:
            raise ValueError("gold is measured on held-out prompts: it needs data.eval")
        if self.train.eval_every is not None and self.train.eval_every > self.train.steps:
            raise ValueError("train.eval_every exceeds train.steps: nothing would be measured on the way")
        return self

    @property
    def rewards(self) -> list[RewardSource]:
        """The rewards as a list, however they were written."""
        return [RewardSource(model=self.reward)] if isinstance(self.reward, str) else list(self.reward)


RECIPES: dict[str, type[Recipe]] = {
    "world": WorldRecipe,
    "pretrain": PretrainRecipe,
    "sft": SFTRecipe,
    "reward": RewardRecipe,
    "ppo": PPORecipe,
}


def load_recipe(path: str | Path, overrides: list[str] | None = None, kind: type[R] = Recipe) -> R:  # type: ignore[assignment]
    """Read `path`, apply dotted `key=value` overrides, validate.

    `kind` is the recipe class that the calling program expects; a file for another stage is refused. Raises UserError
    that names the file, the key and, for an unknown key, the nearest valid one.
    """
    path = Path(path)
    content = _read_yaml(path, overrides or [])
    stage = content.get("stage")
    if not isinstance(stage, str) or stage not in RECIPES:
        raise UserError(f"{path}: stage is {stage!r}; expected one of {', '.join(get_args(Stage))}")
    model = RECIPES[stage]
    if not issubclass(model, kind):
        wanted = next(name for name, cls in RECIPES.items() if cls is kind)
        raise UserError(f"{path} is a recipe for stage {stage}; this program runs stage {wanted}.")
    try:
        recipe = model.model_validate(content)
    except ValidationError as error:
        raise UserError(explain(str(path), model, error)) from None
    recipe._path = path
    return recipe  # type: ignore[return-value]


def _read_yaml(path: Path, overrides: list[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not path.is_file():
        siblings = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        near = nearest(str(path), siblings) or siblings[:5]
        raise UserError(f"no recipe at {path}" + (f"; there is {', '.join(near)}" if near else ""))
    for override in overrides:
        if "=" not in override or override.startswith(("=", "-")):
            raise UserError(f"override {override!r} is not key=value, for example train.steps=10")
    try:
        config = OmegaConf.load(path)
        if not OmegaConf.is_dict(config):
            raise UserError(f"{path} holds no keys; a recipe is a YAML mapping that begins with stage: …")
        merged = OmegaConf.merge(config, OmegaConf.from_dotlist(overrides))
        content = OmegaConf.to_container(merged, resolve=True)
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    except (OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path}: {error}") from None
    assert isinstance(content, dict)
    return {str(key): item for key, item in content.items()}
