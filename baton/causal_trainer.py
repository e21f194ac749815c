"""transformers' Trainer for next-token training: narrow copies of float32 weights, a loss without logits, averages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from baton.attention import NAME as SHORT_ATTENTION
from baton.attention import choose_attention
from baton.document_borders import choose_document_attention, collator
from baton.output_head import head_makes_logits
from baton.packing import IGNORED
from baton.pretrain_sections import PretrainTrain
from baton.run import Run
from baton.throughput import flops_per_token, matrix_rate
from baton.token_loss import token_loss
from baton.training import GuardedTrainer, Recorder, on_one_device, trainer_settings

AVERAGED = "averaged.safetensors"

WORTH_COMPILING = 3e14
"""`compile: auto` compiles trainings of at least so many FLOPs: some minutes on a CPU, of which compiling takes one."""


ACTIVATIONS = 8 << 30
"""Bytes that a micro-batch's activations may take where the recipe does not say: the same everywhere, as gradients that
are added up otherwise are rounded otherwise."""


def micro_batch_tokens(config: Any, train: PretrainTrain, dtype: torch.dtype, num_processes: int) -> int:
    """Tokens of a micro-batch: the recipe's, or those of a process's share whose activations fit into ACTIVATIONS.

    34 bytes a layer, unit of width and token in 16 bits (Korthikanti et al. 2022, equation 1; scores are not kept).
    """
    if train.tokens_per_micro_batch:
        return train.tokens_per_micro_batch
    text = config.get_text_config()
    per_row = 17 * dtype.itemsize * text.hidden_size * text.num_hidden_layers * train.sequence_length
    return min(max(1, ACTIVATIONS // per_row) * train.sequence_length, train.tokens_per_batch // num_processes)


class CausalTrainer(GuardedTrainer):
    """Trains every weight of a causal language model on packed rows.

    Weights, moments and gradients are float32. In bfloat16 each forward pass works on copies of the weights, made once,
    so that activations are bfloat16 from end to end: autocast would cast at every use and keep activations wide.
    """

    def __init__(
        self, run: Run[Any], model: Any, train: PretrainTrain, rows: Any, skipped: tuple[int, ...] = ()
    ) -> None:
        """`rows`: the data set in training order, without the batches `skipped`."""
        length = train.sequence_length
        self.attention = model.config._attn_implementation
        choose_row_attention(model, length, run.state.device)
        micro = micro_batch_tokens(model.config, train, run.dtype, run.state.num_processes) // length
        settings = trainer_settings(run, train, train.rows_per_batch, micro)
        per_token = flops_per_token(model, length)
        peak = matrix_rate(run.state.device, run.dtype) * run.state.num_processes if run.is_main else 1.0
        narrow = run.dtype if run.dtype is not torch.float32 else None
        if narrow is not None:
            settings["bf16"] = False  # no autocast: the copies have the format already
        is_compiled = compiles(train.compile, per_token * train.steps * train.tokens_per_batch, run.state.device)
        self.training_loss = TrainingLoss(model, narrow, train.z_loss, is_compiled)
        super().__init__(
            model=model,
            args=on_one_device(TrainingArguments(**settings)),
            train_dataset=rows,
            data_collator=collator(model),
            callbacks=[
                Recorder(
                    run,
                    "pretrain",
                    train.tokens_per_batch,
                    "tokens",
                    lambda rate: {"mfu": round(rate * per_token / peak, 4)},
                )
            ],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # so that it counts the batch's tokens for `compute_loss`
        self.average = Average(model, train.ema) if train.ema else None
        if self.average is not None:
            self.add_callback(_Averaging(self))
        self.watch(run, skipped=skipped)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's part of the batch's mean loss (with z-loss)."""
        assert not return_outputs and num_items_in_batch is not None
        # the gradients of processes are averaged, and the count is of them all
        return model(**inputs) * (self.args.world_size / num_items_in_batch)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """As GuardedTrainer's; the model's own forward and attention are back afterwards."""
        with self.training_loss:
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self.training_loss.model.config._attn_implementation = self.attention  # the trained one knows whole rows alone
        return output

    def extra_files(self) -> dict[str, Any]:
        """The averaged weights."""
        return {AVERAGED: self.average.tensors} if self.average else {}

    def load_extra_files(self, checkpoint: Path) -> None:
        """Put them back."""
        if self.average is not None:
            self.average.load(load_file(checkpoint / AVERAGED))


