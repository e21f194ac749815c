"""transformers' Trainer on preference pairs: its optimizer, schedule, checkpoints and resume, with steps of our own.

A step reads its whole batch of pairs at once and cuts it into micro-batches of like length by itself. So nothing is
padded to the longest pair of a batch, a pair's prompt is computed once, and every process syncs once a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from baton.errors import UserError
from baton.length_groups import ENOUGH, groups
from baton.recipe import PairLoss, RewardRecipe
from baton.run import Run
from baton.schedule import batch_number, row_order
from baton.training import Guarding, Recorder, on_one_device, trainer_settings
from reward.best import Best
from reward.losses import pair_losses, targets
from reward.members import Members
from reward.pairs import Pair
from reward.rows import pair_rows, width


class PairTrainer(Guarding):
    """Trains `members` on pairs, all in the same steps, each with its own order of the data and its own norm."""

    def __init__(
        self, run: Run[RewardRecipe], members: Members, pairs: dict[str, list[Pair]], skipped: tuple[int, ...] = ()
    ) -> None:
        """`skipped`: batches that are left out of the order, as a rollback asks."""
        train = run.recipe.train
        self.recipe, self.members, self.pairs, self.state_of_run = run.recipe, members, pairs, run.state
        self.best = Best(len(members), train.patience)
        longest = max(len(pair.chosen_ids) + len(pair.rejected_ids) for rows in pairs.values() for pair in rows)
        self.shares_prompt = train.share_prompt and members.can_share_prompts(longest)
        self._frozen_states: dict[tuple[str, int], torch.Tensor] = {}
        self._tallies = torch.zeros(3)  # right, margin, pairs that a side won
        per_process = train.pairs_per_batch // run.state.num_processes
        settings = trainer_settings(run, train, train.pairs_per_batch, per_process)
        # the members choose their number formats; autocast around everything would cast frozen weights at every use
        settings["bf16"] = False
        self.order = self.order_for(run.state.num_processes, skipped)
        super().__init__(
            model=members,
            args=on_one_device(TrainingArguments(**settings)),
            train_dataset=self.order,  # type: ignore[arg-type]
            data_collator=_batch,
            callbacks=[Recorder(run, "reward", train.pairs_per_batch * len(members), "pairs"), HeldOut(self, run)],
        )
        self.remove_callback(PrinterCallback)
        self.watch(run, skipped=skipped)
        if self.accelerator.distributed_type not in ("NO", "MULTI_GPU", "MULTI_CPU"):
            raise UserError(
                f"reward training holds the whole model on every process; {self.accelerator.distributed_type} spreads "
                "it over them. Start it without that configuration"
            )

    def order_for(self, num_processes: int, skipped: tuple[int, ...] = ()) -> list[list[int]]:
        """What a step's rows are, in training order: of each position the pair's number for each member.

        Each process gets every n-th of a batch that stands longest first, so that all have as much to do.
        """
        train, count = self.recipe.train, len(self.pairs["train"])
        lengths = [width(pair, self.shares_prompt) for pair in self.pairs["train"]]
        batches = train.steps + len(skipped)
        orders = [
            row_order(count, train.pairs_per_batch, batches, train.seed + number, lengths)
            for number in range(len(self.members))
        ]
        dealt = [at for first in range(num_processes) for at in range(first, train.pairs_per_batch, num_processes)]
        starts = [batch_number(step, skipped) * train.pairs_per_batch for step in range(train.steps)]
        return [[order[start + at] for order in orders] for start in starts for at in dealt]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Gradients of the loss over all pairs of all processes; returns that loss, the mean over members."""
        reduced = torch.zeros(4, device=self.args.device)
        active = [number for number in range(len(self.members)) if not self.best.is_finished(number)]
        # the wrapper's hooks would sum gradients after every backward pass, and want as many on every process
        with self.accelerator.no_sync(model=model):
            for number in active:
                reduced += self._backward(number, inputs["pairs"][:, number].tolist())
        parameters = [p for number in active for p in self.members.parameters_of(number).values()]
        self._sum_over_processes([reduced, *(p.grad for p in parameters if p.grad is not None)])
        self._tallies += reduced[1:].cpu()
        return self.note_loss(reduced[0] / (len(active) * self.recipe.train.pairs_per_batch))

    def _backward(self, number: int, rows: list[int]) -> torch.Tensor:
        """Add this process's share of a member's gradients; returns its sums, as `_sums` (4,)."""
        sums = torch.zeros(4, device=self.args.device)
        for chosen, rejected, pairs in self._passes("train", rows, number):
            losses = _losses(pairs, chosen, rejected, self.recipe.loss)
            (losses.sum() / self.recipe.train.pairs_per_batch).backward()
            sums += _sums(losses, chosen - rejected, pairs)
        return sums

    def _passes(
        self, use: str, numbers: list[int], member: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[Pair]]]:
        """(scores of chosen, of rejected, pairs) of each micro-batch of the pairs `numbers`."""
        pairs = [self.pairs[use][number] for number in numbers]
        widths = [width(pair, self.shares_prompt) for pair in pairs]
        rows_each = 1 if self.shares_prompt else 2
        enough = ENOUGH.get(self.args.device.type)
        for group in groups(widths, rows_each, self.recipe.train.tokens_per_micro_batch, enough):
            states = self._states(use, [numbers[at] for at in group], member)
            chosen, rejected = self.members.rewards(states, member)
            yield chosen, rejected, [pairs[at] for at in group]

    def _states(self, use: str, numbers: list[int], member: int) -> torch.Tensor:
        """The last tokens' states (2, N, H); where nothing below the head is trained, each pair's are computed once."""
        absent = [number for number in numbers if (use, number) not in self._frozen_states]
        if absent:
            pairs = [self.pairs[use][number] for number in absent]
            rows = pair_rows(pairs, self.shares_prompt, self.members.pad_id, self.args.device)
            if self.members.trained != "head":
                return self.members.states(rows, member)
            with torch.no_grad():
                found = self.members.states(rows, member)
            self._frozen_states |= {(use, number): found[:, at] for at, number in enumerate(absent)}
        return torch.stack([self._frozen_states[use, number] for number in numbers], dim=1)

    @torch.no_grad()
    def held_out_losses(self) -> list[float]:
        """Each member's mean Bradley-Terry loss on the held-out pairs, without what the recipe adds to it."""
        rank, world = self.state_of_run.process_index, self.state_of_run.num_processes
        mine = list(range(len(self.pairs["eval"])))[rank::world]
        sums = torch.zeros(len(self.members), device=self.args.device)
        for member in range(len(self.members)):
            for chosen, rejected, pairs in self._passes("eval", mine, member):
                sums[member] += _losses(pairs, chosen, rejected, PairLoss()).sum()
        self._sum_over_processes([sums])
        return (sums / len(self.pairs["eval"])).tolist()

    def _sum_over_processes(self, tensors: list[torch.Tensor]) -> None:
        """In place, all of them in one message."""
        if self.state_of_run.num_processes == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """Each member's gradient by itself, so that a member trains as it would alone; returns the mean norm."""
        norms = [
            nn.utils.clip_grad_norm_(self.members.parameters_of(number).values(), self.args.max_grad_norm)
            for number in range(len(self.members))
            if not self.best.is_finished(number)
        ]
        return torch.stack(norms).mean()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the training pairs' accuracy and margin since the last time."""
        if "loss" in logs and self._tallies[2]:
            accuracy, margin = (self._tallies[:2] / self._tallies[2]).tolist()  # of pairs that a side won
            logs = {**logs, "accuracy": accuracy, "margin": margin}
            self._tallies.zero_()
        super().log(logs, start_time)

    def train_from(self, checkpoint: str | None) -> None:
        """Train, from `checkpoint` where there is one; one in which every member is finished already is the end."""
        if checkpoint is not None:
            self.best.load(Path(checkpoint))
            if self.best.all_finished:
                self._load_from_checkpoint(checkpoint)
                self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
                return
        self.train(resume_from_checkpoint=checkpoint)

    def summary(self) -> dict[str, float]:
        """For the manifest: the guard's figures, and where held-out losses chose each member's weights, at which step.

        `eval/chosen_on` then says that what is measured on the held-out pairs is measured on what chose the weights.
        """
        steps = self.best.steps
        if not any(steps):
            return super().summary()
        names = [f"best_step/{number}" for number in range(len(steps))] if len(steps) > 1 else ["best_step"]
        return super().summary() | dict(zip(names, map(float, steps), strict=True)) | {"eval/chosen_on": 1.0}

    def keep_best(self) -> None:
        """Give each member its best weights, where held-out losses were measured."""
        for number, weights in enumerate(self.best.weights):
            self._copy(number, weights)

    def _copy(self, number: int, weights: dict[str, torch.Tensor]) -> None:
        parameters = self.members.parameters_of(number)
        with torch.no_grad():
            for name, item in weights.items():
                parameters[name].copy_(item)

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """What is trained of each member: the base is in the registry."""
        return {
            f"{number}.{name}": item
            for number in range(len(self.members))
            for name, item in self.members.parameters_of(number).items()
        }

    def extra_files(self) -> dict[str, Any]:
        """The best weights so far."""
        return self.best.files()

    def load_extra_files(self, checkpoint: Path) -> None:
        self.best.load(checkpoint)

    def running_figures(self) -> dict[str, Any]:
        """The training pairs since the last line."""
        return {"tallies": self._tallies.tolist()}

    def restore_figures(self, figures: dict[str, Any]) -> None:
        self._tallies = torch.tensor(figures["tallies"])

    def sample_ids(self, step: int) -> list[Any]:
        """The numbers of each member's training pairs."""
        rows = self.recipe.train.pairs_per_batch
        return self.order[step * rows : (step + 1) * rows]


