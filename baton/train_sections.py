"""The `train:` sections of recipes: what every optimiser needs, and what the stages on transformers' Trainer add."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from baton.strict import Fraction, NonNegative, Positive, PositiveFloat, Strict


class Train(Strict):
    """What every optimised stage has in common; sizes are global, whatever the number of processes."""

    steps: Positive
    learning_rate: PositiveFloat
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    warmup_steps: NonNegative = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta2: Fraction = 0.999
    max_grad_norm: PositiveFloat = 1.0
    save_every: Positive = 100

    @property
    def rows_per_batch(self) -> int:
        """Rows, pairs or episodes of one optimizer batch on all processes together."""
        raise NotImplementedError


class GuardSettings(Strict):
    """When a training is held to diverge (baton/guard.py).

    A loss more than `spike_sigmas` robust deviations above the median of the last `window` ones, for `spike_steps` in a
    row, goes back to the last checkpoint, at most `max_rollbacks` times. A step whose loss or gradient is no number is
    not taken, at most `max_skipped` in a row.

    A single high loss is mostly the batch's own: a few rows of a rare, hard source, or one mislabelled pair.
    """

    spike_sigmas: PositiveFloat = 6.0
    spike_steps: Positive = 3
    window: Annotated[int, Field(ge=8)] = 64
    max_rollbacks: NonNegative = 3
    max_skipped: NonNegative = 10


class GuardedTrain(Train):
    """Training by transformers' Trainer.

    `schedule: wsd` (warm-up, stable, decay; Hu et al. 2024) falls over the last `decay_share` of the steps, by
    `decay_shape`; every schedule but `constant` ends at `final_share` of the learning rate. The last `keep` checkpoints
    are kept. `guard: null` trains without a guard: a loss that is no number then ends the run.
    """

    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    decay_share: Annotated[float, Field(gt=0, le=1)] | None = None
    decay_shape: Literal["sqrt", "linear"] | None = None
    final_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    log_every: Positive = 10
    keep: Positive = 2
    guard: GuardSettings | None = GuardSettings()

    @property
    def decay_steps(self) -> int:
        """Steps of wsd's decay: `decay_share` of them all, a fifth by default, at least one."""
        return max(1, round((0.2 if self.decay_share is None else self.decay_share) * self.steps))

    @model_validator(mode="after")
    def _scheduled(self) -> Self:
        given = [name for name in ("decay_share", "decay_shape") if getattr(self, name) is not None]
        if given and self.schedule != "wsd":
            raise ValueError(f"schedule: {self.schedule} would ignore {', '.join(given)}; they are of schedule: wsd")
        if self.final_share and self.schedule == "constant":
            raise ValueError("schedule: constant would ignore final_share: its learning rate does not fall")
        if self.schedule == "wsd" and self.warmup_steps + self.decay_steps > self.steps:
            raise ValueError(
                f"{self.warmup_steps} steps of warm-up and {self.decay_steps} of decay are more than {self.steps} "
                "steps; lower warmup_steps or decay_share"
            )
        return self


class TokenTrain(GuardedTrain):
    """Training on packed rows of `sequence_length` tokens."""

    tokens_per_batch: Positive
    tokens_per_micro_batch: Positive | None = None
    sequence_length: Positive

    @property
    def rows_per_batch(self) -> int:
        """Rows of one optimizer batch on all processes together."""
        return self.tokens_per_batch // self.sequence_length

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


class PairTrain(GuardedTrain):
    """Training on preference pairs; pairs with a side longer than `max_length` tokens are dropped and counted.

    A micro-batch holds pairs of like length, at most `tokens_per_micro_batch` tokens, padding included; with
    `share_prompt` a pair's prompt is computed once, where the base allows it. Every `eval_every` steps the held-out
    loss is measured and the best weights are kept; after `patience` measurements without a better one training ends.
    """

    pairs_per_batch: Positive
    tokens_per_micro_batch: Positive = 2048
    share_prompt: bool = True
    max_length: Positive
    eval_every: Positive | None = None
    patience: Positive | None = None

    @property
    def rows_per_batch(self) -> int:
        """Pairs of one optimizer batch on all processes together."""
        return self.pairs_per_batch

    @model_validator(mode="after")
    def _evaluations(self) -> Self:
        if self.patience is not None and self.eval_every is None:
            raise ValueError("patience counts evaluations: it needs eval_every")
        if self.eval_every is not None and self.eval_every > self.steps:
            raise ValueError("eval_every exceeds steps: nothing would be measured on the way")
        return self
