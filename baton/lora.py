"""Frozen linear layers that several roles share, each with a low-rank addition of its own (Hu et al. 2021).

Layers that read the same input (query, key and value; gate and up) can be joined: their weights lie in one matrix, and
a role's additions in one pair of factors, so that a family costs one product where it had three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from baton.thin_linear import Packed

FAMILIES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one parent that are given the same input, by the names that decoders use."""


class Acting:
    """Which role the layers of a model act for at the moment; None is the base alone."""

    def __init__(self) -> None:
        self.role: str | None = None


class Addition(nn.Module):
    """scale x up(down(x)): one role's low-rank addition; `down` (r, in), `up` (out, r), `scale` alpha / r."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.down, self.up, self.scale = nn.Parameter(down), nn.Parameter(up), scale


class Held(NamedTuple):
    """A role's weights for decoding, which asks for them at every token."""

    down: Packed | None  # (R, in); None where the role has no addition
    widened: Packed  # (out, in + R): the base's weight, and the additions' up factors

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What the family makes of x (…, in): (…, out)."""
        return self.widened(x if self.down is None else torch.cat([x, self.down(x)], dim=-1), bias)


class Family:
    """One or more shared layers with the same input, computed together."""

    def __init__(self, members: Sequence[SharedLinear]) -> None:
        self.members = list(members)
        self.held: dict[str | None, Held] = {}
        self._given: torch.Tensor | None = None
        self._role: str | None = None
        self._ready: dict[int, torch.Tensor] = {}
        if len(self.members) > 1:
            self._join()

    def _join(self) -> None:
        """Lay the members' weights (and biases) into one matrix; each keeps its rows of it."""
        weights: list[Any] = [member.base.weight for member in self.members]
        joined = torch.cat([weight.detach() for weight in weights])
        for weight, rows in zip(weights, joined.split([len(weight) for weight in weights]), strict=True):
            weight.data = rows
        self._weight: torch.Tensor | None = joined
        biases: list[Any] = [member.base.bias for member in self.members]
        self._bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])

    def base(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight (out, in), bias (out,) or None) of all members."""
        if len(self.members) > 1:
            assert self._weight is not None
            first: Any = self.members[0].base.weight
            assert first.data_ptr() == self._weight.data_ptr(), "join comes after the last .to() or copy of the model"
            return self._weight, self._bias
        member = self.members[0]
        weight: Any = member.base.weight
        return (weight.T if member.transposed else weight), member.base.bias  # type: ignore[return-value]

    def output(self, member: SharedLinear, x: torch.Tensor, role: str | None) -> torch.Tensor:
        """What `member` makes of `x`; its relatives' outputs are kept until they are asked for with the same `x`."""
        if len(self.members) == 1:
            return self.compute(x, role)
        if x is not self._given or role != self._role or id(member) not in self._ready:
            parts = self.compute(x, role).split([m.size for m in self.members], dim=-1)
            self._given, self._role = x, role
            self._ready = {id(relative): part for relative, part in zip(self.members, parts, strict=True)}
        found = self._ready.pop(id(member))
        if not self._ready:
            self._given = None
        return found

    def compute(self, x: torch.Tensor, role: str | None) -> torch.Tensor:
        """(…, in) -> (…, out) of all members, one after the other, with what is held for the role where it is."""
        if role in self.held and not torch.is_grad_enabled():
            return self.held[role](x, self.base()[1])
        product, factors = self.product(role)
        if not factors:
            return functional.linear(x, product.weight, product.bias)
        return _Shared.apply(x, product, *factors)  # type: ignore[no-any-return,no-untyped-call]

    def product(self, role: str | None) -> tuple[Product, list[torch.Tensor]]:
        """What the members compute for the role, and its factors: down and up of each addition."""
        weight, bias = self.base()
        starts, additions = self.additions(role)
        factors = _factors(additions)
        sizes = [(len(addition.down), len(addition.up), addition.up.dtype) for addition in additions]
        return Product(weight, bias, starts, [addition.scale for addition in additions], sizes), factors

    def additions(self, role: str | None) -> tuple[list[int], list[Addition]]:
        """The role's additions among the members, and at which output each begins."""
        starts, found, at = [], [], 0
        for member in self.members:
            if role is not None and role in member.additions:
                starts.append(at)
                found.append(member.addition(role))
            at += member.size
        return starts, found

    def hold(self, role: str | None) -> None:
        """Keep the role's weights as decoding wants them, a copy, until `release`."""
        starts, additions = self.additions(role)
        weight, _ = self.base()
        if not additions:
            self.held[role] = Held(None, Packed(weight))
            return
        factors = [factor.detach() for factor in _factors(additions)]
        scales = [addition.scale for addition in additions]
        down, up = _joined_factors(factors, starts, scales, len(weight), weight.dtype)
        self.held[role] = Held(Packed(down), Packed(torch.cat([weight, up], dim=1)))

    def release(self, role: str | None) -> None:
        """Forget what `hold` kept."""
        self.held.pop(role, None)


