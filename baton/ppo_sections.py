"""The sections of a PPO recipe: where rewards come from, how replies are sampled, and the algorithm's settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from baton.strict import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Strict


class RewardSource(Strict):
    """One reward: exactly one of `model`, `models`, `classifier`, `function` and `url` says where it comes from.

    `model` is a reward model of the registry, one or an ensemble; `models` several versions that are an ensemble
    together; `classifier` a Hugging Face sequence classifier with one label (a local folder, or a hub id with
    @revision); `function` a Python callable `pkg.module:function`; `url` an HTTP endpoint.

    On the way to PPO a score is, in this order: freed of length (`length_penalty`), measured against the reply of SFT's
    model to the same prompt (`shape`), brought to the scale that the reward's training recorded (`normalise`), all of
    it for each member of an ensemble; then combined over members as mean − `deviation_penalty` × deviation; then
    multiplied by `weight`. Rewards are added up, and logged by themselves under `name`.
    """

    model: str | None = None
    models: Annotated[list[str], Field(min_length=2)] | None = None
    classifier: str | None = None
    function: str | None = None
    url: str | None = None
    name: str | None = None
    weight: float = 1.0
    deviation_penalty: NonNegativeFloat | None = None
    length_penalty: NonNegativeFloat | Literal["fitted"] | None = None
    shape: Literal["reference"] | None = None
    normalise: Literal["sft"] | None = None
    arguments: dict[str, Any] = {}
    batch_size: Positive | None = None
    timeout_s: PositiveFloat | None = None
    retries: NonNegative | None = None
    token_env: str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        origins = {key: getattr(self, key) for key in ("model", "models", "classifier", "function", "url")}
        given = [key for key, origin in origins.items() if origin is not None]
        if len(given) != 1:
            raise ValueError(f"a reward needs exactly one of {', '.join(origins)}; found {', '.join(given) or 'none'}")
        if self.arguments and self.function is None:
            raise ValueError("arguments are for a function; a model, a classifier and a url take none")
        if self.url is None and (self.timeout_s is not None or self.retries is not None):
            raise ValueError("timeout_s and retries are for a url; nothing else would read them")
        if self.token_env is not None and (self.url is None or not self.token_env.isidentifier()):
            raise ValueError("token_env names the environment variable that holds the token of a url's server")
        if self.batch_size is not None and self.url is None and self.function is None:
            raise ValueError("batch_size is for a url or a function; train.tokens_per_micro_batch batches models")
        if len(set(self.models or [])) < len(self.models or []):
            raise ValueError("models names a version twice: it would agree with itself")
        return self

    @model_validator(mode="after")
    def _shaping(self) -> Self:
        if not self.references:
            if self.deviation_penalty is not None:
                raise ValueError("deviation_penalty is for an ensemble: a model with members, or several models")
            if self.normalise is not None:
                raise ValueError("normalise: sft reads what a reward's training recorded: it needs model or models")
            if self.length_penalty == "fitted":
                raise ValueError("length_penalty: fitted reads a reward model's records; here give a number per token")
        is_bonus = bool(self.deviation_penalty) or (self.length_penalty not in (None, "fitted", 0.0))
        if self.weight < 0 and is_bonus:
            raise ValueError("a penalty of a reward with a negative weight would be a bonus; leave one of them out")
        return self

    @property
    def references(self) -> list[str]:
        """The registry versions that it scores with; none where it comes from elsewhere."""
        return [self.model] if self.model is not None else list(self.models or [])

    @property
    def label(self) -> str:
        """How the reward is called in metrics: its name, or the last part of where it comes from."""
        if self.name:
            return self.name
        if self.models:
            return "ensemble"
        if self.function:
            return self.function.rpartition(":")[2]
        if self.url:
            return self.url.rstrip("/").rpartition("/")[2]
        return (self.model or self.classifier or "").partition("@")[0].rstrip("/").rpartition("/")[2].partition(":")[0]


class Rollout(Strict):
    """How replies are sampled: plain softmax at `temperature`, no top-k or top-p (the trained distribution).

    `rows` replies are in the making at a time. `importance_cap` weighs each token by the trainer's probability over
    the engine's, at most the cap (truncated importance sampling); it is for engines whose numerics differ.
    A run stops where engine and trainer differ by more than `drift_nats` a token on average; unset, the number format
    decides.
    """

    max_prompt_tokens: Positive = 512
    max_new_tokens: Positive
    temperature: PositiveFloat = 1.0
    engine: Literal["built-in", "transformers", "vllm"] = "built-in"
    rows: Positive = 64
    url: str | None = None
    importance_cap: PositiveFloat | None = None
    drift_nats: PositiveFloat | None = None

    @model_validator(mode="after")
    def _server(self) -> Self:
        if (self.engine == "vllm") != (self.url is not None):
            raise ValueError("url is the address of a vLLM server: engine: vllm needs it, and no other engine reads it")
        return self


class Algorithm(Strict):
    """PPO's settings (Schulman et al. 2017; Huang et al. 2024 for language models)."""

    epochs: Positive = 4
    minibatches: Positive = 1
    critic: Literal["adapter", "shared", "separate"] = "adapter"
    critic_warmup_steps: NonNegative = 0

    kl_coefficient: NonNegativeFloat = 0.05
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_target_nats: PositiveFloat | None = None
    kl_horizon_episodes: Positive = 10_000
    kl_budget_nats: PositiveFloat | None = None
    kl_minibatch_stop_nats: PositiveFloat | None = None

    clip_ratio: PositiveFloat = 0.2
    clip_ratio_high: PositiveFloat | None = None
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    clip_value: PositiveFloat = 0.2
    value_coefficient: PositiveFloat = 0.1
    entropy_coefficient: NonNegativeFloat = 0.0
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    whiten_advantages: bool = True

    normalise_reward: bool = False
    clip_reward: PositiveFloat | None = None
    missing_eos: Literal["subtract", "replace"] = "subtract"
    missing_eos_penalty: float = 1.0
    overlong_tokens: Positive | None = None
    overlong_penalty: NonNegativeFloat = 1.0
    score_after_eos: bool = False
    ptx_coefficient: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _read(self) -> Self:
        if self.missing_eos == "subtract" and self.missing_eos_penalty < 0:
            raise ValueError("missing_eos_penalty is subtracted: a negative one would reward replies that never end")
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError("kl_in: loss needs kl_estimator k2 or k3: the gradient of k1 is zero in expectation")
        if self.kl_target_nats is not None and not self.kl_coefficient:
            raise ValueError("kl_target_nats adapts kl_coefficient, which must not be zero then")
        if self.kl_in == "loss" and not self.kl_coefficient:
            raise ValueError("kl_in: loss with kl_coefficient: 0 would have no KL anywhere; give it a coefficient")
        if "overlong_penalty" in self.model_fields_set and self.overlong_tokens is None:
            raise ValueError("overlong_penalty needs overlong_tokens: how many tokens before the limit it grows over")
        if "kl_horizon_episodes" in self.model_fields_set and self.kl_target_nats is None:
            raise ValueError("kl_horizon_episodes is for an adaptive coefficient: set kl_target_nats, or leave it out")
        if self.clip_ratio_high is not None and self.clip_ratio_high < self.clip_ratio:
            raise ValueError("clip_ratio_high bounds the ratio from above and must not be below clip_ratio")
        return self
