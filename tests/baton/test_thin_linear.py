"""Products of a few rows with a large weight: values as of the plain order, and what is left alone."""

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional

from baton.thin_linear import Packed, can_pack, linear, thin_products


def test_bfloat16_products_from_the_weights_side(tiny_llama: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((3, 2, 40), (24, 40), (24,)))
    with torch.no_grad():
        for given in (None, bias):
            exact = functional.linear(x.double(), weight.double(), given.double() if given is not None else None)
            found = linear(x, weight, given)
            assert found.shape == (3, 2, 24) and found.is_contiguous() and found.dtype is torch.bfloat16
            assert (found.double() - exact).abs().max() < 2**-8 * exact.abs().max() * 2
        assert torch.equal(linear(x.float(), weight.float()), functional.linear(x.float(), weight.float()))
        many = x[:1].expand(40, 2, 40)
        assert torch.equal(linear(many, weight), functional.linear(many, weight))
    model = copy.deepcopy(tiny_llama).bfloat16()
    with torch.no_grad(), thin_products(model):
        assert "forward" in vars(model.lm_head)
        inside = model(input_ids=torch.tensor([[3, 4, 5]])).logits.float()
    assert "forward" not in vars(model.lm_head)
    with torch.no_grad():
        outside = model(input_ids=torch.tensor([[3, 4, 5]])).logits.float()
    assert (inside - outside).abs().max() < 0.05 * outside.abs().max()


@pytest.mark.parametrize("rows", [(1,), (3, 2), (40, 7)])
def test_a_packed_weight_gives_the_same_products(rows: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((*rows, 40), (48, 40), (48,)))
    for part in (weight, weight[5:29], weight.T.contiguous().T):  # a part of a joined matrix, or one kept transposed
        packed = Packed(part)
        weight_before = part.clone()
        for given in (None, bias[: len(part)]):
            exact = functional.linear(x.double(), part.double(), given.double() if given is not None else None)
            with torch.no_grad():
                found = packed(x, given)
            assert found.shape == (*rows, len(part)) and found.dtype is torch.bfloat16
            assert (found.double() - exact).abs().max() < 2**-8 * exact.abs().max() * 2
        assert torch.equal(part, weight_before)


def test_other_formats_are_not_packed() -> None:
    x, weight = torch.randn(3, 40), torch.randn(24, 40)
    assert not can_pack(weight)
    assert torch.equal(Packed(weight)(x), functional.linear(x, weight))
    assert not can_pack(torch.empty(24, 40, dtype=torch.bfloat16, device="meta"))
