"""PPO's checkpoints: trained weights, optimizer moments and running figures, in safetensors and JSON, written aside."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stages.roles import Roles

KEPT = 2


def save_checkpoint(
    folder: Path,
    step: int,
    roles: Roles,
    optimizer: torch.optim.Optimizer,
    previous: dict[str, torch.Tensor],
    state: dict[str, Any],
) -> Path:
    """Write `folder`/checkpoint-STEP whole or not at all; keep the last two.

    `previous` holds the weights before the last update, which a run that finds itself over its KL budget goes back to;
    `state` is plain JSON.
    """
    tensors = {f"weight/{name}": p.detach().cpu().contiguous() for name, p in roles.trained_parameters().items()}
    for name, parameter in roles.trained_parameters().items():
        for key, item in optimizer.state.get(parameter, {}).items():
            tensors[f"adam/{name}/{key}"] = torch.as_tensor(item).detach().cpu().contiguous()
    tensors |= {f"previous/{name}": tensor.cpu().contiguous() for name, tensor in previous.items()}
    aside = folder / f"aside-{step}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(tensors, aside / "trained.safetensors")
    (aside / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
    (aside / "complete").touch()
    for path in aside.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    final = folder / f"checkpoint-{step}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)
    old = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[:-KEPT]
    for path in old:
        shutil.rmtree(path)
    return final


def load_checkpoint(
    checkpoint: Path, roles: Roles, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Restore weights and optimizer moments in place; returns (state with its `step`, previous weights)."""
    tensors = load_file(checkpoint / "trained.safetensors")
    for name, parameter in roles.trained_parameters().items():
        parameter.data.copy_(tensors[f"weight/{name}"])
        prefix = f"adam/{name}/"
        moments = {key.removeprefix(prefix): item for key, item in tensors.items() if key.startswith(prefix)}
        if moments:
            optimizer.state[parameter] = {
                # AdamW keeps its step count on the CPU
                key: item if key == "step" else item.to(parameter.device)
                for key, item in moments.items()
            }
    previous = {name: tensors[f"previous/{name}"].to(p.device) for name, p in roles.trained_parameters().items()}
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8")), previous
