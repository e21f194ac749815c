"""Log-probabilities and entropies of tokens from hidden states, without ever holding the table of logits.

N positions, H hidden size, V vocabulary. The output head is applied to a tile of positions and vocabulary at a time,
and the tiles are put together as they come (the online softmax of Milakov and Gimelshein 2018); gradients are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from baton.sampling import LEAST_EXPONENT

TILES = {"cpu": (512, 2048), "cuda": (2048, 1 << 15)}
"""Positions and vocabulary of one tile. On a CPU a tile should stay in its cache: 4 MiB in float32 here;
with whole rows the same work took six times as long."""


class TokenLogprobs(NamedTuple):
    """What the head says at N positions, at least float32."""

    logprobs: torch.Tensor  # (N,) of the given tokens
    entropies: torch.Tensor  # (N,) in nats, of the whole distribution


class _Head(NamedTuple):
    """The output head and the temperature that its logits are divided by."""

    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    temperature: float

    def tiles(self) -> Iterator[tuple[int, int]]:
        size = TILES.get(self.weight.device.type, TILES["cuda"])[1]
        for at in range(0, len(self.weight), size):
            yield at, min(at + size, len(self.weight))

    def logits(self, hidden: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """(n, end - start), at least float32."""
        bias = None if self.bias is None else self.bias[start:end]
        found = functional.linear(hidden, self.weight[start:end], bias)
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        return found.div_(self.temperature) if self.temperature != 1.0 else found


class _Summary(NamedTuple):
    """n positions over the whole vocabulary."""

    norms: torch.Tensor  # (n,): log of the sum of exp(logit)
    means: torch.Tensor  # (n,): expected logit
    chosen: torch.Tensor  # (n,): the token's logit
    weights: torch.Tensor | None  # (n, H): expected row of the head's weight
    products: torch.Tensor | None  # (n, H): expected logit x row


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tokens: torch.Tensor,
    temperature: float,
    *,
    entropy_gradient: bool = False,
) -> TokenLogprobs:
    """log softmax((hidden weight^T + bias) / temperature) at `tokens`, and the distribution's entropy.

    hidden (N, H), weight (V, H), bias (V,) or None, tokens (N,). The entropies have a gradient only where asked for.
    """
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        head = _Head(weight, bias, temperature)
        found = hidden.new_empty((2, len(hidden)), dtype=_wide(hidden))
        for part in _rows(hidden):
            summary = _summarise(hidden[part], head, tokens[part])
            found[0, part], found[1, part] = summary.chosen - summary.norms, summary.norms - summary.means
        return TokenLogprobs(found[0], found[1])
    trains_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    function = _TrainedHead if trains_head else _FrozenHead
    given = (hidden, weight, bias, tokens, temperature, entropy_gradient)
    logprobs, entropies = function.apply(*given)  # type: ignore[no-untyped-call]
    return TokenLogprobs(logprobs, entropies if entropy_gradient else entropies.detach())


def _rows(hidden: torch.Tensor) -> list[slice]:
    size = TILES.get(hidden.device.type, TILES["cuda"])[0]
    return [slice(at, at + size) for at in range(0, len(hidden), size)]


def _wide(hidden: torch.Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _summarise(hidden: torch.Tensor, head: _Head, tokens: torch.Tensor, slopes: int = 0) -> _Summary:
    """`slopes`: 1 for the expected weight row, 2 for the expected product too.

    Sums are kept relative to the largest logit so far; where a tile has a larger one, they are scaled down to it.
    """
    shape, wide = (len(hidden), 1), _wide(hidden)
    top = hidden.new_full(shape, -torch.inf, dtype=wide)
    mass, first, chosen = (hidden.new_zeros(shape, dtype=wide) for _ in range(3))
    sums = [torch.zeros(hidden.shape, dtype=wide, device=hidden.device) for _ in range(slopes)]
    for start, end in head.tiles():
        logits = head.logits(hidden, start, end)
        inside = (tokens >= start) & (tokens < end)
        at = (tokens - start).clamp(0, end - start - 1)[:, None]
        chosen = torch.where(inside[:, None], logits.gather(-1, at), chosen)
        higher = torch.maximum(top, logits.amax(-1, keepdim=True))
        scale = (top - higher).exp_()
        top = higher
        p = (logits - top).clamp_(min=LEAST_EXPONENT).exp_()
        mass = mass * scale + p.sum(-1, keepdim=True)
        rows = head.weight[start:end]
        if slopes:
            sums[0].mul_(scale).add_(p.to(hidden.dtype) @ rows)
        product = p.mul_(logits)
        first = first * scale + product.sum(-1, keepdim=True)
        if slopes > 1:
            sums[1].mul_(scale).add_(product.to(hidden.dtype) @ rows)
    norms, means = (top + mass.log()).squeeze(-1), (first / mass).squeeze(-1)
    expected = [*(item.div_(mass) for item in sums), None, None]
    return _Summary(norms, means, chosen.squeeze(-1), expected[0], expected[1])


class _FrozenHead(torch.autograd.Function):
    """With a frozen head all that the backward pass needs is one row a position, known in the forward pass.

    With z the logits, d logprob / d hidden = (W[token] - E[W]) / T and d entropy / d hidden = (E[z] E[W] - E[z W]) / T,
    expectations over the vocabulary: so no table of logits is kept, and none is computed twice.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tokens: torch.Tensor,
        temperature: float,
        entropy_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide, head = _wide(hidden), _Head(weight, bias, temperature)
        found = hidden.new_empty((2, len(hidden)), dtype=wide)
        slopes = torch.empty((1 + entropy_gradient, *hidden.shape), dtype=hidden.dtype, device=hidden.device)
        for part in _rows(hidden):
            summary = _summarise(hidden[part], head, tokens[part], 1 + entropy_gradient)
            found[0, part], found[1, part] = summary.chosen - summary.norms, summary.norms - summary.means
            assert summary.weights is not None
            slopes[0, part] = (weight[tokens[part]].to(wide) - summary.weights).div_(temperature)
            if entropy_gradient:
                assert summary.products is not None
                slopes[1, part] = (summary.means[:, None] * summary.weights - summary.products).div_(temperature)
        ctx.save_for_backward(slopes)
        return found[0], found[1]

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, to_logprobs: torch.Tensor, to_entropies: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        to_hidden = slopes[0] * to_logprobs[:, None].to(slopes.dtype)
        if len(slopes) > 1:
            to_hidden = to_hidden + slopes[1] * to_entropies[:, None].to(slopes.dtype)
        return to_hidden, None, None, None, None, None


