"""Causal attention of short rows on a CPU, by plain products: cheaper than the fused kernel where gradients are wanted.

B rows, h query heads, k key heads, L tokens, d head size. Padding is on the right, so causality is the only mask,
unless a table (B, 1, L, L) of zeros and minus infinities, as of rows with branches, says what each token sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

NAME = "baton_short_causal"
SHORT = 1024
"""Up to about this many tokens a row it is the faster way: beyond, the weights that are kept cost too much memory."""
WHOLE = 512
"""Longer rows are computed by blocks of queries, each with the keys up to its own: half of L x L is never needed."""
BLOCK = 256
ARCHITECTURES = {"llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "smollm3"}
"""Decoders whose attention is a plain softmax of scaled products, with a sliding window perhaps."""


def choose_attention(model: Any, length: int) -> None:
    """Let the model's layers use the attention that suits rows of `length` tokens."""
    if length <= SHORT and _is_plain(model.config, length):
        model.config._attn_implementation = _registered()
    # otherwise what the model was loaded with, which knows its windows, sinks and caps


def takes_tables(model: Any, length: int) -> bool:
    """Whether the model sees exactly what a table (B, 1, L, L) and position ids say, in rows of up to `length` tokens.

    Not where a window, a bias by distance or a recurrence knows the tokens' places in the row.
    """
    plain_kernels = ("sdpa", "eager", NAME)
    return _is_plain(model.config, length) and model.config._attn_implementation in plain_kernels


def _is_plain(config: Any, length: int) -> bool:
    window = getattr(config, "sliding_window", None)
    return config.model_type in ARCHITECTURES and not (window and window < length)


@lru_cache(maxsize=1)
def _registered() -> str:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _no_mask)
    return NAME


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """transformers' mask for this attention: none."""


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: query (B, h, L, d), key and value (B, k, L, d) -> (B, L, h, d), no weights."""
    assert not dropout and query.shape[2] == key.shape[2], "whole rows, right-padded"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return short_causal_attention(query, key, value, scale, attention_mask).transpose(1, 2), None


def short_causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, table: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(scale q k^T) v over the tokens up to each one's own, or those that `table` leaves: (B, h, L, d)."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        # once, here: the backward pass runs outside autocast and must find one number format
        narrow = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return short_causal_attention(query.to(narrow), key.to(narrow), value.to(narrow), scale, table)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _Attention.apply(query, key, value, scale, table)  # type: ignore[no-any-return,no-untyped-call]
    return attend(query, key, value, scale, table)[0]


def _by_key_head(tensor: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(B, h, L, d) -> (B k, h/k L, d): the queries of one key head lie together, so keys are not repeated."""
    return tensor.reshape(key.shape[0] * key.shape[1], -1, tensor.shape[-1])


def _weights(query: torch.Tensor, key: torch.Tensor, scale: float, table: torch.Tensor | None) -> torch.Tensor:
    """(B k, h/k L, L); softmax keeps float32 inside whatever the number format."""
    queries, keys = _by_key_head(query, key), _by_key_head(key, key)
    if table is None:
        mask = _future(key.shape[2], query.shape[1] // key.shape[1], query.dtype)
        return torch.baddbmm(mask.expand(len(keys), -1, -1), queries, keys.mT, alpha=scale).softmax(-1)
    # laid out once, then added to in place; (B, h, L, L) is (B k, h/k L, L) in memory
    scores = query.new_empty(*query.shape[:3], key.shape[2]).copy_(table).view(len(keys), -1, key.shape[2])
    return scores.baddbmm_(queries, keys.mT, alpha=scale).softmax(-1)


@lru_cache(maxsize=8)
def _future(length: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """(group L, L): minus infinity where a key comes after the query."""
    return torch.full((length, length), -math.inf, dtype=dtype).triu(1).repeat(group, 1)


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output (B, h, L, d), and of each block of n queries the weights (B k, h/k n, keys up to the last query)."""
    keys, values = _by_key_head(key, key), _by_key_head(value, key)
    out, kept, group = torch.empty_like(query), [], query.shape[1] // key.shape[1]
    for start, end in _blocks(query.shape[2]):
        queries = _by_key_head(query[:, :, start:end], key)
        mask = _future(end, 1, query.dtype)[start:].repeat(group, 1)
        weights = torch.baddbmm(mask.expand(len(keys), -1, -1), queries, keys[:, :end].mT, alpha=scale).softmax(-1)
        out[:, :, start:end] = weights.bmm(values[:, :end]).view(out[:, :, start:end].shape)
        kept.append(weights)
    return out, kept


def _back_through_blocks(
    given: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: Sequence[torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; those of keys and values are summed over the blocks in float32."""
    keys, values = _by_key_head(key, key), _by_key_head(value, key)
    to_query = torch.empty_like(query)
    wide = torch.promote_types(key.dtype, torch.float32)
    to_keys, to_values = (torch.zeros(keys.shape, dtype=wide, device=keys.device) for _ in range(2))
    nothing = keys.new_zeros(())
    for (start, end), weights in zip(_blocks(query.shape[2]), kept, strict=True):
        queries, grown = (_by_key_head(tensor[:, :, start:end], key) for tensor in (query, given))
        to_values[:, :end] += weights.mT.bmm(grown)
        to_scores = torch._softmax_backward_data(grown.bmm(values[:, :end].mT), weights, -1, weights.dtype)
        found = torch.baddbmm(nothing, to_scores, keys[:, :end], beta=0, alpha=scale)
        to_query[:, :, start:end] = found.view(to_query[:, :, start:end].shape)
        to_keys[:, :end] += torch.baddbmm(nothing, to_scores.mT, queries, beta=0, alpha=scale)
    return to_query, to_keys.to(key.dtype).view(key.shape), to_values.to(value.dtype).view(value.shape)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, table: torch.Tensor | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`short_causal_attention` and what its gradients need: the weights, whole or of each block of queries."""
    if table is None and query.shape[2] > WHOLE:
        return _in_blocks(query, key, value, scale)
    weights = _weights(query, key, scale, table)
    return weights.bmm(_by_key_head(value, key)).view(query.shape), [weights]


def attend_backward(
    given: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: Sequence[torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, from that of the output (B, h, L, d) and what `attend` kept."""
    if len(kept) > 1:
        return _back_through_blocks(given, query, key, value, kept, scale)
    weights = kept[0]
    queries, keys, values = (_by_key_head(tensor, key) for tensor in (query, key, value))
    given = _by_key_head(given, key)
    to_value = weights.mT.bmm(given).view(value.shape)
    to_scores = torch._softmax_backward_data(given.bmm(values.mT), weights, -1, weights.dtype)
    nothing = to_scores.new_zeros(())
    to_query = torch.baddbmm(nothing, to_scores, keys, beta=0, alpha=scale).view(query.shape)
    to_key = torch.baddbmm(nothing, to_scores.mT, queries, beta=0, alpha=scale).view(key.shape)
    return to_query, to_key, to_value


class _Attention(torch.autograd.Function):
    """Keeps the weights, and sums the gradients of keys and values over their query heads within the products."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        table: torch.Tensor | None,
    ) -> torch.Tensor:
        out, kept = attend(query, key, value, scale, table)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, given: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value, *kept = ctx.saved_tensors
        return *attend_backward(given, query, key, value, kept, ctx.scale), None, None
