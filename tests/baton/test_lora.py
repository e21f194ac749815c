"""A linear layer with a low-rank addition against the plain formula: values, gradients, formats."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from baton.lora import Acting, Addition, SharedLinear

SCALE = 1.7


def layer(kind: str, bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[SharedLinear, Acting, Any]:
    """5 -> 3, rank 2, for the role "x"; frozen, as in PPO."""
    torch.manual_seed(0)
    base: Any = nn.Linear(5, 3, bias=bias) if kind == "linear" else Conv1D(3, 5)
    if kind == "conv1d":
        base.bias.data = torch.randn(3)
    acting = Acting()
    shared = SharedLinear(base.requires_grad_(False), acting)
    shared.add("x", Addition(torch.randn(2, 5), torch.randn(3, 2), SCALE))
    shared.to(dtype)
    return shared, acting, base


def formula(x: torch.Tensor, base: Any, addition: Any, kind: str) -> torch.Tensor:
    weight = base.weight if kind == "linear" else base.weight.T
    plain = x @ weight.T + (0 if base.bias is None else base.bias)
    return plain + SCALE * ((x @ addition.down.T) @ addition.up.T)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 4, 5)])
@pytest.mark.parametrize(("kind", "bias"), [("linear", True), ("linear", False), ("conv1d", True)])
def test_values_and_gradients(kind: str, bias: bool, shape: tuple[int, ...]) -> None:
    shared, acting, base = layer(kind, bias)
    addition: Any = shared.additions["x"]
    acting.role = "x"
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    slopes = torch.randn(*shape[:-1], 3, dtype=torch.float64)
    wanted = (x, addition.down, addition.up)
    expected = formula(x, base, addition, kind)
    theirs = torch.autograd.grad((expected * slopes).sum(), wanted)
    found = shared(x)
    ours = torch.autograd.grad((found * slopes).sum(), wanted)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(shared(x), expected, rtol=0, atol=1e-12)


def test_without_a_role_it_is_the_base() -> None:
    shared, acting, base = layer("linear")
    x = torch.randn(4, 5, dtype=torch.float64)
    for role in (None, "another"):
        acting.role = role
        assert torch.equal(shared(x), base(x))


def test_frozen_factors_get_no_gradient_and_pass_one_on() -> None:
    shared, acting, base = layer("linear")
    addition: Any = shared.additions["x"].requires_grad_(False)
    acting.role = "x"
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    shared(x).sum().backward()
    assert addition.down.grad is None and addition.up.grad is None
    expected = base.weight.sum(0) + SCALE * (addition.up @ addition.down).sum(0)
    torch.testing.assert_close(x.grad, expected.expand(4, 5), rtol=0, atol=1e-12)


def test_an_input_without_gradient() -> None:
    """The first layer: only the factors want one."""
    shared, acting, base = layer("linear")
    addition: Any = shared.additions["x"]
    acting.role = "x"
    x = torch.randn(4, 5, dtype=torch.float64)
    shared(x).sum().backward()
    expected = torch.autograd.grad(formula(x, base, addition, "linear").sum(), (addition.down, addition.up))
    torch.testing.assert_close(addition.down.grad, expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(addition.up.grad, expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_float32_factors_on_a_bfloat16_base(kind: str) -> None:
    shared, acting, base = layer(kind, dtype=torch.bfloat16)
    addition: Any = shared.additions["x"].float()
    acting.role = "x"
    x = torch.randn(6, 5).bfloat16().requires_grad_(True)
    found = shared(x)
    assert found.dtype is torch.bfloat16
    found.float().sum().backward()
    assert addition.down.grad.dtype is torch.float32 and x.grad is not None and x.grad.dtype is torch.bfloat16
    exact: Any = SharedLinear(base.double(), acting)
    rounded = [factor.detach().bfloat16().double() for factor in (addition.down, addition.up)]
    exact.add("x", Addition(rounded[0], rounded[1], SCALE))
    wide = x.detach().double()
    torch.testing.assert_close(found.double(), exact(wide), rtol=0.02, atol=0.05)
    exact(wide).sum().backward()
    torch.testing.assert_close(addition.down.grad.double(), exact.additions["x"].down.grad, rtol=0.02, atol=0.05)
    torch.testing.assert_close(addition.up.grad.double(), exact.additions["x"].up.grad, rtol=0.02, atol=0.05)


def test_an_addition_of_another_shape_is_our_mistake() -> None:
    shared, _, _ = layer("linear")
    with pytest.raises(AssertionError):
        shared.add("y", Addition(torch.zeros(2, 3), torch.zeros(5, 2), 1.0))
