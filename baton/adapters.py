"""LoRA adapters: made for a recipe, copied into another role, written as a plain PEFT folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.errors import UserError
from baton.recipe import Lora

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig


SCORE_KEY = "base_model.model.score.weight"
"""Where a PEFT folder of a sequence classifier keeps its score head."""

MEMBERS = "members"
"""In an ensemble's folder, the one of its members but the first."""


UNSUPPORTED = ("use_dora", "lora_bias", "use_qalora", "corda_config", "arrow_config", "alora_invocation_tokens")
"""Settings of PEFT's LoRA that add something else than a product of two factors."""


def check_shareable(config: dict[str, Any], ref: str | None = None) -> None:
    """Raises UserError where the adapter of an adapter_config.json, that of version `ref`, is no plain LoRA."""
    unsupported = [key for key in UNSUPPORTED if config.get(key)]
    if config.get("peft_type") == "LORA" and not unsupported:
        return
    found = ", ".join(unsupported) or f"peft_type {config.get('peft_type')}"
    raise UserError(
        f"one base is shared between plain LoRA adapters; {ref or 'this one'} has {found}. Merge it first: baton get "
        f"{ref or 'REF'} DIR --merge, then baton publish DIR --name TEAM/NAME --kind merged"
    )


def is_target(name: str, target: str) -> bool:
    """Whether the layer called `name` is meant by an entry of lora.targets, its name or the end of it; as PEFT does."""
    return name == target or name.endswith(f".{target}")


def check_targets(targets: list[str], names: Iterable[str]) -> None:
    """Raises UserError where one of lora.targets means none of the layers `names`, which can take an adapter."""
    layers = list(names)
    idle = [target for target in targets if not any(is_target(name, target) for name in layers)]
    if idle:
        known = sorted({name.rpartition(".")[2] for name in layers})
        raise UserError(
            f"lora.targets: {', '.join(idle)} {'names' if len(idle) == 1 else 'name'} no layer of the model that takes "
            f"an adapter. Its layers end with {', '.join(known)}; give some of these, or longer ends of their names"
        )


def new_lora_config(lora: Lora) -> LoraConfig:
    """A causal-language-model LoRA configuration."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        use_dora=lora.dora,
        use_rslora=lora.rank_stabilised,
        task_type="CAUSAL_LM",
    )


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(adapter_config.json, tensors) of a PEFT folder."""
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return config, load_file(folder / "adapter_model.safetensors")


def member_folders(folder: Path) -> list[Path]:
    """The adapter folders of a reward model: `folder` itself, then members/1, members/2, … of an ensemble."""
    return [folder, *(folder / path for path in member_paths(folder))]


def member_paths(folder: Path) -> list[str]:
    """`members/1`, `members/2`, … as they lie in `folder`; raises UserError where one is missing in between."""
    found = {path.name for path in (folder / MEMBERS).glob("*")} if (folder / MEMBERS).is_dir() else set()
    names = [str(number) for number in range(1, len(found) + 1)]
    if found != set(names):
        raise UserError(
            f"{folder / MEMBERS} holds {', '.join(sorted(found))}; expected one folder for each further member of the "
            f"ensemble, {', '.join(names)}. Copy the missing ones, or remove {MEMBERS}/."
        )
    return [f"{MEMBERS}/{name}" for name in names]


def split_head(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """(LoRA tensors, score head of shape (1, hidden) or None)."""
    head = [key for key in tensors if key.endswith("score.weight")]
    assert len(head) <= 1, head
    adapter = {key: tensor for key, tensor in tensors.items() if key not in head}
    return adapter, tensors[head[0]] if head else None


def lora_config_from(config: dict[str, Any], *, task_type: str, modules_to_save: list[str] | None) -> LoraConfig:
    """The same LoRA for another task: rank, scaling and layers are kept."""
    from peft import LoraConfig

    return LoraConfig(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=0.0,
        target_modules=config["target_modules"],
        use_rslora=config.get("use_rslora", False),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        task_type=task_type,
        modules_to_save=modules_to_save,
    )


def set_adapter_tensors(model: Any, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Copy LoRA tensors into adapter `name` of a PeftModel; every LoRA tensor must find its place."""
    from peft import set_peft_model_state_dict

    result: Any = set_peft_model_state_dict(model, tensors, adapter_name=name)
    missing = [key for key in result.missing_keys if "lora_" in key and f".{name}." in key]
    if missing or result.unexpected_keys:
        raise UserError(
            f"the adapter does not fit its base: {len(missing)} layers got no weights, {len(result.unexpected_keys)} "
            f"weights found no layer, such as {(missing + list(result.unexpected_keys))[0]}"
        )
