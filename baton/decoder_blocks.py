"""Decoder layers on a CPU as two functions each, attention and MLP, with gradients by hand.

For layers of Llama's kind: RMSNorm, rotary positions, grouped causal attention, SwiGLU, residual sums. Autograd of
transformers' own layers keeps some thirty tensors a layer, most of them float32 or copies in another order, and makes a
pass through memory for each; here a layer keeps what its gradients read: the inputs and norms of both halves, query,
key, value, the attention's weights and output, gate and up before and after they meet.

Padding is left out: products and norms see the N real tokens of all rows, one after the other, and attention sees
blocks of rows that are nearly of one length.

B rows, L tokens, H hidden size, h query heads, k key heads, d head size, I inner size of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from baton.attention import SHORT, attend, attend_backward
from baton.lora import Product, SharedLinear

PIECE = 1 << 18
"""Elements of a piece of rows whose float32 stays in a core's cache through several operations."""
SPLIT = 48_000_000
"""A block more takes as long as this many weights of a layer times tokens: less padding than that is left in."""
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


def hidden_states(
    decoder: Any, input_ids: torch.Tensor, role: str | None, lengths: Sequence[int] | None = None
) -> torch.Tensor:
    """The decoder's last hidden states (B, L, H) for right-padded rows of token ids (B, L), as `role` sees them.

    `lengths` are the rows' real tokens; the states of padding are then zero, or those of whatever stands there.
    """
    lengths = [input_ids.shape[1]] * len(input_ids) if lengths is None else lengths
    blocks = _blocks(lengths, SPLIT // _weights(decoder.layers[0]))
    hidden = decoder.embed_tokens(torch.cat([input_ids[block.rows, : block.length].reshape(-1) for block in blocks]))
    places = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    cos, sin = decoder.rotary_emb(hidden, position_ids=places)
    assert len(cos) == 1, "one row of positions for all"
    for layer in decoder.layers:
        hidden = _mlp(layer, _attention(layer, hidden, blocks, cos[0], sin[0], role), role)
    return _padded(decoder.norm(hidden), blocks, input_ids.shape[1])


class _Block(NamedTuple):
    """Rows b of a batch that follow one another, as if all had l tokens, and where their b l tokens lie among all."""

    rows: slice
    length: int
    tokens: slice

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """A view (b, l, W) of its part of (N, W)."""
        return flat[self.tokens].view(-1, self.length, flat.shape[-1])


def _blocks(lengths: Sequence[int], spare: int) -> list[_Block]:
    """Blocks with at most `spare` tokens of padding each."""
    found: list[_Block] = []
    first = at = 0
    for row in range(1, len(lengths) + 1):
        longest = max(lengths[first:row])
        if row < len(lengths):
            grown = max(longest, lengths[row])
            if grown * (row + 1 - first) - sum(lengths[first : row + 1]) <= spare:
                continue
        size = longest * (row - first)
        found.append(_Block(slice(first, row), longest, slice(at, at + size)))
        first, at = row, at + size
    return found


def _weights(layer: Any) -> int:
    """The number of weights in a layer's matrices."""
    return sum(module.base.weight.numel() for module in layer.modules() if isinstance(module, SharedLinear))  # type: ignore[operator,union-attr,misc]


def _padded(flat: torch.Tensor, blocks: Sequence[_Block], length: int) -> torch.Tensor:
    """(N, H) as (B, L, H), zero where a block has nothing."""
    parts = [functional.pad(block.of(flat), (0, 0, 0, length - block.length)) for block in blocks]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
        both, kept = part.begin(x, factors)
        gate, up = both.chunk(2, -1)
        acted = functional.silu(gate)
        inner = acted * up
        out, more = part.end(x, inner, factors)
        ctx.save_for_backward(x, both, acted, inner, *kept, *more)
        ctx.part, ctx.kept = part, len(kept)
        return out

    @staticmethod
    def backward(ctx: Any, given: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, both, acted, inner, inverse, *kept = ctx.saved_tensors
        part, wants = ctx.part, any(ctx.needs_input_grad[2:])
        kept, more = kept[: ctx.kept - 1], kept[ctx.kept - 1 :]
        gate, up = both.chunk(2, -1)
        to_inner, to_late = part.second.backward(given, inner, more, to_x=True, to_factors=wants)
        assert to_inner is not None
        to_both = torch.empty_like(both)
        to_gate, to_up = to_both.chunk(2, -1)
        torch.mul(to_inner, acted, out=to_up)
        torch.ops.aten.silu_backward.grad_input(to_inner.mul_(up), gate, grad_input=to_gate)
        to_x, to_early = part.begin_backward(given, to_both, x, inverse, kept, (ctx.needs_input_grad[0], wants))
        return to_x, None, *to_early, *to_late


def _attention(
    layer: Any, hidden: torch.Tensor, blocks: list[_Block], cos: torch.Tensor, sin: torch.Tensor, role: str | None
) -> torch.Tensor:
    norm, attention = layer.input_layernorm, layer.self_attn
    first, early = attention.q_proj.family.product(role)
    second, late = attention.o_proj.family.product(role)
    part = _Part(norm.weight, norm.variance_epsilon, first, second, len(early))
    heads = tuple(linear.size // attention.head_dim for linear in (attention.q_proj, attention.k_proj))
    places = _Places(blocks, heads, cos, sin, attention.scaling)
    return _Attend.apply(hidden, part, places, *early, *late)  # type: ignore[no-any-return,no-untyped-call]


class _Places(NamedTuple):
    """What attention needs to know beside its input; cos and sin (L, d) have no gradients."""

    blocks: list[_Block]
    heads: tuple[int, int]  # h, k
    cos: torch.Tensor
    sin: torch.Tensor
    scale: float

    def by_head(self, joined: torch.Tensor, block: _Block) -> tuple[torch.Tensor, ...]:
        """The block's part of (N, (h + 2k) d), as views: query (b, h, l, d), key and value (b, k, l, d)."""
        queries, keys = self.heads
        split = block.of(joined).unflatten(-1, (queries + 2 * keys, -1)).transpose(1, 2)
        return split.split([queries, keys, keys], 1)

    def found(self, inner: torch.Tensor, block: _Block) -> torch.Tensor:
        """The block's part of the output (N, h d), a view (b, h, l, d)."""
        return block.of(inner).unflatten(-1, (self.heads[0], -1)).transpose(1, 2)


class _Attend(torch.autograd.Function):
    """x + o(attention of the norm's rotated queries and keys, and its values)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, part: _Part, places: _Places, *factors: torch.Tensor
    ) -> torch.Tensor:
        joined, kept = part.begin(x, factors)
        inner = x.new_empty(len(x), joined.shape[1] * places.heads[0] // (places.heads[0] + 2 * places.heads[1]))
        met: list[list[torch.Tensor]] = []
        for block in places.blocks:
            cos, sin = places.cos[: block.length], places.sin[: block.length]
            query, key, value = places.by_head(joined, block)
            query, key, value = rotated(query, cos, sin), rotated(key, cos, sin), value.contiguous()
            found, weights = attend(query, key, value, places.scale)
            places.found(inner, block).copy_(found)
            met.append([query, key, value, *weights])
        out, more = part.end(x, inner, factors)
        parts = [kept, more, *met]
        ctx.save_for_backward(x, inner, *(tensor for tensors in parts for tensor in tensors))
        ctx.part, ctx.places, ctx.counts = part, places, [len(tensors) for tensors in parts]
        return out

    @staticmethod
    def backward(ctx: Any, given: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, inner, *saved = ctx.saved_tensors
        rest = iter(saved)
        (inverse, *kept), more, *met = (list(islice(rest, count)) for count in ctx.counts)
        part, places, wants = ctx.part, ctx.places, any(ctx.needs_input_grad[3:])
        to_inner, to_late = part.second.backward(given, inner, more, to_x=True, to_factors=wants)
        assert to_inner is not None
        to_joined = x.new_empty(len(x), len(part.first.weight))
        for block, (query, key, value, *weights) in zip(places.blocks, met, strict=True):
            cos, minus_sin = places.cos[: block.length], -places.sin[: block.length]
            grown = attend_backward(places.found(to_inner, block), query, key, value, weights, places.scale)
            to_query, to_key, to_value = places.by_head(to_joined, block)
            rotated(grown[0], cos, minus_sin, out=to_query)
            rotated(grown[1], cos, minus_sin, out=to_key)
            to_value.copy_(grown[2])
        to_x, to_early = part.begin_backward(given, to_joined, x, inverse, kept, (ctx.needs_input_grad[0], wants))
        return to_x, None, None, *to_early, *to_late


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
