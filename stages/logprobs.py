"""Log-probabilities and entropies of tokens from hidden states, without ever holding the table of logits.

N positions, H hidden size, V vocabulary. The output head is applied to a few positions at a time; gradients are exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Logits in one chunk. On a CPU they should stay in its cache: 16 MiB in float32."""


class TokenLogprobs(NamedTuple):
    """What the head says at N positions, at least float32."""

    logprobs: torch.Tensor  # (N,) of the given tokens
    entropies: torch.Tensor  # (N,) in nats, of the whole distribution


class _Chunk(NamedTuple):
    logprobs: torch.Tensor  # (n,)
    entropies: torch.Tensor  # (n,)
    p: torch.Tensor  # (n, V)
    surprise: torch.Tensor  # (n, V): logits - log of the partition sum = log p


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
    given = (hidden, weight, bias, tokens, temperature)
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        found = hidden.new_empty((2, len(hidden)), dtype=wide)
        for part in _chunks(hidden, weight):
            logits = _logits(hidden[part], weight, bias, temperature)
            top = logits.amax(-1, keepdim=True)
            chosen = logits.gather(-1, tokens[part, None])
            mass = (logits - top).exp_()
            total = mass.sum(-1, keepdim=True)
            norm = top + total.log()
            found[0, part] = (chosen - norm).squeeze(-1)
            found[1, part] = (norm - torch.linalg.vecdot(mass, logits)[:, None] / total).squeeze(-1)
        return TokenLogprobs(found[0], found[1])
    trains_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    function = _TrainedHead if trains_head else _FrozenHead
    logprobs, entropies = function.apply(*given, entropy_gradient)  # type: ignore[no-untyped-call]
    return TokenLogprobs(logprobs, entropies if entropy_gradient else entropies.detach())


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS.get(hidden.device.type, 1 << 24) // len(weight))
    return [slice(at, at + size) for at in range(0, len(hidden), size)]


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    logits = functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.div_(temperature) if temperature != 1.0 else logits


def _distribution(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tokens: torch.Tensor, temperature: float
) -> _Chunk:
    logits = _logits(hidden, weight, bias, temperature)
    surprise = logits.sub_(logits.logsumexp(-1, keepdim=True))
    p = surprise.exp()
    chosen = surprise.gather(-1, tokens[:, None]).squeeze(-1)
    return _Chunk(chosen, -torch.linalg.vecdot(p, surprise), p, surprise)


class _FrozenHead(torch.autograd.Function):
    """With a frozen head all that the backward pass needs is one row a position, known in the forward pass.

    d logprob / d hidden = (W[token] - sum_v p_v W_v) / T and d entropy / d hidden = -sum_v p_v (log p_v + entropy) W_v / T:
    so no table of logits is kept, and none is computed twice.
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
        wide = torch.promote_types(hidden.dtype, torch.float32)
        found = hidden.new_empty((2, len(hidden)), dtype=wide)
        slopes = hidden.new_empty((1 + entropy_gradient, *hidden.shape), dtype=wide)
        for part in _chunks(hidden, weight):
            chunk = _distribution(hidden[part], weight, bias, tokens[part], temperature)
            found[0, part], found[1, part] = chunk.logprobs, chunk.entropies
            slopes[0, part] = weight[tokens[part]].to(wide) - (chunk.p.to(hidden.dtype) @ weight).to(wide)
            if entropy_gradient:
                slope = chunk.surprise.add_(chunk.entropies[:, None]).mul_(chunk.p)
                slopes[1, part] = -(slope.to(hidden.dtype) @ weight).to(wide)
        ctx.save_for_backward(slopes.div_(temperature).to(hidden.dtype))
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
    """A trained head's gradient needs every probability: the chunks are computed again in the backward pass."""

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
        found = token_logprobs(hidden.detach(), weight.detach(), bias, tokens, temperature)
        ctx.save_for_backward(hidden, weight, bias, tokens)
        ctx.temperature, ctx.entropy_gradient = temperature, entropy_gradient
        return found.logprobs, found.entropies

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, to_logprobs: torch.Tensor, to_entropies: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, tokens = ctx.saved_tensors
        wide = to_logprobs.dtype
        to_hidden = torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight, dtype=wide)
        to_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        for part in _chunks(hidden, weight):
            chunk = _distribution(hidden[part], weight, bias, tokens[part], ctx.temperature)
            to_logits = chunk.p * -to_logprobs[part, None]
            if ctx.entropy_gradient:
                slope = chunk.surprise.add_(chunk.entropies[:, None]).mul_(chunk.p)
                to_logits -= slope.mul_(to_entropies[part, None])
            to_logits.scatter_add_(-1, tokens[part, None], to_logprobs[part, None])
            to_logits = to_logits.div_(ctx.temperature)
            narrow = to_logits.to(hidden.dtype)
            to_hidden[part] = narrow @ weight
            to_weight += narrow.T @ hidden[part]
            if to_bias is not None:
                to_bias += to_logits.sum(0)
        return (
            to_hidden,
            to_weight.to(weight.dtype),
            None if to_bias is None or bias is None else to_bias.to(bias.dtype),
            None,
            None,
            None,
        )