class TrainingLoss:
    """In a `with`, calling the model gives its summed loss: model(input_ids=, position_ids=, labels=) -> ().

    So that DistributedDataParallel and its like, which know a model's forward alone, see an ordinary model.
    """

    def __init__(self, model: Any, narrow: torch.dtype | None, z: float, is_compiled: bool) -> None:
        """`narrow`: the number format to compute in, of copies of the weights; None: as they are."""
        self.model, self.narrow, self.z = model, narrow, z
        self.decoder = getattr(model, model.base_model_prefix)
        self.head = model.get_output_embeddings()
        self.is_plain = has_plain_head(model)
        self.needs_table = model.config._attn_implementation == SHORT_ATTENTION
        self.states: Callable[..., torch.Tensor] = self._states
        if is_compiled:
            self.states = torch.compile(self._states, dynamic=False)

    def __enter__(self) -> TrainingLoss:
        self.model.forward = self.forward
        return self

    def __exit__(self, *_: object) -> None:
        del self.model.forward  # the class's own

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor, **borders: Any
    ) -> torch.Tensor:
        """input_ids, position_ids, labels (B, L); labels stand at their own tokens' places."""
        given = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False, **borders}
        targets = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], 1).flatten()
        copies = self._copies()
        if self.needs_table:
            given["attention_mask"] = document_table(position_ids, self.narrow or self.decoder.dtype)
        if not self.is_plain:
            return self._loss_of_logits(self._logits(copies, given).flatten(0, 1), targets)
        prefix = self.model.base_model_prefix + "."
        own = {name.removeprefix(prefix): copy for name, copy in copies.items() if name.startswith(prefix)}
        hidden = self.states(own, given).flatten(0, 1)
        weight = next(copies[name] for name, p in self.model.named_parameters() if p is self.head.weight)
        return token_loss(hidden, weight.to(hidden.dtype), targets, self.z).loss

    def _copies(self) -> dict[str, torch.Tensor]:
        named = self.model.named_parameters()
        return {name: p if self.narrow is None else p.to(self.narrow) for name, p in named}

    def _states(self, copies: dict[str, torch.Tensor], given: dict[str, Any]) -> torch.Tensor:
        """(B, L, H)"""
        found = functional_call(self.decoder, copies, kwargs=given).last_hidden_state  # type: ignore[attr-defined]
        assert isinstance(found, torch.Tensor)
        return found

    def _logits(self, copies: dict[str, torch.Tensor], given: dict[str, Any]) -> torch.Tensor:
        """(B, L, V) by the model's own forward."""
        del self.model.forward
        try:
            found = functional_call(self.model, copies, kwargs=given).logits  # type: ignore[attr-defined]
        finally:
            self.model.forward = self.forward
        assert isinstance(found, torch.Tensor)
        return found

    def _loss_of_logits(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        scores = logits.float()
        loss = torch.nn.functional.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="sum")
        if self.z:
            loss = loss + self.z * scores.logsumexp(-1)[targets != IGNORED].square().sum()
        return loss


class Average:
    """An exponential moving average of a model's weights (Polyak and Juditsky 1992; Izmailov et al. 2018), float32.

    The decay begins low, min(decay, (1 + t) / (10 + t)) after t steps, or the random start would weigh for long.
    """

    def __init__(self, model: Any, decay: float) -> None:
        self.decay = decay
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.tensors = {name: p.detach().float().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the weights after `steps` steps."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        weights = [p.detach().float() for p in self._weights.values()]
        torch._foreach_lerp_(list(self.tensors.values()), weights, 1.0 - decay)

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from `tensors`."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def write_to_model(self) -> None:
        """The average takes the weights' place."""
        for name, p in self._weights.items():
            p.copy_(self.tensors[name])


class _Averaging(TrainerCallback):
    def __init__(self, trainer: CausalTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.took_step and self.trainer.average is not None:
            self.trainer.average.update(state.global_step)


def choose_row_attention(model: Any, length: int, device: torch.device) -> None:
    """The attention that suits packed rows of `length` tokens and stops at documents' borders."""
    if device.type == "cpu":
        choose_attention(model, length)
    if model.config._attn_implementation != SHORT_ATTENTION:
        choose_document_attention(model, length)


def document_table(position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, L, L): 0 where a token sees another of its own document, up to itself; minus infinity elsewhere."""
    documents = (position_ids == 0).cumsum(1)
    sees = (documents[:, :, None] == documents[:, None, :]).tril()
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, -torch.inf)[:, None]


def has_plain_head(model: Any) -> bool:
    """Whether the model's logits are what its head, without bias, makes of the decoder's last states."""
    return getattr(model.get_output_embeddings(), "bias", None) is None and head_makes_logits(model)


def compiles(setting: bool | str, flops: float, device: torch.device) -> bool:
    """Whether to compile a training of so many FLOPs."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return False
    if setting != "auto":
        return bool(setting)
    has_compiler = device.type != "cpu" or any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return has_compiler and flops >= WORTH_COMPILING
