"""PEFT adapter folders in and out of layers that several roles share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from baton.adapters import check_shareable, check_targets, is_target, new_lora_config
from baton.errors import UserError
from baton.lora import Acting, Addition, SharedLinear
from baton.recipe import Lora

if TYPE_CHECKING:
    from peft import LoraConfig

PREFIX = "base_model.model."


def attach(
    model: nn.Module, role: str, config: dict[str, Any], tensors: dict[str, torch.Tensor], acting: Acting
) -> None:
    """Give `role` the LoRA tensors of a PEFT file; every one must find its layer. Raises UserError."""
    check_shareable(config)
    left = dict(tensors)
    places = sorted({key.rpartition(".lora_A.")[0] for key in tensors if ".lora_A." in key})
    for place in places:
        name = place.removeprefix(PREFIX)
        down, up = left.pop(f"{place}.lora_A.weight"), left.pop(f"{place}.lora_B.weight")
        layer = _shared_layer(model, name, acting)
        layer.add(role, Addition(down.float(), up.float(), _scale(config, name, len(down))))
    if left:
        raise UserError(
            f"the adapter does not fit its base: {len(left)} of its weights are no factors of a linear layer, such as "
            f"{next(iter(left))}"
        )


def attach_new(model: nn.Module, role: str, lora: Lora, acting: Acting, seed: int) -> dict[str, Any]:
    """Give `role` a new plain LoRA that adds nothing yet (up = 0); returns its PEFT configuration.

    `down` is drawn as PEFT draws it (Kaiming-uniform with a = sqrt 5) from a generator of its own.
    """
    assert not lora.dora, "shared layers add products of two factors"
    generator = torch.Generator().manual_seed(seed)
    names = _targets(model, lora)
    scale = lora.alpha / (math.sqrt(lora.r) if lora.rank_stabilised else lora.r)
    for name in names:
        layer = _shared_layer(model, name, acting)
        weight: Any = layer.base.weight
        out, size = weight.shape if isinstance(layer.base, nn.Linear) else weight.shape[::-1]
        bound = 1 / math.sqrt(size)
        down = (torch.rand(lora.r, size, generator=generator) * 2 - 1) * bound
        layer.add(role, Addition(down, torch.zeros(out, lora.r), scale))
    config = new_lora_config(lora).to_dict()
    return config | {"target_modules": _ends(model, names)}


def save_adapter(model: nn.Module, role: str, config: LoraConfig, more: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the role's factors, and `more` tensors, as a plain PEFT folder."""
    from safetensors.torch import save_file

    tensors = dict(more)
    for name, module in model.named_modules():
        if isinstance(module, SharedLinear) and role in module.additions:
            addition: Any = module.additions[role]
            tensors[f"{PREFIX}{name}.lora_A.weight"] = addition.down
            tensors[f"{PREFIX}{name}.lora_B.weight"] = addition.up
    folder.mkdir(parents=True, exist_ok=True)
    plain = {key: item.detach().cpu().contiguous() for key, item in tensors.items()}
    save_file(plain, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.inference_mode = True
    config.save_pretrained(str(folder))


def _shared_layer(model: nn.Module, name: str, acting: Acting) -> SharedLinear:
    """The layer called `name`, made shareable in place where it is not yet."""
    from transformers.pytorch_utils import Conv1D

    parent, _, last = name.rpartition(".")
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise UserError(f"the adapter does not fit its base: there is no layer {name}") from None
    if isinstance(layer, SharedLinear):
        return layer
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise UserError(f"the adapters sit on linear layers; {name} is a {type(layer).__name__}")
    shared = SharedLinear(layer, acting)
    setattr(model.get_submodule(parent), last, shared)
    return shared


def _scale(config: dict[str, Any], name: str, r: int) -> float:
    """alpha / r, or alpha / sqrt r where rank-stabilised (Kalajdzievski 2023), by PEFT's own patterns."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), name), config["lora_alpha"])
    return float(alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r)


def _targets(model: nn.Module, lora: Lora) -> list[str]:
    """Names of the linear layers that get a new adapter; all of them but the output head, unless listed."""
    from transformers.pytorch_utils import Conv1D

    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    found = []
    for name, module in model.named_modules():
        plain = name.removesuffix(".base")
        inner = module.base if isinstance(module, SharedLinear) else module
        if not isinstance(inner, (nn.Linear, Conv1D)) or inner is head or name != plain or plain == "score":
            continue
        found.append(plain)
    if lora.targets == "all-linear":
        return found
    check_targets(lora.targets, found)
    return [name for name in found if any(is_target(name, target) for target in lora.targets)]


def _ends(model: nn.Module, names: list[str]) -> list[str]:
    """What a PEFT configuration calls the layers `names`: by their last names where these mean no other module."""
    chosen = set(names)
    others = {name.rpartition(".")[2] for name, _ in model.named_modules() if name not in chosen}
    return sorted({name if (last := name.rpartition(".")[2]) in others else last for name in names})
