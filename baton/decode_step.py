"""One token for a few rows at a time through joined decoder layers on a CPU, everything turned: columns are rows.

With B rows, hidden states are (H, B), so that every product is the weight times a thin matrix, which is oneDNN's faster
order for bfloat16 (see thin_linear), and nothing has to be turned back but queries, keys and values. A step of
SmolLM2-135M with 16 rows takes two thirds of the time of transformers' layers on two cores.

H hidden size, R the rank of a family's additions, h query heads, k key heads, d head size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from baton.decoder_blocks import is_joined
from baton.lora import Family
from baton.slot_cache import SlotCache
from baton.thin_linear import MOST_ROWS


def can_compute(model: Any, rows: int) -> bool:
    """Whether `next_logits` computes what the model's forward pass would: joined layers, a plain head, bfloat16."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or rows > MOST_ROWS or torch.is_autocast_enabled("cpu"):
        return False
    if head.weight.dtype is not torch.bfloat16 or head.weight.device.type != "cpu":
        return False
    return is_joined(getattr(model, model.base_model_prefix))


def next_logits(model: Any, tokens: torch.Tensor, depths: torch.Tensor, slots: SlotCache) -> torch.Tensor:
    """Logits (B, V) in float32 after reading `tokens` (B,), each at its row's position `depths` (B,)."""
    decoder = getattr(model, model.base_model_prefix)
    mask = slots.step()
    hidden = decoder.embed_tokens(tokens).T.contiguous()
    cos, sin = decoder.rotary_emb(hidden, position_ids=depths[:, None])
    for layer, cache in zip(decoder.layers, slots.cache.layers, strict=True):
        hidden = _attention(layer, hidden, cos, sin, cache, mask)
        hidden = _mlp(layer, hidden)
    head = model.get_output_embeddings().weight
    final = _Input(decoder.norm, hidden, 0).filled
    logits = torch.empty(len(tokens), len(head))
    return logits.copy_((head @ final).T)


class _Input:
    """What a family reads: (in + R, B), its last rows left for the additions."""

    def __init__(self, norm: Any, hidden: torch.Tensor, rank: int) -> None:
        size, rows = hidden.shape
        self.filled = hidden.new_empty(size + rank, rows)
        wide = hidden.to(torch.float32, copy=True)
        wide.mul_(wide.square().mean(0, keepdim=True).add_(norm.variance_epsilon).rsqrt_())
        self.filled[:size].copy_(wide).mul_(norm.weight[:, None])


def _product(family: Family, role: str | None, x: torch.Tensor, size: int) -> torch.Tensor:
    """(out, B) of (in + R, B), whose first `size` rows are given."""
    held = family.held.get(role) if role is not None else None
    if held is None:
        weight, bias = family.base()
    else:
        torch.mm(held.down, x[:size], out=x[size:])
        weight, bias = held.widened, family.base()[1]
    found = weight @ x
    return found if bias is None else found.add_(bias[:, None])


def _rank(family: Family, role: str | None) -> int:
    held = family.held.get(role) if role is not None else None
    return 0 if held is None else len(held.down)


def _attention(
    layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: Any, mask: torch.Tensor
) -> torch.Tensor:
    attention = layer.self_attn
    role, first, second = attention.q_proj.role, attention.q_proj.family, attention.o_proj.family
    size, rows = hidden.shape
    given = _Input(layer.input_layernorm, hidden, _rank(first, role)).filled
    joined = _product(first, role, given, size).T.contiguous().view(rows, -1, attention.head_dim)
    keys = attention.k_proj.size // attention.head_dim
    turned = joined.shape[1] - keys
    half = attention.head_dim // 2
    both, value = joined[:, :turned], joined[:, turned:]
    placed = both * cos
    placed[..., :half].addcmul_(both[..., half:], sin[..., :half], value=-1)
    placed[..., half:].addcmul_(both[..., :half], sin[..., half:])
    query, key = placed[:, :-keys], placed[:, -keys:]
    known, values = cache.update(key[:, :, None], value[:, :, None])
    query = query.reshape(rows, keys, -1, attention.head_dim)
    found = functional.scaled_dot_product_attention(query, known, values, attn_mask=mask, scale=attention.scaling)
    inner = attention.q_proj.size
    read = hidden.new_empty(inner + _rank(second, role), rows)
    read[:inner].copy_(found.reshape(rows, inner).T)
    return _product(second, role, read, inner).add_(hidden)


def _mlp(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    mlp = layer.mlp
    role, first, second = mlp.gate_proj.role, mlp.gate_proj.family, mlp.down_proj.family
    given = _Input(layer.post_attention_layernorm, hidden, _rank(first, role)).filled
    gate, up = _product(first, role, given, len(hidden)).chunk(2)
    read = hidden.new_empty(len(gate) + _rank(second, role), hidden.shape[1])
    torch.mul(functional.silu(gate), up, out=read[: len(gate)])
    return _product(second, role, read, len(gate)).add_(hidden)
