"""What the stages that use transformers' Trainer share: its arguments from a recipe, recording, the mean loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from baton.checkpoints import COMPLETE, drop_incomplete, mark_complete
from baton.guarded_trainer import GuardedTrainer, Guarding, train_guarded
from baton.packing import IGNORED, collate
from baton.progress import Progress
from baton.run import Run
from baton.train_sections import GuardedTrain

__all__ = [
    "GuardedTrainer",
    "Guarding",
    "Recorder",
    "drop_incomplete",
    "mean_loss",
    "on_one_device",
    "train_guarded",
    "trainer_settings",
]


AnyArguments = TypeVar("AnyArguments", bound=TrainingArguments)

NAMES = ("loss", "grad_norm", "learning_rate", "skipped_steps", "accuracy", "margin", "mean_token_accuracy", "entropy")
"""What of the Trainer's own figures goes into a line of metrics.jsonl."""


def trainer_settings(
    run: Run[Any], train: GuardedTrain, rows_per_batch: int, rows_per_micro_batch: int
) -> dict[str, Any]:
    """Keyword arguments for TrainingArguments and its TRL subclasses.

    `rows_per_batch` is global: it is split over processes and accumulation steps so that the optimizer sees the same
    batch whatever their number; `Run.start` has checked that they divide it.
    """
    per_process = rows_per_batch // run.state.num_processes
    micro = max(size for size in range(1, min(rows_per_micro_batch, per_process) + 1) if per_process % size == 0)

    use_cpu = run.state.device.type == "cpu"
    return {
        "output_dir": str(run.checkpoints),
        "max_steps": train.steps,
        "learning_rate": train.learning_rate,
        **schedule_settings(train),
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": "adamw_torch_fused",
        "adam_beta2": train.adam_beta2,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": per_process // micro,
        "seed": train.seed,
        "logging_steps": train.log_every,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": train.save_every,
        "save_total_limit": None,  # the old ones are deleted once the new one is whole: baton/checkpoints.py
        "bf16": run.dtype is torch.bfloat16,
        "use_cpu": use_cpu,
        "dataloader_pin_memory": not use_cpu,
        "train_sampling_strategy": "sequential",  # the order is made by baton.schedule
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        _recomputation_setting(): False,
        "ddp_find_unused_parameters": False,
    }


def on_one_device(arguments: AnyArguments) -> AnyArguments:
    """`arguments` of a Trainer that leaves a machine's other GPUs alone: more of them take more processes.

    By itself a single process would split each batch over all GPUs (DataParallel), and count it several times.
    """
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def schedule_settings(train: GuardedTrain) -> dict[str, Any]:
    """The Trainer's names for a recipe's schedule.

    A floor (`final_share`) of `linear` is a polynomial of the first degree. wsd's decay by `1 - sqrt` of its progress
    was the best shape of those that Hägele et al. 2024 compared.
    """
    floor: dict[str, Any] = {}
    name: str = train.schedule
    if train.schedule == "constant":
        name = "constant_with_warmup"
    elif train.schedule == "wsd":
        name = "warmup_stable_decay"
        shape = {"linear": "linear", "sqrt": "1-sqrt"}[train.decay_shape or "sqrt"]
        floor = {"num_decay_steps": train.decay_steps, "decay_type": shape, "min_lr_ratio": train.final_share}
    elif train.final_share and train.schedule == "cosine":
        name, floor = "cosine_with_min_lr", {"min_lr_rate": train.final_share}
    elif train.final_share:
        name, floor = "polynomial", {"power": 1.0, "lr_end": train.final_share * train.learning_rate}
    return {"lr_scheduler_type": name, "lr_scheduler_kwargs": floor, "warmup_steps": train.warmup_steps}


def _recomputation_setting() -> str:
    """Trainer's name for activation recomputation, which TRL would switch on: renamed in transformers 5."""
    names = {field.name for field in fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


class Recorder(TrainerCallback):
    """Writes metrics.jsonl and draws the progress line."""

    def __init__(
        self,
        run: Run[Any],
        label: str,
        units_per_step: float,
        unit: str,
        figures: Callable[[float], dict[str, float]] | None = None,
    ) -> None:
        """`figures`: more of each line, given how many units a second there were since the line before."""
        self.run, self.label, self.units_per_step, self.unit, self.more = run, label, units_per_step, unit, figures
        self._progress: Progress | None = None
        self._figures: dict[str, float] = {}
        self._began = self._last = (0.0, 0)  # clock and step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.run.trim_metrics(state.global_step)
        self._progress = Progress(self.label, state.max_steps, self.unit, state.global_step, shown=self.run.is_main)
        self._progress.__enter__()
        self._began = self._last = (time.monotonic(), state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self._progress is not None
        self._progress.update(state.global_step, self.units_per_step, self._figures)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "loss" not in logs and "skipped_steps" not in logs:
            return
        if not math.isfinite(logs.get("loss", 0.0)):  # a Trainer that nobody guards
            raise FloatingPointError(
                f"the loss is {logs['loss']} at step {state.global_step}; lower train.learning_rate or look at "
                "the data "
                f"(the last complete checkpoint in {self.run.checkpoints} is untouched)"
            )
        row = {name: logs[name] for name in NAMES if name in logs} | self._pace(state)
        self._figures = {name: row[name] for name in ("loss", "grad_norm", "mfu") if name in row}
        self.run.log(state.global_step, row)

    def _pace(self, state: TrainerState) -> dict[str, float]:
        """Units a second since the line before, what that makes, and how long the rest will take."""
        now, step = time.monotonic(), state.global_step
        rate = (step - self._last[1]) * self.units_per_step / max(now - self._last[0], 1e-9)
        left = (now - self._began[0]) / max(step - self._began[1], 1) * (state.max_steps - step)
        self._last = (now, step)
        more = self.more(rate) if self.more else {}
        return {f"{self.unit}_per_s": round(rate, 1), **more, "time_left_s": round(left, 1)}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # a Trainer that nobody guards writes a checkpoint in place: only this mark, which comes last, says it is whole
        checkpoint = self.run.checkpoints / f"checkpoint-{state.global_step}"
        if self.run.is_main and checkpoint.is_dir() and not (checkpoint / COMPLETE).exists():
            mark_complete(checkpoint)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._progress is not None:
            self._progress.__exit__(None, None, None)


@torch.no_grad()
def mean_loss(model: Any, rows: list[dict[str, list[int]]], rows_at_once: int, dtype: torch.dtype) -> tuple[float, int]:
    """(nats a token, tokens) of packed `rows` under `model`; sums over all tokens in the loss, so batching is exact."""
    total, count = 0.0, 0
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    for start in range(0, len(rows), rows_at_once):
        batch = {key: item.to(device) for key, item in collate(rows[start : start + rows_at_once]).items()}
        labels = batch.pop("labels")[:, 1:]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            logits = model(**batch, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        total += float(losses)
        count += int((labels != IGNORED).sum())
    model.train(was_training)
    return total / max(count, 1), count