class _TrainedHead(torch.autograd.Function):
    """A trained head's gradient needs every probability: the tiles are computed again in the backward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tokens: torch.Tensor,
        temperature: float,
        entropy_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = token_logprobs(hidden, weight, bias, tokens, temperature)  # gradients are off in here
        ctx.save_for_backward(hidden, weight, bias, tokens, found.entropies)
        ctx.temperature, ctx.entropy_gradient = temperature, entropy_gradient
        return found.logprobs, found.entropies

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, to_logprobs: torch.Tensor, to_entropies: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, tokens, entropies = ctx.saved_tensors
        head, wide = _Head(weight, bias, ctx.temperature), to_logprobs.dtype
        to_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
        to_weight = torch.zeros(weight.shape, dtype=wide, device=hidden.device)
        to_bias = None if bias is None else torch.zeros(bias.shape, dtype=wide, device=hidden.device)
        for part in _rows(hidden):
            given, to_entropy = to_logprobs[part, None], to_entropies[part, None]
            norms = _summarise(hidden[part], head, tokens[part]).norms[:, None]
            for start, end in head.tiles():
                scores = head.logits(hidden[part], start, end).sub_(norms)  # log p
                p = scores.clamp(min=LEAST_EXPONENT).exp_()
                to_logits = p * -given
                if ctx.entropy_gradient:
                    to_logits -= scores.add_(entropies[part, None]).mul_(p).mul_(to_entropy)
                inside = (tokens[part] >= start) & (tokens[part] < end)
                rows = inside.nonzero().squeeze(-1)
                to_logits[rows, tokens[part][rows] - start] += given[rows, 0]
                to_logits = to_logits.div_(ctx.temperature)
                narrow = to_logits.to(hidden.dtype)
                to_hidden[part] += narrow @ weight[start:end]
                to_weight[start:end] += narrow.T @ hidden[part]
                if to_bias is not None:
                    to_bias[start:end] += to_logits.sum(0)
        last = None if to_bias is None or bias is None else to_bias.to(bias.dtype)
        return to_hidden.to(hidden.dtype), to_weight.to(weight.dtype), last, None, None, None
