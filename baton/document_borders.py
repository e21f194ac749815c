"""Attention that stops at the borders of packed documents: how a kernel is told of them, a check that it listens.

Rows come without an attention mask, with positions that restart at every document (`baton.packing`). Without a cache
transformers (5.17 and later) makes from these the masks of its `sdpa`, `eager` and `flex_attention` kernels; a document
of one token and padding, which begins at 0 again, are documents like others. Its flash kernels take the borders from
the positions of a single row alone: several rows at once leak, silently, unless `cu_seq_lens_q` and its like are given,
which `collator` sees to. `baton_documents` needs no table of L x L: on a GPU it is torch's own flash kernel for runs of
any length, on a CPU a product a document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from baton.attention import ARCHITECTURES
from baton.errors import UserError
from baton.packing import collate

NAME = "baton_documents"
LONG = 1024
"""From about this many tokens a row on, a document after the other is faster on a CPU than masked rows."""
_LEAK = 1e-4
"""Of what a change of one document does to itself, so much in another is no rounding."""


def choose_document_attention(model: Any, length: int) -> None:
    """Let the model use `baton_documents` in rows of `length` tokens, where that is at hand and worth it.

    Otherwise the model keeps what it was loaded with. Batches must then come from `collator(model)`.
    """
    config = model.config
    if config.model_type not in ARCHITECTURES or getattr(config, "attention_dropout", False):
        return
    parameter = next(model.parameters())
    if parameter.device.type == "cuda" or length >= LONG:
        config._attn_implementation = _registered()


def collator(model: Any) -> Callable[[Sequence[Mapping[str, Sequence[int] | np.ndarray]]], dict[str, Any]]:
    """What stacks packed rows into the arguments of `model`: (B, L) tensors, with borders where its kernel needs it."""
    name = str(model.config._attn_implementation or "")
    return _collate_with_borders if name == NAME or "flash" in name else collate


def _collate_with_borders(rows: Sequence[Mapping[str, Sequence[int] | np.ndarray]]) -> dict[str, Any]:
    return with_borders(collate(rows))


def with_borders(batch: Mapping[str, Any]) -> dict[str, Any]:
    """`batch` with where its documents begin in its rows laid end to end, as flash kernels want it.

    cu_seq_lens_q, cu_seq_lens_k (N,) int32: every document's start, and the end, repeated until N is a power of two
    (empty documents); max_length_q, max_length_k: the rows' length, which no document exceeds. A compiled model meets
    few values of either, and is compiled for each but once.
    """
    position_ids = batch["position_ids"]
    begins = position_ids == 0
    assert bool(begins[:, 0].all()), "every row begins with a document's first position"
    starts = begins.flatten().nonzero().flatten()
    padding = (1 << len(starts).bit_length()) - len(starts)  # at least one: the end
    ends = F.pad(starts, (0, padding), value=position_ids.numel()).to(torch.int32)
    length = position_ids.shape[1]
    return {**batch, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length, "max_length_k": length}


@torch.no_grad()
def check_borders(model: Any, told: bool = True) -> None:
    """Raises UserError if a packed document changes what `model` computes for its neighbour.

    One row of two documents, in four versions: the first document changed, and the second, each alone. Recurrent and
    convolutional layers carry on over a border that is told by positions alone, as do kernels that are not told of it.
    `told`: whether its batches come from `collator(model)`.
    """
    embeddings = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    first, second = 9, 7
    ids = torch.randint(len(embeddings), (2, first + second), generator=generator)
    ids[1, first:] = ids[0, first:]
    positions = torch.cat([torch.arange(first), torch.arange(second)]).expand(2, -1)
    batch = {"input_ids": ids, "position_ids": positions}
    if told and collator(model) is not collate:
        batch = with_borders(batch)
    batch = {key: item.to(embeddings.device) if torch.is_tensor(item) else item for key, item in batch.items()}
    was_training = model.training
    model.eval()
    logits = model(**batch, use_cache=False).logits.float()
    model.train(was_training)
    change = (logits[0] - logits[1]).abs().amax(-1)
    if change[first:].max() > _LEAK * change[:first].max():
        config = model.config
        raise UserError(
            f"the model ({config.model_type}, attention {config._attn_implementation}) lets documents packed into one "
            "row see each other: with another document before it, the same document gets other logits. Load it with "
            "attn_implementation sdpa or eager; a model with recurrent or convolutional layers cannot be trained on "
            "packed rows"
        )


@lru_cache(maxsize=1)
def _registered() -> str:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    return NAME


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: query (B, h, L, d), key and value (B, k, L, d) -> (B, L, h, d), no weights."""
    if cu_seq_lens_q is None or max_length_q is None or attention_mask is not None:
        raise RuntimeError(f"{NAME} is for packed rows, whose borders baton.document_borders.collator tells")
    assert not dropout and query.shape[2] == key.shape[2], "whole rows"
    batch, heads, length, size = query.shape
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        narrow = torch.get_autocast_dtype(kind)
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
    # rows laid end to end: (B L, h, d)
    query, key, value = (part.transpose(1, 2).reshape(batch * length, -1, size) for part in (query, key, value))
    attend = _on_gpu if kind == "cuda" and query.dtype is not torch.float32 else _one_by_one
    found = attend(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window)
    return found.view(batch, length, heads, size), None


def _on_gpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Flash attention over runs of any length (Dao 2023), which torch brings along; half precision alone."""
    from torch.nn.attention.varlen import varlen_attn

    # a token sees itself and window - 1 before it
    seen = (-1, 0) if not window or window >= longest else (window - 1, 0)
    several = query.shape[1] != key.shape[1]
    found = varlen_attn(
        query, key, value, ends, ends, longest, longest, scale=scale, window_size=seen, enable_gqa=several
    )
    assert isinstance(found, torch.Tensor)
    return found


@torch.compiler.disable  # other lengths every time would be compiled every time
def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """The same by one causal product a document."""
    lengths = [length for length in ends.diff().tolist() if length]
    parts = zip(*(part.split(lengths) for part in (query, key, value)), strict=True)
    found = []
    for queries, keys, values in parts:
        length = len(queries)
        table = None
        if window and window < length:
            places = torch.arange(length, device=query.device)
            distance = places[:, None] - places
            table = (distance >= 0) & (distance < window)
        queries, keys, values = (part.transpose(0, 1)[None] for part in (queries, keys, values))
        of_document = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=table,
            is_causal=table is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        found.append(of_document[0].transpose(0, 1))
    return torch.cat(found)
