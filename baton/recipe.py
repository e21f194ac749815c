"""A recipe: one YAML file for one stage, read with OmegaConf, typed and strict, with dotted overrides and a digest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import Field, ValidationError, model_validator

from baton.errors import UserError, nearest
from baton.ladder_sections import LadderRecipe
from baton.ppo_sections import Algorithm, RewardSource, Rollout
from baton.pretrain_sections import Decoder, PretrainRecipe, Tokenizer
from baton.recipe_base import Publish, Recipe, Source, Stage, TextData, TrainedRecipe
from baton.strict import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Strict, explain
from baton.train_sections import PairTrain, TokenTrain, Train

__all__ = [
    "RECIPES",
    "Decoder",
    "EpisodeTrain",
    "LadderRecipe",
    "Lora",
    "PPORecipe",
    "PairData",
    "PairLoss",
    "PairTrain",
    "PretrainRecipe",
    "PromptData",
    "Publish",
    "Recipe",
    "RewardMeasures",
    "RewardRecipe",
    "SFTRecipe",
    "Source",
    "Stage",
    "TextData",
    "TokenTrain",
    "Tokenizer",
    "Train",
    "TrainedRecipe",
    "WorldRecipe",
    "load_recipe",
]

R = TypeVar("R", bound="Recipe")


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

    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    episodes_per_batch: Positive
    tokens_per_micro_batch: Positive = 2048
    critic_learning_rate: PositiveFloat | None = None
    eval_every: Positive | None = None
    keep: Annotated[int, Field(ge=1)] = 2

    @property
    def rows_per_batch(self) -> int:
        """Episodes of one optimizer batch on all processes together."""
        return self.episodes_per_batch


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
    """Low-rank adaptation (Hu et al. 2021): `r`, scaling `alpha / r`, and the linear layers that get it.

    `rank_stabilised`: scaling `alpha / sqrt r` (Kalajdzievski 2023). `dora`: the columns' norms are trained beside
    their directions (Liu et al. 2024).
    """

    r: Positive = 16
    alpha: Positive = 32
    dropout: Fraction = 0.0
    targets: Literal["all-linear"] | list[str] = "all-linear"
    dora: bool = False
    rank_stabilised: bool = False


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


class DialogueTrain(TokenTrain):
    """Training on dialogues: a batch is rows of `sequence_length` tokens, filled with whole dialogues by best fit.

    `packing` says how a batch is computed, not what it holds: its rows as they are, or each dialogue by itself in
    micro-batches of like length, at most `tokens_per_micro_batch` tokens, padding included. `auto`: apart on a CPU.
    A dialogue longer than a row loses its end, or with `on_long: drop` is left out.
    """

    packing: Literal["auto"] | bool = "auto"
    on_long: Literal["cut", "drop"] = "cut"


class SFTRecipe(TrainedRecipe):
    """Stage 2: training on dialogues, with the loss on the assistant's turns.

    `trained: adapter` trains a LoRA adapter, `full` every weight. `neftune_alpha`: noise on the embeddings while
    training (Jain et al. 2023). `quantise: nf4` holds the frozen base in four bits (Dettmers et al. 2023; CUDA only).
    """

    stage: Literal["sft"]
    base: str
    data: TextData
    trained: Literal["adapter", "full"] = "adapter"
    lora: Lora = Lora()
    quantise: Literal["nf4"] | None = None
    neftune_alpha: PositiveFloat | None = None
    chat_template: str = "chatml"
    train: DialogueTrain

    @model_validator(mode="after")
    def _read(self) -> Self:
        if self.trained == "full":
            ignored = ["lora"] if "lora" in self.model_fields_set else []
            ignored += ["quantise"] if self.quantise else []
            if ignored:
                raise ValueError(f"trained: full trains every weight and would ignore {', '.join(ignored)}")
        return self


class RewardRecipe(TrainedRecipe):
    """The reward model: SFT's adapter goes on as the reward's adapter, with a score head, on preference pairs.

    `trained: adapter` trains adapter and head, `full` every weight (with SFT's adapter merged in), `head` only the
    head. `lora` describes the new adapter on an SFT model that is no adapter. `ensemble` members differ by the order of
    their data and by their first head.
    """

    stage: Literal["reward"]
    sft: str
    trained: Literal["adapter", "full", "head"] = "adapter"
    lora: Lora | None = None
    ensemble: Positive = 1
    data: PairData
    loss: PairLoss = PairLoss()
    train: PairTrain
    measure: RewardMeasures = RewardMeasures()

    @model_validator(mode="after")
    def _read(self) -> Self:
        if self.trained == "full" and self.ensemble > 1:
            raise ValueError("an ensemble is adapters or heads on one base: trained: full has ensemble: 1")
        if self.trained == "full" and self.lora is not None:
            raise ValueError("trained: full trains every weight and would ignore lora")
        if self.lora is not None and (self.lora.dora or self.lora.dropout):
            raise ValueError("members share one base between plain LoRA adapters: leave lora.dora and lora.dropout out")
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
        if self.lora is not None and self.lora.dora:
            raise ValueError("PPO shares one base between plain LoRA adapters: dora is for stage sft, then merged")
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
    "ladder": LadderRecipe,
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
    except TypeError:  # merging a list with the mapping that sizes.1.name=x is
        raise UserError(
            f"{path}: an override cannot reach into a list; give the whole list, for example sizes=[…]"
        ) from None
    assert isinstance(content, dict)
    return {str(key): item for key, item in content.items()}
