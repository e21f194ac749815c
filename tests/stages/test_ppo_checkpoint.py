"""PPO's checkpoints: what is saved comes back bit by bit, and a half-written one is never seen."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stages import ppo_checkpoint
from stages.ppo_checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def trained(roles: Any) -> tuple[Any, torch.optim.Optimizer]:
    """Roles after two optimizer steps on made-up gradients."""
    optimizer = torch.optim.AdamW(list(roles.trained_parameters().values()), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for parameter in roles.trained_parameters().values():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return roles, optimizer


def weights(roles: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in roles.trained_parameters().items()}


def test_weights_moments_and_state_come_back(trained: Any, role_folders: Any, tmp_path: Path) -> None:
    from stages.roles import Roles

    roles, optimizer = trained
    previous = {name: tensor + 1 for name, tensor in weights(roles).items()}
    path = save_checkpoint(tmp_path, 4, roles, optimizer, previous, {"scale": [1.0, 2.0, 3.5]})
    assert path == tmp_path / "checkpoint-4" and (path / "complete").is_file()
    fresh = Roles(*role_folders, torch.float32, 0.7).double()
    fresh_optimizer = torch.optim.AdamW(list(fresh.trained_parameters().values()), lr=0.01)
    state, back = load_checkpoint(path, fresh, fresh_optimizer)
    assert state == {"step": 4, "scale": [1.0, 2.0, 3.5]}
    for name, tensor in weights(roles).items():
        assert torch.equal(weights(fresh)[name], tensor) and torch.equal(back[name], previous[name])
    # one more step of both, on the same gradients, is the same step
    for each in (roles, fresh):
        for parameter in each.trained_parameters().values():
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    fresh_optimizer.step()
    for name, tensor in weights(roles).items():
        assert torch.equal(weights(fresh)[name], tensor)


def test_only_the_last_two_are_kept(trained: Any, tmp_path: Path) -> None:
    roles, optimizer = trained
    for step in (8, 9, 10):
        save_checkpoint(tmp_path, step, roles, optimizer, weights(roles), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]


def test_a_checkpoint_cut_off_while_being_written_is_no_checkpoint(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles, optimizer = trained

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ppo_checkpoint, "save_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, 1, roles, optimizer, weights(roles), {})
    assert list(tmp_path.glob("checkpoint-*")) == []
    save_checkpoint(tmp_path, 1, roles, optimizer, weights(roles), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]
