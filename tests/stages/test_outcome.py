"""Nothing is published that, reloaded, is not what was in memory."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.outcome import check_policy, check_value
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
