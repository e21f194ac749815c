"""transformers' Trainer, which a run can rely on: exact resume, ending on signals, saving aside, a divergence guard."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from baton import checkpoints
from baton.errors import UserError
from baton.guard import (
    PASSED_OVER,
    Guard,
    RollBack,
    read_rollbacks,
    skipped_batches,
    too_often,
    write_rollbacks,
)
from baton.preemption import Preempted, Preemption
from baton.run import Run
from baton.schedule import batch_number
from baton.train_sections import GuardedTrain

WEIGHTS = "trained.safetensors"
ASIDE = "guard.json"
"""What the Trainer does not know of: the guard's losses, and what the next line of metrics.jsonl has summed up."""

SKIPPED = "skipped.json"


class Guarding(Trainer):
    """A mixin before TRL's trainers, or a Trainer by itself. `watch` switches it on; without, it is a plain Trainer.

    Every optimizer step, all ranks agree in one message on the loss, on signals and on failures to write. Checkpoints
    hold what is trained, never a frozen base.
    """

    _run: Run[Any] | None = None
    _preemption: Preemption | None = None
    took_step = True
    """Whether the last optimizer step was taken; not where its loss or gradient was no number."""
    preempted = False
    """Whether the training was asked to end early, and saved."""

    def watch(self, run: Run[Any], preemption: Preemption | None = None, skipped: tuple[int, ...] = ()) -> None:
        """Guard the training of `run`, whose data leave out the batches `skipped`; before `train`."""
        self._preemption, self.skipped = preemption, skipped
        if self._run is not None:
            return
        self._run = run
        self._train: GuardedTrain = run.recipe.train
        self._guard = Guard(self._train.guard)
        self._writer = checkpoints.Writer()
        self._from: Path | None = None
        self._loss = torch.zeros((), device=self.args.device)
        self._norm: Any = 0.0
        self._row_loss, self._row_steps = 0.0, 0
        self.add_callback(_Steps(self))

    # What a subclass may add to a checkpoint

    def extra_files(self) -> dict[str, Any]:
        """File name -> content, as `checkpoints.write_checkpoint` takes it; called on the main process."""
        return {}

    def load_extra_files(self, checkpoint: Path) -> None:
        """Put `extra_files` back; on every process, when the training begins."""

    def running_figures(self) -> dict[str, Any]:
        """What the next line of metrics has summed up so far (JSON), the same on all ranks."""
        metrics: dict[str, dict[str, list[float]]] | None = getattr(self, "_metrics", None)  # TRL's
        return {"metrics": dict(metrics["train"]), "tokens": self._total_train_tokens} if metrics else {}

    def restore_figures(self, figures: dict[str, Any]) -> None:
        """Go on from `running_figures`."""
        metrics: Any = getattr(self, "_metrics", None)
        if metrics is not None and figures:
            metrics["train"].update(figures["metrics"])
            self._total_train_tokens = figures["tokens"]

    def sample_ids(self, step: int) -> list[Any]:
        """What the batch of optimizer step `step` holds, for people to look at.

        As the data set's `sample_id(position)` tells, otherwise the numbers of the batch's rows in training order.
        """
        rows = self._train.rows_per_batch
        tell = getattr(self.train_dataset, "sample_id", None)
        if tell is not None:
            return [tell(step * rows + at) for at in range(rows)]
        return [batch_number(step, self.skipped) * rows + at for at in range(rows)]

    def text_changes_at(self, step: int) -> bool:
        """Whether the batch of optimizer step `step` begins to read other sources, as the data set's `changes_at`."""
        tell = getattr(self.train_dataset, "changes_at", None)
        return tell is not None and bool(tell(step))

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """The parameters that are trained, and the buffers that are saved, by their names in the unwrapped model."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        saved = model.state_dict().keys()
        found = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return found | {name: buffer for name, buffer in model.named_buffers() if name in saved}

    def summary(self) -> dict[str, float]:
        """For the manifest: how many steps were not taken, and how often it went back."""
        if self._run is None:
            return {}
        rollbacks = read_rollbacks(self._run.folder / SKIPPED, self._run.training_key)
        return {"skipped_steps": self._guard.skipped_steps, "rollbacks": len(rollbacks)}

    # The loop

    def train_from(self, checkpoint: str | None) -> None:
        """Train, from `checkpoint` where there is one."""
        self.train(resume_from_checkpoint=checkpoint)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """As the Trainer's; where it is watched, returns when the last checkpoint is whole."""
        if self._run is None:
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        assert not isinstance(resume_from_checkpoint, bool), "name the checkpoint: never guess an input"
        self._from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        try:
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except BaseException as error:
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # gives the terminal back
            if isinstance(error, Exception):  # nobody pressed Ctrl-C twice: what is being written is worth the wait
                self._writer.wait()
            raise
        self.finish_writing()
        return output

    def note_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """`loss`, which a `training_step` is about to return: a step's loss is the sum of its micro-batches'."""
        if self._run is not None:
            self._loss = self._loss + loss.detach().float()
        return loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        return self.note_loss(super().training_step(model, inputs, num_items_in_batch))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        self._norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._norm

    def _begin(self) -> None:
        """Before the first step, with everything in its place: what a checkpoint holds besides the Trainer's own."""
        if self.args.world_size > 1:  # otherwise all ranks would drop out the same places
            torch.manual_seed(self.args.seed + self.args.process_index)
        self._loss = torch.zeros((), device=self.args.device)
        # a checkpoint has those of its own time, and the loop would go by them
        self.state.save_steps, self.state.logging_steps = int(self.args.save_steps), int(self.args.logging_steps)
        if self._from is None:
            return
        self.load_extra_files(self._from)
        if (self._from / ASIDE).is_file():
            kept = json.loads((self._from / ASIDE).read_text(encoding="utf-8"))
            self._guard.load(kept["guard"])
            self._row_loss, self._row_steps = kept["row_loss"], kept["row_steps"]
            self._globalstep_last_logged = kept["last_logged"]
            self.restore_figures(kept["figures"])

    def _judge(self) -> None:
        """Before the optimizer's step: agree with the other ranks, and let the guard decide."""
        loss, norm, asked, failed = self._agree()
        if failed:
            self._raise_failure()
        self.preempted = self.preempted or bool(asked)
        assert self.optimizer is not None
        if self.text_changes_at(self.state.global_step):
            self._guard.forget()
        self.took_step = self._guard.takes(self.state.global_step, loss, norm)
        if self.took_step:
            self._row_loss += loss
            self._row_steps += 1
        else:
            # an optimizer leaves a parameter without a gradient, and its moments, as they are
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        self._tr_loss.zero_()  # once no number, it would stay none; the lines of metrics are made here

    def _agree(self) -> list[float]:
        """The step's loss (all ranks' mean), its gradient's norm; how many ranks were asked to end, failed to write."""
        received = self._preemption is not None and self._preemption.received
        device = self.args.device
        mine = [torch.as_tensor(item, dtype=torch.float32, device=device) for item in (self._loss, self._norm or 0.0)]
        flags = [float(received), float(self._writer.failure is not None)]
        values = torch.cat([torch.stack(mine), torch.tensor(flags, device=device)])
        self._loss = torch.zeros((), device=device)
        world = self.args.world_size
        if world > 1:
            torch.distributed.all_reduce(values)  # a sum with one rank's NaN in it is NaN on all of them
            values[:2] /= world
        return values.tolist()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The mean loss of the steps that were taken since the last line; steps that were not are counted."""
        if self._run is not None and "loss" in logs:
            logs = dict(logs)
            del logs["loss"]
            if self._row_steps:
                logs = {"loss": self._row_loss / self._row_steps, **logs}
            if self._guard.skipped_steps:
                logs["skipped_steps"] = self._guard.skipped_steps
            if not math.isfinite(logs.get("grad_norm", 0.0)):
                del logs["grad_norm"]  # JSON knows no NaN
            self._row_loss, self._row_steps = 0.0, 0
        super().log(logs, start_time)

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._run is None:
            super()._save_checkpoint(model, trial)
            return
        self._writer.wait()
        failures = gather_object([str(self._writer.failure or "")])
        if any(failures):
            self._raise_failure()
        states = gather_object([checkpoints.rng_state(self.args.world_size > 1)])
        if self._run.is_main:
            names = [f"rng_state_{rank}.pth" for rank in range(len(states))] if len(states) > 1 else ["rng_state.pth"]
            files = dict(zip(names, states, strict=True)) | self._snapshot()
            step, keep = self.state.global_step, self._train.keep
            self._writer.start(partial(checkpoints.write_checkpoint, self._run.checkpoints, step, files, keep))

    def _snapshot(self) -> dict[str, Any]:
        """The files of a checkpoint, with copies of everything that training changes."""
        kept = {
            "guard": self._guard.state(),
            "row_loss": self._row_loss,
            "row_steps": self._row_steps,
            "last_logged": self._globalstep_last_logged,
            "figures": self.running_figures(),
        }
        assert self.optimizer is not None and self.lr_scheduler is not None
        state = replace(self.state, log_history=[])  # metrics.jsonl has it
        return checkpoints.copied(
            {
                WEIGHTS: self.trained_tensors(),
                "optimizer.pt": self.optimizer.state_dict(),
                "scheduler.pt": self.lr_scheduler.state_dict(),
                "trainer_state.json": asdict(state),
                ASIDE: json.loads(json.dumps(kept)),
                **self.extra_files(),
            }
        )

    def finish_writing(self) -> None:
        """Wait until the last checkpoint is whole. Raises UserError on every process when it cannot be."""
        assert self._run is not None
        self._writer.wait()
        if any(gather_object([str(self._writer.failure or "")])):
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._writer.failure is not None:
            raise self._writer.failure
        raise UserError("the main process could not write a checkpoint; its message says why")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / WEIGHTS
        if self._run is None or not path.is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved, wanted = load_file(path), self.trained_tensors()
        if saved.keys() != wanted.keys():
            odd = sorted(saved.keys() ^ wanted.keys())
            raise UserError(f"{path} holds other weights than are trained here, for example {odd[0]}; start afresh")
        with torch.no_grad():
            for name, tensor in wanted.items():
                tensor.copy_(saved[name])


GuardedTrainer = Guarding
AnyGuarding = TypeVar("AnyGuarding", bound=Guarding)


class _Steps(TrainerCallback):
    """Tells a Guarding where the loop is."""

    def __init__(self, trainer: Guarding) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._begin()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._judge()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.preempted:
            control.should_save = control.should_training_stop = True


def train_guarded(run: Run[Any], make_trainer: Callable[[tuple[int, ...]], AnyGuarding]) -> AnyGuarding:
    """Train from the last complete checkpoint to the end; returns the trainer.

    `make_trainer(skipped)` makes model and trainer from nothing, seeds included, for data without the batches
    `skipped`; it is called again after each rollback. Raises Preempted once a signal's checkpoint is whole, Diverged
    when the guard gives up.
    """
    with Preemption() as preemption:
        while True:
            rollbacks = read_rollbacks(run.folder / SKIPPED, run.training_key)
            skipped = skipped_batches(rollbacks)
            trainer = make_trainer(skipped)
            trainer.watch(run, preemption, skipped)
            found: RollBack | None = None
            try:
                trainer.train_from(checkpoints.drop_incomplete(run))
            except RollBack as error:
                found = error.with_traceback(None)  # its frames would keep the model
            if found is None:
                break
            _roll_back(run, trainer, found, rollbacks)
            trainer.accelerator.free_memory()
            trainer.accelerator.gradient_state.dataloader_references = [None]  # the loop was left in the middle
            del trainer
            gc.collect()
        if trainer.preempted:
            run.state.wait_for_everyone()
            raise Preempted(trainer.state.global_step)
        return trainer


def _roll_back(run: Run[Any], trainer: Guarding, found: RollBack, rollbacks: list[dict[str, Any]]) -> None:
    """Choose the checkpoint to go back to, delete those after it, and write down what is passed over and why."""
    trainer.finish_writing()
    settings = trainer._train.guard
    assert settings is not None
    if len(rollbacks) >= settings.max_rollbacks:
        raise too_often(found, settings, run.folder / SKIPPED)
    box = [0]
    if run.is_main:
        there_are = checkpoints.complete_checkpoints(run.checkpoints)
        # with few kept the spike may be older than all of them, and the oldest is still better than none
        usable = [path for path in there_are if checkpoints.step_of(path) <= found.first] or there_are[:1]
        # gone back to once already, and to no avail: the fault may be in it
        if len(usable) > 1 and rollbacks and rollbacks[-1]["checkpoint"] == checkpoints.step_of(usable[-1]):
            usable.pop()
        box[0] = checkpoints.step_of(usable[-1]) if usable else 0
        for path in there_are:
            if checkpoints.step_of(path) > box[0]:
                checkpoints.remove(path)
    broadcast_object_list(box)
    back_to = int(box[0])
    steps = range(max(back_to, found.step + 1 - PASSED_OVER), found.step + 1)
    batches = {batch_number(step, trainer.skipped): trainer.sample_ids(step) for step in steps}
    about = {
        "step": found.step + 1,
        "loss": found.loss,
        "usual": found.usual,
        "sigmas": found.sigmas,
        "checkpoint": back_to,
        "batches": list(batches),
        "samples": {str(batch): ids for batch, ids in batches.items()},
    }
    if run.is_main:
        write_rollbacks(run.folder / SKIPPED, run.training_key, [*rollbacks, about])
    run.state.wait_for_everyone()
    run.say(
        f"{found}; back to step {back_to}, and on without batches {min(batches)} to {max(batches)} "
        f"(rollback {len(rollbacks) + 1} of at most {settings.max_rollbacks}; {run.folder / SKIPPED} names the samples)"
    )
