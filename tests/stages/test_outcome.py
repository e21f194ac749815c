"""Nothing is published that, reloaded, is not what was in memory."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.outcome import check_policy, check_value, publish
from stages.roles import Cast, Roles

IDS = [5, 9, 40, 3]
TOKENIZER: Any = SimpleNamespace(pad_token_id=2)


@pytest.fixture
def trained(role_folders: Any) -> Callable[..., Roles]:
    """Roles in float32, moved from where they started."""

    def make(**changes: Any) -> Roles:
        base, sft, reward = role_folders
        cast = Cast(base=base, sft=sft, rewards={"r": [reward]}, critic_start=reward, **changes)
        roles = Roles(cast, torch.float32, 1.0)
        with torch.no_grad():
            for parameter in roles.trained_parameters().values():
                parameter += 0.02
        return roles

    return make


def spoil(folder: Path, part: str) -> None:
    """Zero the first tensor whose name has `part`."""
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if part in name)
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(("policy", "part"), [("adapter", "lora_B"), ("full", "q_proj")])
def test_a_policy_that_does_not_come_back_is_refused(
    policy: str, part: str, trained: Callable[..., Roles], tmp_path: Path
) -> None:
    roles = trained(policy=policy)
    roles.save_policy(tmp_path)
    check_policy(roles, tmp_path, IDS)
    spoil(tmp_path, part)
    with pytest.raises(RuntimeError, match="does not survive being saved.*nothing was published"):
        check_policy(roles, tmp_path, IDS)


def test_a_whole_policy_stops_where_its_tokenizer_says(trained: Callable[..., Roles], tmp_path: Path) -> None:
    """Under SFT's adapter lies a base whose files name the end of a text."""
    run: Any = SimpleNamespace(
        recipe=SimpleNamespace(publish_value=None),
        inputs=SimpleNamespace(versions={"sft": SimpleNamespace(manifest={"base": None})}),
        folder=tmp_path,
        publish=lambda write, **_: write(tmp_path / "policy"),
    )
    tokenizer: Any = SimpleNamespace(pad_token_id=3, eos_token_id=9, eos_token="<|im_end|>", save_pretrained=id)
    publish(run, trained(policy="full"), tokenizer, {}, IDS)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((tmp_path / "policy" / name).read_text())
        assert (settings["eos_token_id"], settings["pad_token_id"]) == (9, 3)


@pytest.mark.parametrize("critic", ["adapter", "shared", "separate"])
def test_a_critic_that_does_not_come_back_is_refused(
    critic: str, trained: Callable[..., Roles], tmp_path: Path
) -> None:
    roles = trained(critic=critic)
    roles.save_value(tmp_path)
    check_value(roles, tmp_path, TOKENIZER, IDS)
    spoil(tmp_path, "score")
    with pytest.raises(RuntimeError, match="it gives 0 where the critic in memory gives"):
        check_value(roles, tmp_path, TOKENIZER, IDS)
