"""A frozen linear layer that several roles share, each with a low-rank addition of its own (Hu et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Acting:
    """Which role the layers of a model act for at the moment; None is the base alone."""

    def __init__(self) -> None:
        self.role: str | None = None


class Addition(nn.Module):
    """scale x up(down(x)): one role's low-rank addition; `down` (r, in), `up` (out, r), `scale` alpha / r."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.down, self.up, self.scale = nn.Parameter(down), nn.Parameter(up), scale
        self._cast: tuple[torch.Tensor, torch.Tensor] | None = None

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(down, up) in the number format of the input."""
        return self._cast or (self.down.to(dtype), self.up.to(dtype))

    def hold_cast(self, dtype: torch.dtype | None) -> None:
        """Keep the factors in `dtype` until called with None: decoding asks for them at every token."""
        self._cast = None if dtype is None else (self.down.detach().to(dtype), self.up.detach().to(dtype))


class SharedLinear(nn.Module):
    """y = x W^T + b, plus the addition of the role that acts, where it has one here.

    Takes the weight and bias of `base`: an nn.Linear, or transformers' Conv1D, which keeps its weight transposed.
    """

    def __init__(self, base: nn.Module, acting: Acting) -> None:
        super().__init__()
        self.base, self.additions, self._acting = base, nn.ModuleDict(), acting
        self._transposed = not isinstance(base, nn.Linear)

    def add(self, role: str, addition: Addition) -> None:
        """Give `role` an addition. Its factors must have the layer's shape."""
        weight: Any = self.base.weight
        out, size = weight.shape[::-1] if self._transposed else weight.shape
        assert (addition.up.shape[0], addition.down.shape[1]) == (out, size), (role, addition.up.shape, out, size)
        self.additions[role] = addition

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        role = self._acting.role
        if role is None or role not in self.additions:
            return self.base(x)
        addition: Any = self.additions[role]
        weight: Any = self.base.weight
        down, up = addition.factors(x.dtype)
        weight = weight.T if self._transposed else weight
        if not torch.is_grad_enabled():
            return _shared_forward(x, weight, self.base.bias, down, up, addition.scale)[0]  # type: ignore[arg-type]
        return _Shared.apply(x, weight, self.base.bias, down, up, addition.scale)  # type: ignore[no-any-return,no-untyped-call]


def _shared_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor, up: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flat = x.reshape(-1, x.shape[-1])
    inner = flat @ down.T
    out = functional.linear(flat, weight, bias).addmm_(inner, up.T, alpha=scale)
    return out.view(*x.shape[:-1], out.shape[-1]), flat, inner


class _Shared(torch.autograd.Function):
    """The same with gradients for x, `down` and `up` alone: the frozen weight costs one product each way.

    Autograd of the plain formula would keep the base's output and the addition's output beside the sum, and make
    three passes over the output where `addmm` makes one.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        assert not weight.requires_grad, "a shared weight is frozen"
        out, flat, inner = _shared_forward(x, weight, bias, down, up, scale)
        ctx.save_for_backward(flat, inner, weight, down, up)
        ctx.scale, ctx.shape = scale, x.shape
        return out

    @staticmethod
    def backward(ctx: Any, given: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        flat, inner, weight, down, up = ctx.saved_tensors
        given = given.reshape(-1, given.shape[-1])
        to_inner = (given @ up).mul_(ctx.scale)
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (given @ weight).addmm_(to_inner, down).view(ctx.shape)
        to_down = to_inner.T @ flat if ctx.needs_input_grad[3] else None
        to_up = (given.T @ inner).mul_(ctx.scale) if ctx.needs_input_grad[4] else None
        return to_x, None, None, to_down, to_up, None
