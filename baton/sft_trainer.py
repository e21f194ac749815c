"""TRL's SFTTrainer on packed dialogues: its optimizer, schedule, checkpoints and resume, with steps of our own.

A step reads its whole batch at once and cuts it into micro-batches by itself: on a CPU each dialogue in a row of its
own beside others of like length, so that no attention mask is needed. Only tokens in the loss meet the output head, and
the loss is their mean over the whole batch, whatever the number of micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from baton.dialogue_batches import Batch, Row, apart, dialogues_of, embedding_noise, packed
from baton.document_borders import check_borders
from baton.errors import UserError
from baton.recipe import SFTRecipe
from baton.run import Run
from baton.schedule import batch_number, row_order
from baton.training import Guarding, Recorder, on_one_device, trainer_settings
from baton.tuned import Tuned

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MESSAGE = 1 << 25
"""Numbers in one message between processes: all gradients of a whole model at once would be a second copy of them."""


class DialogueTrainer(Guarding, SFTTrainer):
    """Trains `tuned` on rows of whole dialogues."""

    def __init__(
        self,
        run: Run[SFTRecipe],
        tuned: Tuned,
        tokenizer: PreTrainedTokenizerBase,
        rows: dict[str, list[Row]],
        skipped: tuple[int, ...] = (),
    ) -> None:
        """`rows`: packed, of the uses train and eval; `skipped`: batches left out of the order, as a rollback asks."""
        train = run.recipe.train
        assert tokenizer.pad_token_id is not None
        self.recipe, self.tuned, self.state_of_run = run.recipe, tuned, run.state
        self.rows, self.pad_id = rows, int(tokenizer.pad_token_id)
        self.dialogues = {use: dialogues_of(rows[use]) for use in rows}
        self.max_tokens = train.tokens_per_micro_batch or train.tokens_per_batch
        self.packs = run.state.device.type != "cpu" if train.packing == "auto" else train.packing
        self._tallies = torch.zeros(2)  # sum of entropies, tokens
        self.order = self.order_for(run.state.num_processes, skipped)
        # what rates are told in: tokens of dialogues, without padding
        useful = sum(len(item.ids) for row in self.dialogues["train"] for item in row) / len(self.dialogues["train"])
        settings = trainer_settings(run, train, train.rows_per_batch, train.rows_per_batch)
        # the model chooses its number formats; autocast around everything would cast frozen weights at every use
        settings["bf16"] = False
        super().__init__(
            model=tuned.model,
            args=on_one_device(
                SFTConfig(**settings, max_length=train.sequence_length, dataset_kwargs={"skip_prepare_dataset": True})
            ),
            train_dataset=Dataset.from_dict({"row": self.order}),
            data_collator=_numbers,
            processing_class=tokenizer,
            callbacks=[Recorder(run, "sft", round(useful * train.rows_per_batch), "tokens"), _Join(tuned)],
        )
        tuned.widen()  # TRL makes adapters on a quantised base bfloat16
        self.remove_callback(PrinterCallback)
        self.watch(run, skipped=skipped)
        if self.accelerator.distributed_type not in ("NO", "MULTI_GPU", "MULTI_CPU"):
            raise UserError(
                f"fine-tuning holds the whole model on every process; {self.accelerator.distributed_type} spreads it "
                "over them. Start it without that configuration"
            )
        if self.packs:
            self._check_borders()

    def _check_borders(self) -> None:
        try:
            check_borders(self.tuned.plain, told=False)
        except UserError as error:
            raise UserError(f"{error}. With train.packing: false every dialogue has a row of its own") from None

    def order_for(self, num_processes: int, skipped: tuple[int, ...] = ()) -> list[int]:
        """The rows in training order. Each process gets every n-th of a batch that stands longest first."""
        train, dialogues = self.recipe.train, self.dialogues["train"]
        lengths = [sum(len(item.ids) for item in row) for row in dialogues]
        size = train.rows_per_batch
        order = row_order(len(dialogues), size, train.steps + len(skipped), train.seed, lengths)
        dealt = [at for first in range(num_processes) for at in range(first, size, num_processes)]
        starts = [batch_number(step, skipped) * size for step in range(train.steps)]
        return [order[start + at] for start in starts for at in dealt]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Gradients of the mean over the tokens in the loss of all processes; returns that mean, in nats."""
        self.tuned.model.train()
        batches = self.batches("train", inputs["row"].tolist())
        sums = torch.zeros(3, device=self.args.device)
        sums[2] = sum(len(batch.tokens) for batch in batches)
        count = self._summed([sums[2].clone()])[0]
        # the wrapper's hooks would sum gradients after every backward pass, and want as many on every process
        with self.accelerator.no_sync(model=model):
            for batch in batches:
                found = self.tuned.token_sums(
                    batch.input_ids, batch.position_ids, batch.places, batch.tokens, self._noise(batch)
                )
                (found.nats / count).backward()
                sums[0] += found.nats.detach()
                sums[1] += found.entropy_nats.detach()
        gradients = []
        for parameter in self.tuned.parameters().values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        self._summed([sums, *gradients])
        self._tallies += sums[1:].cpu()
        return self.note_loss(sums[0] / count)

    def batches(self, use: str, numbers: Sequence[int]) -> list[Batch]:
        """The micro-batches of the rows `numbers`."""
        dialogues, device = [self.dialogues[use][number] for number in numbers], self.args.device
        if self.packs:
            return packed([self.rows[use][number] for number in numbers], dialogues, self.max_tokens, device)
        return apart([item for row in dialogues for item in row], self.max_tokens, self.pad_id, device)

    def _noise(self, batch: Batch) -> torch.Tensor | None:
        if self.recipe.neftune_alpha is None:
            return None
        hidden = self.tuned.plain.get_input_embeddings().weight.shape[1]
        return embedding_noise(batch, hidden, self.recipe.neftune_alpha, self.recipe.train.seed, self.state.global_step)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Nats a token over all held-out tokens in the loss, without noise and dropout."""
        was_training = self.tuned.model.training
        self.tuned.model.eval()
        sums = torch.zeros(2, device=self.args.device)
        mine = range(self.state_of_run.process_index, len(self.rows["eval"]), self.state_of_run.num_processes)
        for batch in self.batches("eval", mine):
            found = self.tuned.token_sums(batch.input_ids, batch.position_ids, batch.places, batch.tokens)
            sums += torch.stack([found.nats, found.nats.new_tensor(len(batch.tokens))])
        self._summed([sums])
        self.tuned.model.train(was_training)
        return float(sums[0] / sums[1])

    def _summed(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The same tensors, summed over all processes in place, many in one message."""
        if self.state_of_run.num_processes > 1:
            bucket: list[torch.Tensor] = []
            for tensor in tensors:
                if bucket and sum(item.numel() for item in bucket) + tensor.numel() > MESSAGE:
                    _all_reduce(bucket)
                    bucket = []
                bucket.append(tensor)
            _all_reduce(bucket)
        return tensors

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the predictions' entropy since the last time."""
        if "loss" in logs and self._tallies[1]:
            logs = {**logs, "entropy": float(self._tallies[0] / self._tallies[1])}
            self._tallies.zero_()
        super().log(logs, start_time)

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """Only what is trained: the base is in the registry."""
        return dict(self.tuned.parameters())

    def running_figures(self) -> dict[str, Any]:
        """The entropies since the last line."""
        return {"tallies": self._tallies.tolist()}

    def restore_figures(self, figures: dict[str, Any]) -> None:
        self._tallies = torch.tensor(figures["tallies"])

    def sample_ids(self, step: int) -> list[Any]:
        """The numbers of the packed rows."""
        size = self.recipe.train.rows_per_batch
        return self.order[step * size : (step + 1) * size]


class _Join(TrainerCallback):
    """Lays weights that read the same input together, once the model has its place and its wrapper."""

    def __init__(self, tuned: Tuned) -> None:
        self.tuned = tuned

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tuned.join()


def _numbers(rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
    """(B,): the numbers of a batch's rows."""
    return {"row": torch.tensor([row["row"] for row in rows])}


def _all_reduce(tensors: list[torch.Tensor]) -> None:
    """Sum over all processes in place, in one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))
