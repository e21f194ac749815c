"""Decoder layers on a CPU as two functions each, attention and MLP, with gradients by hand.

For layers of Llama's kind: RMSNorm, rotary positions, grouped causal attention, SwiGLU, residual sums. Autograd of
transformers' own layers keeps some thirty tensors a layer, most of them float32 or copies in another order, and makes a
pass through memory for each; here a layer keeps what its gradients read: the inputs and norms of both halves, query,
key, value, the attention's weights and output, gate and up before and after they meet.

B rows, L tokens, N = B L, H hidden size, h query heads, k key heads, d head size, I inner size of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from baton.attention import SHORT, attend, attend_backward
from baton.lora import Product, SharedLinear

PIECE = 1 << 18
"""Elements of a piece of rows whose float32 stays in a core's cache through several operations."""
ARCHITECTURES = {"llama", "mistral", "qwen2"}
"""Model types whose layers are what this module computes."""


def can_compute(decoder: Any, input_ids: torch.Tensor) -> bool:
    """Whether `hidden_states` computes what the decoder itself would: its layers joined, rows short, on a CPU."""
    if input_ids.device.type != "cpu" or input_ids.shape[1] > SHORT or torch.is_autocast_enabled("cpu"):
        return False
    window = getattr(decoder.config, "sliding_window", None)
    return not (window and window < input_ids.shape[1]) and is_joined(decoder)


def is_joined(decoder: Any) -> bool:
    """Whether a decoder is of Llama's kind, with the families of all layers joined and its norms frozen."""
    config = decoder.config
    if config.model_type not in ARCHITECTURES or config.hidden_act != "silu" or decoder.training:
        return False
    return all(_is_joined(layer) for layer in decoder.layers)


def _is_joined(layer: Any) -> bool:
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    linears = [attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.down_proj]
    if not all(isinstance(linear, SharedLinear) for linear in linears):
        return False
    norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
    plain = all(norm.dtype == linears[0].base.weight.dtype and not norm.requires_grad for norm in norms)
    return plain and len(attention.q_proj.family.members) == 3 and len(mlp.gate_proj.family.members) == 2


def hidden_states(decoder: Any, input_ids: torch.Tensor, role: str | None) -> torch.Tensor:
    """The decoder's last hidden states (B, L, H) for right-padded rows of token ids (B, L), as `role` sees them."""
    hidden = decoder.embed_tokens(input_ids)
    places = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    cos, sin = decoder.rotary_emb(hidden, position_ids=places)
    assert len(cos) == 1, "one row of positions for all"
    for layer in decoder.layers:
        hidden = _mlp(layer, _attention(layer, hidden, cos[0], sin[0], role), role)
    return decoder.norm(hidden)  # type: ignore[no-any-return]


