"""What the stages that use transformers' Trainer share: its arguments from a recipe, recording, checkpoints, losses."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from baton.packing import IGNORED, collate
from baton.progress import Progress
from baton.recipe import PairTrain, TokenTrain
from baton.run import Run


def trainer_settings(
    run: Run[Any], train: TokenTrain | PairTrain, rows_per_batch: int, rows_per_micro_batch: int
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
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(train.schedule, train.schedule),
        "warmup_steps": train.warmup_steps,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "adam_beta2": train.adam_beta2,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": per_process // micro,
        "seed": train.seed,
        "logging_steps": train.log_every,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": train.save_every,
        "save_total_limit": 2,
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


def _recomputation_setting() -> str:
    """Trainer's name for activation recomputation, which TRL would switch on: renamed in transformers 5."""
    names = {field.name for field in fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


class Recorder(TrainerCallback):
    """Writes metrics.jsonl, draws the progress line, marks complete checkpoints, stops at a loss that is no number."""

    def __init__(self, run: Run[Any], label: str, units_per_step: float, unit: str) -> None:
        self.run, self.label, self.units_per_step, self.unit = run, label, units_per_step, unit
        self._progress: Progress | None = None
        self._figures: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.run.trim_metrics(state.global_step)
        self._progress = Progress(self.label, state.max_steps, self.unit, state.global_step, shown=self.run.is_main)
        self._progress.__enter__()

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
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"the loss is {logs['loss']} at step {state.global_step}; lower train.learning_rate or look at "
                "the data "
                f"(the last complete checkpoint in {self.run.checkpoints} is untouched)"
            )
        names = ("loss", "grad_norm", "learning_rate", "accuracy", "margin", "mean_token_accuracy", "entropy")
        self._figures = {"loss": logs["loss"]}
        self.run.log(state.global_step, {name: logs[name] for name in names if name in logs})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # the Trainer writes a checkpoint in place: only this mark, which comes last, says that it is whole
        if self.run.is_main:
            mark_complete(self.run.checkpoints / f"checkpoint-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._progress is not None:
            self._progress.__exit__(None, None, None)


def mark_complete(checkpoint: Path) -> None:
    """Flush the checkpoint to disk, then leave the mark that makes it one to continue from."""
    import os

    for path in [*checkpoint.rglob("*"), checkpoint]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    (checkpoint / "complete").touch()


def drop_incomplete(run: Run[Any]) -> str | None:
    """Remove checkpoints that were cut off while being written; the newest complete one, if any."""
    import shutil

    if run.is_main:
        for path in run.checkpoints.glob("checkpoint-*"):
            if not (path / "complete").exists():
                shutil.rmtree(path)
    run.state.wait_for_everyone()
    last = run.last_checkpoint()
    if last is not None:
        run.say(f"continuing from {last}")
    return str(last) if last else None


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
