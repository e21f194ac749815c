"""One token for a few rows at a time through joined decoder layers on a CPU: few operations, weights laid out for it.

With some ten rows a step is bound by reading the weights and by the number of operations: families of layers are one
product each, of weights packed once (see thin_linear), attention is two products for the queries of each key head.

B rows, H hidden size, h query heads, k key heads, d head size, S columns of the cache, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from baton.decoder_blocks import is_joined
from baton.slot_cache import SlotCache
from baton.thin_linear import Packed


def can_compute(model: Any) -> bool:
    """Whether `Step` computes what the model's forward pass would: joined layers, a plain head, on a CPU."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return is_joined(getattr(model, model.base_model_prefix))


class Step:
    """The decoding steps of a model, as the role that acts."""

    def __init__(self, model: Any) -> None:
        self._decoder = getattr(model, model.base_model_prefix)
        head = model.get_output_embeddings()
        self._head, self._bias = Packed(head.weight), head.bias

    def __call__(self, tokens: torch.Tensor, depths: torch.Tensor, slots: SlotCache) -> torch.Tensor:
        """Logits (B, V) after reading `tokens` (B,), each at its row's position `depths` (B,)."""
        decoder = self._decoder
        hidden = decoder.embed_tokens(tokens)
        cos, sin = decoder.rotary_emb(hidden, position_ids=depths[:, None])
        first = decoder.layers[0].self_attn
        heads = first.k_proj.size // first.head_dim
        slots.step()
        mask = slots.whole_mask[:, 0].repeat_interleave(heads, 0)  # (B k, 1, S)
        for layer, cache in zip(decoder.layers, slots.cache.layers, strict=True):
            hidden = _attention(layer, hidden, cos, sin, cache, mask).add_(hidden)
            hidden = _mlp(layer, hidden).add_(hidden)
        return self._head(_normed(decoder.norm, hidden), self._bias)


def _normed(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """RMSNorm, in the steps and number formats of transformers' layer."""
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
    inverse = length.mul_(length).div_(hidden.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    return (hidden * inverse).to(hidden.dtype).mul_(norm.weight)


def _attention(
    layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: Any, mask: torch.Tensor
) -> torch.Tensor:
    attention, rows = layer.self_attn, len(hidden)
    role, size = attention.q_proj.role, attention.head_dim
    keys, half = attention.k_proj.size // size, size // 2
    joined = attention.q_proj.family.compute(_normed(layer.input_layernorm, hidden), role).view(rows, -1, size)
    both, value = joined[:, :-keys], joined[:, -keys:]
    placed = both * cos
    placed[..., :half].addcmul_(both[..., half:], sin[..., :half], value=-1)
    placed[..., half:].addcmul_(both[..., :half], sin[..., half:])
    query, key = placed[:, :-keys], placed[:, -keys:]
    cache.update(key[:, :, None], value[:, :, None])
    # all columns, those to come included: products of a slice would copy it first
    known, values = (held[:rows].flatten(0, 1) for held in (cache.keys, cache.values))
    scores = torch.baddbmm(mask, query.reshape(rows * keys, -1, size), known.mT, alpha=attention.scaling)
    found = scores.softmax(-1).bmm(values)
    return attention.o_proj.family.compute(found.view(rows, -1), role)  # type: ignore[no-any-return]


def _mlp(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    mlp = layer.mlp
    role = mlp.gate_proj.role
    both = mlp.gate_proj.family.compute(_normed(layer.post_attention_layernorm, hidden), role)
    gate, up = both.chunk(2, -1)
    return mlp.down_proj.family.compute(functional.silu(gate).mul_(up), role)  # type: ignore[no-any-return]