class SharedLinear(nn.Module):
    """y = x W^T + b, plus the addition of the role that acts, where it has one here.

    Takes the weight and bias of `base`: an nn.Linear, or transformers' Conv1D, which keeps its weight transposed.
    """

    def __init__(self, base: nn.Module, acting: Acting) -> None:
        super().__init__()
        self.base, self.additions, self._acting = base, nn.ModuleDict(), acting
        self.transposed = not isinstance(base, nn.Linear)
        self.family = Family([self])

    @property
    def size(self) -> int:
        """The number of outputs."""
        weight: Any = self.base.weight
        return int(weight.shape[1 if self.transposed else 0])

    @property
    def role(self) -> str | None:
        """Whom the layer acts for at the moment."""
        return self._acting.role

    def addition(self, role: str) -> Addition:
        """The role's; it must have one."""
        found = self.additions[role]
        assert isinstance(found, Addition)
        return found

    def add(self, role: str, addition: Addition) -> None:
        """Give `role` an addition. Its factors must have the layer's shape."""
        weight: Any = self.base.weight
        out, size = weight.shape[::-1] if self.transposed else weight.shape
        assert (addition.up.shape[0], addition.down.shape[1]) == (out, size), (role, addition.up.shape, out, size)
        self.additions[role] = addition

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.family.output(self, x, self._acting.role)


def families(model: nn.Module) -> list[Family]:
    """The families of all shared layers of a model, each once."""
    found = {id(m.family): m.family for m in model.modules() if isinstance(m, SharedLinear)}
    return list(found.values())


def join_families(model: nn.Module) -> None:
    """Join the layers of FAMILIES where all of them are shared; after the model has its device and number format.

    Not for sharded weights: those of one matrix cannot be shared out one by one.
    """
    for parent in model.modules():
        for names in FAMILIES:
            members = [getattr(parent, name, None) for name in names]
            if all(isinstance(m, SharedLinear) and isinstance(m.base, nn.Linear) for m in members):
                layers: list[Any] = members
                if len({layer.base.bias is None for layer in layers}) == 1:
                    family = Family(layers)
                    for layer in layers:
                        layer.family = family


def _factors(additions: Sequence[Addition]) -> list[torch.Tensor]:
    """down and up of each, one after the other."""
    return [factor for addition in additions for factor in (addition.down, addition.up)]


def _joined_factors(
    flat: Sequence[torch.Tensor], starts: Sequence[int], scales: Sequence[float], out: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(down (R, in), up (out, R)) of several additions: `up` is block-diagonal and holds the scales."""
    downs, ups = flat[::2], flat[1::2]
    if len(downs) == 1 and len(ups[0]) == out:
        return downs[0].to(dtype), (ups[0] * scales[0]).to(dtype)
    joined = torch.zeros(out, sum(len(down) for down in downs), dtype=dtype, device=ups[0].device)
    column = 0
    for up, start, scale in zip(ups, starts, scales, strict=True):
        joined[start : start + len(up), column : column + up.shape[1]] = up * scale
        column += up.shape[1]
    return torch.cat(list(downs)).to(dtype), joined


class Product(NamedTuple):
    """x W^T + b + x down^T up^T of a family for one role, and its gradients; the weight is frozen.

    Autograd of the plain formula would keep the base's output and the addition's output beside the sum, and make
    three passes over the output where `addmm` makes one.
    """

    weight: torch.Tensor  # (out, in)
    bias: torch.Tensor | None  # (out,)
    starts: list[int]  # the output at which each addition begins
    scales: list[float]
    sizes: list[tuple[int, int, torch.dtype]]  # of each addition: rank, outputs, number format of its factors

    def __call__(
        self, x: torch.Tensor, factors: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """x (N, in) and the additions' factors -> (N, out), and what `backward` wants."""
        out = functional.linear(x, self.weight, self.bias)
        if not factors:
            return out, ()
        down, up = _joined_factors(factors, self.starts, self.scales, len(self.weight), x.dtype)
        inner = x @ down.T
        return out.addmm_(inner, up.T), (inner, down, up)

    def backward(
        self, given: torch.Tensor, x: torch.Tensor, kept: Sequence[torch.Tensor], *, to_x: bool, to_factors: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """From the gradient (N, out) of the output: those of x (N, in) and of the factors, in their number format."""
        grown = given @ self.weight if to_x else None
        if not kept:
            return grown, []
        inner, down, up = kept
        to_inner = given @ up
        if grown is not None:
            grown.addmm_(to_inner, down)
        if not to_factors:
            return grown, [None] * (2 * len(self.sizes))
        # the side with few rows first: half the time of the other order
        to_down, to_up = to_inner.T @ x, (inner.T @ given).T
        found: list[torch.Tensor | None] = []
        row = 0
        for (rank, out, dtype), start, scale in zip(self.sizes, self.starts, self.scales, strict=True):
            found.append(to_down[row : row + rank].to(dtype))
            found.append(to_up[start : start + out, row : row + rank].to(dtype) * scale)
            row += rank
        return grown, found


class _Shared(torch.autograd.Function):
    """A family's product within autograd's graph."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, product: Product, *factors: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        assert not product.weight.requires_grad, "a shared weight is frozen"
        flat = x.reshape(-1, x.shape[-1])
        out, kept = product(flat, factors)
        ctx.save_for_backward(flat, *kept)
        ctx.product, ctx.shape = product, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, given: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        flat, *kept = ctx.saved_tensors
        to_x, to_factors = ctx.product.backward(
            given.reshape(-1, given.shape[-1]),
            flat,
            kept,
            to_x=ctx.needs_input_grad[0],
            to_factors=any(ctx.needs_input_grad[2:]),
        )
        return None if to_x is None else to_x.view(ctx.shape), None, *to_factors