class HeldOut(TrainerCallback):
    """Measures the held-out loss every `train.eval_every` steps, keeps the best weights, ends the training."""

    def __init__(self, trainer: PairTrainer, run: Run[RewardRecipe]) -> None:
        self.trainer, self.run = trainer, run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # only now: wrapping the model for several processes gives its weights new places
        self.trainer.members.join()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        train, best, members = self.run.recipe.train, self.trainer.best, self.trainer.members
        due = train.eval_every and (state.global_step % train.eval_every == 0 or state.global_step == train.steps)
        if not due:
            return
        losses = self.trainer.held_out_losses()
        for number, loss in enumerate(losses):
            best.note(number, state.global_step, loss, members.parameters_of(number))
        self.run.log(state.global_step, {"eval/loss": sum(losses) / len(losses)})
        if best.all_finished:
            self.run.say(f"no better held-out loss for {train.patience} measurements: training ends")
            control.should_training_stop = True


def _batch(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """(B, K): of each position of the batch the number of each member's pair."""
    return {"pairs": torch.tensor(rows)}


def _is_tie(pairs: list[Pair], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor([pair.is_tie for pair in pairs], device=like.device)


def _losses(pairs: list[Pair], chosen: torch.Tensor, rejected: torch.Tensor, loss: PairLoss) -> torch.Tensor:
    """(N,) of scores (N,). Which side of a tie is called the chosen one means nothing, and changes nothing."""
    is_tie = _is_tie(pairs, chosen)
    margin = torch.tensor([pair.margin or 0.0 for pair in pairs], device=chosen.device)
    return pair_losses(chosen, rejected, torch.where(is_tie, 0.0, margin), targets(is_tie, loss.label_smoothing), loss)


def _sums(losses: torch.Tensor, margin: torch.Tensor, pairs: list[Pair]) -> torch.Tensor:
    """(4,): the sum of losses; of the pairs that a side won those in order (equal scores: half), margins, number."""
    right = (margin > 0).float() + 0.5 * (margin == 0).float()
    won = (~_is_tie(pairs, margin)).float()
    return torch.stack([losses.sum(), (right * won).sum(), (margin * won).sum(), won.sum()]).detach().float()
