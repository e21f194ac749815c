"""Early stopping: each member's weights at its lowest held-out loss, and when it has had its chances."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

_NAME = "best_{}.safetensors"


class Best:
    """The lowest held-out loss of each of `count` members, with its step and weights; kept in every checkpoint."""

    def __init__(self, count: int, patience: int | None) -> None:
        """`patience`: after so many measurements without a better one a member is finished; None: never."""
        self.patience = patience
        self.losses = [float("inf")] * count
        self.steps = [0] * count
        self.waited = [0] * count
        self.weights: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]

    def is_finished(self, number: int) -> bool:
        """Whether the member's training is over."""
        return self.patience is not None and self.waited[number] >= self.patience

    @property
    def all_finished(self) -> bool:
        return all(self.is_finished(number) for number in range(len(self.losses)))

    def note(self, number: int, step: int, loss: float, weights: Mapping[str, torch.Tensor]) -> None:
        """A measurement of one member; its weights are copied if it is the best so far."""
        if self.is_finished(number):
            return
        if loss < self.losses[number]:
            self.losses[number], self.steps[number], self.waited[number] = loss, step, 0
            self.weights[number] = {name: item.detach().cpu().clone() for name, item in weights.items()}
        else:
            self.waited[number] += 1

    def files(self) -> dict[str, Any]:
        """What a checkpoint keeps: file name -> tensors by name, or JSON."""
        found: dict[str, Any] = {"best.json": {"losses": self.losses, "steps": self.steps, "waited": self.waited}}
        return found | {_NAME.format(number): weights for number, weights in enumerate(self.weights) if weights}

    def load(self, folder: Path) -> None:
        """From a checkpoint that holds `files`."""
        state = json.loads((folder / "best.json").read_text())
        self.losses, self.steps, self.waited = state["losses"], state["steps"], state["waited"]
        for number, step in enumerate(self.steps):
            self.weights[number] = load_file(folder / _NAME.format(number)) if step else {}
