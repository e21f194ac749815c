"""Products of a few rows with a large weight, bound by reading the weight: bfloat16 on a CPU, as in decoding.

A weight that is asked for again and again is best laid out once as oneDNN's kernels read it: `Packed`. On two cores
with AVX512-BF16 and SmolLM2's shapes the products of a decoding step then take 17 ms instead of 26 for 16 rows.

Where a copy of the weight is too much, oneDNN multiplies faster from the weight's side: W x^T instead of x W^T. On one
core with AMX the output head takes 3.5 ms instead of 8 for 16 rows, the other layers between 0.6 and 1 times as long,
and a whole decoding step 0.93 times. With 64 rows nothing is left of it; in float32, and on GPUs, the plain order is
better.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn import functional

MOST_ROWS = 32


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b, as functional.linear: x (…, in), weight (out, in), bias (out,) -> (…, out), contiguous."""
    rows = x.numel() // x.shape[-1]
    # flat: for rows that lie apart (the last token of each prompt) torch would copy the weight once a row
    flat = x.reshape(rows, x.shape[-1])
    if torch.is_grad_enabled() or rows > MOST_ROWS or x.dtype is not torch.bfloat16 or x.device.type != "cpu":
        return functional.linear(flat, weight, bias).view(*x.shape[:-1], len(weight))
    product = (weight @ flat.T).T.contiguous()
    if bias is not None:
        product += bias
    return product.view(*x.shape[:-1], len(weight))


class Packed:
    """A copy of a weight (out, in) for products without gradients, laid out as the processor's kernels read it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.shape = weight.shape
        self._packed, self._weight = can_pack(weight), weight.detach()
        if self._packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight.contiguous())

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b, as functional.linear: x (…, in), bias (out,) -> (…, out)."""
        if not self._packed:
            return functional.linear(x, self._weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, bias, "none", [], "")  # type: ignore[no-any-return]


def can_pack(weight: torch.Tensor) -> bool:
    """Whether packing this weight makes a difference: bfloat16, on a CPU that computes with it."""
    if weight.dtype is not torch.bfloat16 or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return all(hasattr(torch.ops.mkldnn, name) for name in names) and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def thin_products(model: nn.Module) -> Iterator[None]:
    """Inside, the model's plain linear layers on a CPU multiply by `linear`."""
    changed = [
        module
        for module in model.modules()
        # not a subclass: what it adds would be lost
        if type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.device.type == "cpu"
        and "forward" not in vars(module)
    ]
    for module in changed:
        module.forward = partial(_forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _forward(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, module.weight, module.bias)
