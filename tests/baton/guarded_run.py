"""A tiny run that the tests of the guarded trainer share: a regression with dropout on numbered rows, no registry."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import PrinterCallback, TrainingArguments, set_seed

from baton.run import Run
from baton.schedule import batch_number
from baton.train_sections import TokenTrain
from baton.training import Guarding, Recorder, trainer_settings

ROWS = 4  # of a batch


def make_run(folder: Path, **settings: Any) -> Run[Any]:
    """A run of 12 steps that logs every 2 and saves every 3."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {"steps": 12, "learning_rate": 0.05, "log_every": 2, "save_every": 3, "seed": 3} | settings
    train = TokenTrain(tokens_per_batch=ROWS, sequence_length=1, **given)
    recipe = SimpleNamespace(train=train, run_dir=str(folder), stage="sft")
    return Run(recipe, None, None, PartialState(cpu=True), "key", torch.float32)  # type: ignore[arg-type]


class Regression(nn.Module):
    """A frozen layer, dropout and a trained layer."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(5, 8).requires_grad_(False)
        self.head = nn.Linear(8, 1)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor, y: torch.Tensor, number: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean squared error."""
        return {"loss": ((self.head(self.dropout(torch.tanh(self.base(x)))) - y) ** 2).mean()}


class Numbered(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Row g of batch b is a function of its number alone; `broken` batches have other targets."""

    def __init__(self, steps: int, skipped: tuple[int, ...], broken: dict[int, float]) -> None:
        self.steps, self.skipped, self.broken = steps, skipped, broken
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.steps * ROWS

    def sample(self, position: int) -> int:
        return batch_number(position // ROWS, self.skipped) * ROWS + position % ROWS

    def sample_id(self, position: int) -> str:
        return f"row {self.sample(position)}"

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        number = self.sample(position)
        x = torch.randn(5, generator=torch.Generator().manual_seed(number))
        y = x.sum(-1, keepdim=True) + self.broken.get(number // ROWS, 0.0)
        return {"x": x, "y": y, "number": torch.tensor(number)}


class Observed(Guarding):
    """Remembers which rows each step was given."""

    seen: list[list[int]]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self.seen.append(inputs["number"].tolist())
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def make_trainer(
    run: Run[Any], skipped: tuple[int, ...] = (), broken: dict[int, float] | None = None, rows_at_once: int = 2
) -> Observed:
    """As a stage makes it: everything from the seed."""
    train = run.recipe.train
    set_seed(train.seed)
    trainer = Observed(
        model=Regression(),
        args=TrainingArguments(**trainer_settings(run, train, ROWS, rows_at_once)),
        train_dataset=Numbered(train.steps, skipped, broken or {}),
        callbacks=[Recorder(run, "test", ROWS, "rows")],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.seen = []
    return trainer
