"""Log-probabilities without the table of logits, against the table."""

from typing import Any

import pytest
import torch

from baton import logprobs as module
from baton.logprobs import token_logprobs

TEMPERATURE = 0.7


def case(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """13 positions, 7 wide, 29 tokens."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(13, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(29, 7, generator=generator, dtype=torch.float64)
    bias = torch.randn(29, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), torch.randint(0, 29, (13,), generator=generator)


def plainly(hidden: Any, weight: Any, bias: Any, tokens: Any) -> tuple[torch.Tensor, torch.Tensor]:
    logits = hidden @ weight.T / TEMPERATURE + (0 if bias is None else bias / TEMPERATURE)
    table = logits.log_softmax(-1)
    return table[torch.arange(len(tokens)), tokens], -(table.exp() * table).sum(-1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 4 positions and 8 tokens: the last ones are short."""
    monkeypatch.setitem(module.TILES, "cpu", (4, 8))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("trained", ["nothing", "hidden", "head"])
@pytest.mark.parametrize("entropy", [False, True])
def test_values_and_gradients_equal_the_tables(with_bias: bool, trained: str, entropy: bool) -> None:
    hidden, weight, bias, tokens = case()
    given: list[Any] = [hidden, weight, bias if with_bias else None]
    for tensor in given[: {"nothing": 0, "hidden": 1, "head": 3}[trained]]:
        if tensor is not None:
            tensor.requires_grad_(True)
    found = token_logprobs(*given, tokens, TEMPERATURE, entropy_gradient=entropy)
    expected = plainly(*given, tokens)
    torch.testing.assert_close(found.logprobs, expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.entropies, expected[1], rtol=0, atol=1e-12)
    if trained == "nothing":
        return
    weights = torch.linspace(-1, 2, 13, dtype=torch.float64)
    wanted = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
    ours = (found.logprobs * weights).sum() + (found.entropies * weights.flip(0)).sum() * (1.0 if entropy else 0.0)
    theirs = (expected[0] * weights).sum() + (expected[1] * weights.flip(0)).sum() * (1.0 if entropy else 0.0)
    for mine, plain in zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(theirs, wanted), strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-12)


def test_a_token_of_no_probability_stays_finite() -> None:
    hidden, weight = torch.tensor([[300.0]]), torch.tensor([[1.0], [-1.0]])
    found = token_logprobs(hidden.requires_grad_(True), weight, None, torch.tensor([1]), 1.0)
    assert float(found.logprobs.detach()) == pytest.approx(-600.0)
    found.logprobs.backward()
    assert float(hidden.grad) == pytest.approx(-2.0)  # d/dh of -h - h


def test_bfloat16_keeps_float32_log_probabilities() -> None:
    hidden, weight, _, tokens = case(torch.bfloat16)
    found = token_logprobs(hidden.requires_grad_(True), weight, None, tokens, TEMPERATURE)
    assert found.logprobs.dtype is torch.float32
    expected = plainly(hidden.detach().double(), weight.double(), None, tokens)
    torch.testing.assert_close(found.logprobs.detach().double(), expected[0], rtol=0, atol=0.05)
    found.logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype is torch.bfloat16
