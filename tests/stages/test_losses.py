"""PPO's clipped losses against numbers worked by hand."""

import math

import pytest
import torch

from stages.losses import policy_loss, value_loss

ALL_BUT_LAST = torch.tensor([[True, True, True, True, False]])
RATIOS = [1.5, 1.5, 0.5, 0.5]


def policy_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities that make RATIOS, old ones, advantages; the last position is no response token."""
    old = torch.tensor([[-1.0, -2.0, -3.0, -0.5, -1.0]])
    new = old + torch.tensor([[*[math.log(ratio) for ratio in RATIOS], 50.0]])
    return new.requires_grad_(), old, torch.tensor([[1.0, -1.0, 1.0, -2.0, 7.0]])


def test_policy_loss() -> None:
    new, old, advantages = policy_inputs()
    found = policy_loss(new, old, advantages, ALL_BUT_LAST, clip_ratio=0.2)
    # -min(r A, clip(r) A): -1.2 (clipped), 1.5, -0.5, 1.6 (clipped)
    assert found.loss.item() == pytest.approx(1.4)
    assert int(found.num_clipped) == 2
    # sum of r - 1 - ln r: 2 (0.5 - ln 1.5) + 2 (-0.5 - ln 0.5) = 2 ln(4/3)
    assert found.approx_kl.item() == pytest.approx(2 * math.log(4 / 3), rel=1e-5)


def test_policy_gradient_is_cut_where_the_clip_is_active() -> None:
    new, old, advantages = policy_inputs()
    policy_loss(new, old, advantages, ALL_BUT_LAST, clip_ratio=0.2).loss.backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, torch.tensor([[0.0, 1.5, -0.5, 0.0, 0.0]]))


def test_policy_loss_before_an_update_is_the_plain_policy_gradient() -> None:
    old = torch.tensor([[-1.0, -2.0]])
    new, advantages = old.clone().requires_grad_(), torch.tensor([[3.0, -4.0]])
    found = policy_loss(new, old, advantages, torch.ones(1, 2, dtype=torch.bool), clip_ratio=0.2)
    found.loss.backward()
    assert found.loss.item() == 1.0 and int(found.num_clipped) == 0 and found.approx_kl.item() == 0.0
    assert new.grad is not None and new.grad.tolist() == [[-3.0, 4.0]]


def test_value_loss() -> None:
    values = torch.tensor([[0.5, -0.5, 0.1, 1e6]], requires_grad=True)
    is_response = torch.tensor([[True, True, True, False]])
    found = value_loss(values, torch.zeros(1, 4), torch.ones(1, 4), is_response, clip_range=0.2)
    # 0.5: max(0.25, (0.2 - 1)^2 = 0.64), clipped; -0.5: max(2.25, 1.44); 0.1: inside the range, 0.81; each halved
    assert found.loss.item() == pytest.approx(0.5 * (0.64 + 2.25 + 0.81))
    assert int(found.num_clipped) == 1
    found.loss.backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, -1.5, -0.9, 0.0]]))