@dataclass
class _Part:
    """Half a layer: RMSNorm, a first product, what lies between, a second product, and the residual sum."""

    norm: torch.Tensor  # (H,)
    eps: float
    first: Product
    second: Product
    split: int  # so many of the factors are the first product's

    def begin(self, flat: torch.Tensor, factors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """x (N, H) -> the first product of its norm, and [1/rms, the norm and what the product keeps]."""
        normed, inverse = rms_norm(flat, self.norm, self.eps)
        out, kept = self.first(normed, factors[: self.split])
        return out, [inverse, *((normed, *kept) if kept else ())]

    def end(
        self, flat: torch.Tensor, inner: torch.Tensor, factors: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """x + the second product of `inner`, and what the product keeps."""
        out, kept = self.second(inner, factors[self.split :])
        return out.add_(flat), list(kept)

    def begin_backward(
        self,
        given: torch.Tensor,
        grown: torch.Tensor,
        flat: torch.Tensor,
        inverse: torch.Tensor,
        kept: list[torch.Tensor],
        needs: tuple[bool, bool],
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """From the gradients of the part's output and of the first product's: those of x and of the first factors."""
        normed, *rest = kept or (flat,)
        to_normed, to_factors = self.first.backward(grown, normed, rest, to_x=needs[0], to_factors=needs[1])
        if to_normed is None:
            return None, to_factors
        return rms_norm_backward(to_normed, flat, inverse, self.norm, given), to_factors


def _pieces(rows: int, width: int) -> Iterator[slice]:
    """Slices of the rows, PIECE elements each."""
    size = max(16, PIECE // width)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x / rms(x) times weight, in the steps and number formats of transformers' layer; and 1 / rms (N, 1) in float32.

    Zhang and Sennrich 2019.
    """
    out, inverse = torch.empty_like(x), torch.empty(len(x), 1)
    for piece in _pieces(*x.shape):
        wide = x[piece].to(torch.float32, copy=True)
        inverse[piece] = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        out[piece].copy_(wide.mul_(inverse[piece])).mul_(weight)
    return out, inverse


def rms_norm_backward(
    given: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor, added: torch.Tensor
) -> torch.Tensor:
    """The gradient of x (N, H), and `added` to it: r w g - r^3 x mean(x w g), r the inverse rms."""
    out = torch.empty_like(x)
    for piece in _pieces(*x.shape):
        wide, grown, by = x[piece].to(torch.float32, copy=True), (given[piece] * weight).float(), inverse[piece]
        dots = (grown * wide).sum(-1, keepdim=True).mul_(by).mul_(by).mul_(by).div_(-x.shape[-1])
        torch.add(added[piece], grown.mul_(by).addcmul_(wide, dots).to(x.dtype), out=out[piece])
    return out


def _mlp(layer: Any, hidden: torch.Tensor, role: str | None) -> torch.Tensor:
    norm = layer.post_attention_layernorm
    first, early = layer.mlp.gate_proj.family.product(role)
    second, late = layer.mlp.down_proj.family.product(role)
    part = _Part(norm.weight, norm.variance_epsilon, first, second, len(early))
    return _Mlp.apply(hidden, part, *early, *late)  # type: ignore[no-any-return,no-untyped-call]


class _Mlp(torch.autograd.Function):
    """x + down(silu(gate(n)) up(n)), n the norm of x (Shazeer 2020)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, part: _Part, *factors: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        flat = x.reshape(-1, x.shape[-1])
        both, kept = part.begin(flat, factors)
        gate, up = both.chunk(2, -1)
        acted = functional.silu(gate)
        inner = acted * up
        out, more = part.end(flat, inner, factors)
        ctx.save_for_backward(flat, both, acted, inner, *kept, *more)
        ctx.part, ctx.shape, ctx.kept = part, x.shape, len(kept)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, given: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        flat, both, acted, inner, inverse, *kept = ctx.saved_tensors
        part, wants = ctx.part, any(ctx.needs_input_grad[2:])
        kept, more = kept[: ctx.kept - 1], kept[ctx.kept - 1 :]
        given = given.reshape(flat.shape)
        gate, up = both.chunk(2, -1)
        to_inner, to_late = part.second.backward(given, inner, more, to_x=True, to_factors=wants)
        assert to_inner is not None
        to_both = torch.empty_like(both)
        to_gate, to_up = to_both.chunk(2, -1)
        torch.mul(to_inner, acted, out=to_up)
        torch.ops.aten.silu_backward.grad_input(to_inner.mul_(up), gate, grad_input=to_gate)
        to_x, to_early = part.begin_backward(given, to_both, flat, inverse, kept, (ctx.needs_input_grad[0], wants))
        return None if to_x is None else to_x.view(ctx.shape), None, *to_early, *to_late


def _attention(
    layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, role: str | None
) -> torch.Tensor:
    norm, attention = layer.input_layernorm, layer.self_attn
    first, early = attention.q_proj.family.product(role)
    second, late = attention.o_proj.family.product(role)
    part = _Part(norm.weight, norm.variance_epsilon, first, second, len(early))
    heads = tuple(linear.size // attention.head_dim for linear in (attention.q_proj, attention.k_proj))
    return _Attend.apply(hidden, part, heads, attention.scaling, cos, sin, *early, *late)  # type: ignore[no-any-return,no-untyped-call]


class _Attend(torch.autograd.Function):
    """x + o(attention of the norm's rotated queries and keys, and its values)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        part: _Part,
        heads: tuple[int, int],
        scale: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        joined, kept = part.begin(flat, factors)
        query, key, value = _by_head(joined, x.shape, heads)
        query, key, value = rotated(query, cos, sin), rotated(key, cos, sin), value.contiguous()
        found, weights = attend(query, key, value, scale)
        inner = found.transpose(1, 2).reshape(len(flat), -1)
        out, more = part.end(flat, inner, factors)
        ctx.save_for_backward(flat, cos, sin, query, key, value, inner, *weights, *kept, *more)
        ctx.part, ctx.shape, ctx.scale = part, x.shape, scale
        ctx.counts = len(weights), len(weights) + len(kept)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, given: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        flat, cos, sin, query, key, value, inner, *rest = ctx.saved_tensors
        weights, (inverse, *kept), more = (
            rest[: ctx.counts[0]],
            rest[ctx.counts[0] : ctx.counts[1]],
            rest[ctx.counts[1] :],
        )
        part, wants = ctx.part, any(ctx.needs_input_grad[6:])
        given = given.reshape(flat.shape)
        to_inner, to_late = part.second.backward(given, inner, more, to_x=True, to_factors=wants)
        assert to_inner is not None
        batch, length = ctx.shape[:2]
        to_found = to_inner.view(batch, length, query.shape[1], -1).transpose(1, 2)
        to_query, to_key, to_value = attend_backward(to_found, query, key, value, weights, ctx.scale)
        to_joined = flat.new_empty(len(flat), to_inner.shape[1] + 2 * key.shape[1] * key.shape[3])
        places = _by_head(to_joined, ctx.shape, (query.shape[1], key.shape[1]))
        rotated(to_query, cos, -sin, out=places[0])
        rotated(to_key, cos, -sin, out=places[1])
        places[2].copy_(to_value)
        to_x, to_early = part.begin_backward(given, to_joined, flat, inverse, kept, (ctx.needs_input_grad[0], wants))
        to_x = None if to_x is None else to_x.view(ctx.shape)
        return to_x, None, None, None, None, None, *to_early, *to_late


def _by_head(joined: torch.Tensor, shape: torch.Size, heads: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Views of (N, (h + 2 k) d) as query (B, h, L, d), key and value (B, k, L, d)."""
    queries, keys = heads
    split = joined.view(*shape[:2], queries + 2 * keys, -1).transpose(1, 2)
    return split.split([queries, keys, keys], 1)


def rotated(
    tensor: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Each pair (a, b) of coordinates i and i + d/2 as (a cos - b sin, b cos + a sin): (B, n, L, d), contiguous.

    cos and sin (L, d), the two halves alike, as transformers gives them. Su et al. 2021. With -sin it is the inverse,
    and the gradient.
    """
    half = tensor.shape[-1] // 2
    if out is None:
        out = torch.empty(tensor.shape, dtype=tensor.dtype)
    torch.mul(tensor, cos, out=out)
    out[..., :half].addcmul_(tensor[..., half:], sin[:, :half], value=-1)
    out[..., half:].addcmul_(tensor[..., :half], sin[:, half:])
    return out
