"""PPO's clipped losses against numbers worked by hand."""

import math
from typing import Any

import pytest
import torch

from stages.losses import PolicyLoss, policy_loss, value_loss

ALL_BUT_LAST = torch.tensor([[True, True, True, True, False]])
RATIOS = [1.5, 1.5, 0.5, 0.5]


def policy_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities that make RATIOS, old ones, advantages; the last position is no response token."""
    old = torch.tensor([[-1.0, -2.0, -3.0, -0.5, -1.0]])
    new = old + torch.tensor([[*[math.log(ratio) for ratio in RATIOS], 50.0]])
    return new.requires_grad_(), old, torch.tensor([[1.0, -1.0, 1.0, -2.0, 7.0]])


def found_with(low: float = 0.2, high: float = 0.2, **options: Any) -> tuple[PolicyLoss, list[float]]:
    """The loss of `policy_inputs`, and its gradient a token."""
    new, old, advantages = policy_inputs()
    found = policy_loss(new, old, advantages, ALL_BUT_LAST, low, high, **options)
    found.loss.backward()
    assert new.grad is not None
    return found, new.grad[0].tolist()


def test_policy_loss() -> None:
    found, gradient = found_with()
    # -min(r A, clip(r) A): -1.2 (clipped), 1.5, -0.5, 1.6 (clipped)
    assert found.loss.item() == pytest.approx(1.4)
    assert int(found.num_clipped) == 2
    assert gradient == pytest.approx([0.0, 1.5, -0.5, 0.0, 0.0])
    # sum of r - 1 - ln r: 2 (0.5 - ln 1.5) + 2 (-0.5 - ln 0.5) = 2 ln(4/3)
    assert found.approx_kl.item() == pytest.approx(2 * math.log(4 / 3), rel=1e-5)


def test_two_bounds() -> None:
    """1 - 0.6 lets the falls pass, 1 + 0.4 cuts the first rise later."""
    found, gradient = found_with(0.6, 0.4)
    # -1.4 (clipped), 1.5, -0.5, 1.0
    assert found.loss.item() == pytest.approx(0.6)
    assert int(found.num_clipped) == 1
    assert gradient == pytest.approx([0.0, 1.5, -0.5, 1.0, 0.0])


@pytest.mark.parametrize(
    ("dual_clip", "losses", "clipped", "gradient"),
    [
        # the second, A = -1 and r = 1.5, costs 1.5: bounded at 1.2; the last, A = -2, costs 1.6, under 2.4
        (1.2, [-1.2, 1.2, -0.5, 1.6], 3, [0.0, 0.0, -0.5, 0.0, 0.0]),
        # nothing costs more than twice its advantage
        (2.0, [-1.2, 1.5, -0.5, 1.6], 2, [0.0, 1.5, -0.5, 0.0, 0.0]),
    ],
)
def test_dual_clip(dual_clip: float, losses: list[float], clipped: int, gradient: list[float]) -> None:
    found, slopes = found_with(dual_clip=dual_clip)
    assert found.loss.item() == pytest.approx(sum(losses))
    assert int(found.num_clipped) == clipped
    assert slopes == pytest.approx(gradient)


def test_dual_clip_leaves_positive_advantages_alone() -> None:
    new, old = torch.tensor([[math.log(3.0)]]), torch.zeros(1, 1)
    one = torch.ones(1, 1, dtype=torch.bool)
    # r = 3, A = 1, and a ratio that may rise to 6: the loss is -3, though 3 > 1.5
    assert policy_loss(new, old, torch.ones(1, 1), one, 0.2, 5.0, dual_clip=1.5).loss.item() == pytest.approx(-3.0)
    assert policy_loss(new, old, -torch.ones(1, 1), one, 0.2, 5.0, dual_clip=1.5).loss.item() == pytest.approx(1.5)


def test_importance_weights_weigh_loss_and_gradient() -> None:
    found, gradient = found_with(weights=torch.tensor([[2.0, 0.5, 1.0, 0.0, 9.0]]))
    # 2 x -1.2, 0.5 x 1.5, -0.5, 0
    assert found.loss.item() == pytest.approx(-2.4 + 0.75 - 0.5)
    assert gradient == pytest.approx([0.0, 0.75, -0.5, 0.0, 0.0])
    assert int(found.num_clipped) == 2


def test_policy_loss_before_an_update_is_the_plain_policy_gradient() -> None:
    old = torch.tensor([[-1.0, -2.0]])
    new, advantages = old.clone().requires_grad_(), torch.tensor([[3.0, -4.0]])
    found = policy_loss(new, old, advantages, torch.ones(1, 2, dtype=torch.bool), 0.2, 0.2)
    found.loss.backward()
    assert found.loss.item() == 1.0 and int(found.num_clipped) == 0 and found.approx_kl.item() == 0.0
    assert new.grad is not None and new.grad.tolist() == [[-3.0, 4.0]]


def test_what_is_no_response_never_weighs_in() -> None:
    """Not even where padding's numbers are not numbers."""
    new = torch.tensor([[-1.0, float("nan")]], requires_grad=True)
    old, advantages = torch.tensor([[-1.0, float("inf")]]), torch.tensor([[2.0, 1.0]])
    found = policy_loss(new, old, advantages, torch.tensor([[True, False]]), 0.2, 0.2)
    found.loss.backward()
    assert found.loss.item() == -2.0 and found.approx_kl.item() == 0.0
    assert new.grad is not None and new.grad.tolist() == [[-2.0, 0.0]]


def test_value_loss() -> None:
    values = torch.tensor([[0.5, -0.5, 0.1, 1e6]], requires_grad=True)
    is_state = torch.tensor([[True, True, True, False]])
    found = value_loss(values, torch.zeros(1, 4), torch.ones(1, 4), is_state, clip_range=0.2)
    # 0.5: max(0.25, (0.2 - 1)^2 = 0.64), clipped; -0.5: max(2.25, 1.44); 0.1: inside the range, 0.81; each halved
    assert found.loss.item() == pytest.approx(0.5 * (0.64 + 2.25 + 0.81))
    assert int(found.num_clipped) == 1
    found.loss.backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, -1.5, -0.9, 0.0]]))
