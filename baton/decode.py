"""Cached batched decoding in which finished rows leave the batch; the caller picks each next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Pick = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(logits (N, V), rows (N,) of the original batch, position of the new token) -> ids (N,)."""


@dataclass(frozen=True)
class Reply:
    """What the model said: the sampled ids, the stop token included when `ended`."""

    ids: list[int]
    ended: bool


def greedy(logits: torch.Tensor, rows: torch.Tensor, position: int) -> torch.Tensor:
    """The likeliest token."""
    return logits.argmax(-1)


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    pick: Pick = greedy,
    max_rows: int = 64,
) -> list[Reply]:
    """Continue every prompt until a stop token or `max_new_tokens`.

    Prompts of like length go together, at most `max_rows` at a time; rows are padded on the left with explicit
    position ids and a mask made from lengths. `pick` gets float32 logits and the rows' indices into `prompts`.
    """
    order = sorted(range(len(prompts)), key=lambda at: (len(prompts[at]), at))
    replies: list[Reply | None] = [None] * len(prompts)
    for start in range(0, len(order), max_rows):
        members = order[start : start + max_rows]
        for row, reply in _decode_group(model, prompts, members, max_new_tokens, stop_ids, pad_id, pick):
            replies[row] = reply
    assert all(reply is not None for reply in replies)
    return [reply for reply in replies if reply is not None]


def _decode_group(
    model: Any,
    prompts: Sequence[Sequence[int]],
    members: list[int],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    pick: Pick,
) -> list[tuple[int, Reply]]:
    from transformers import DynamicCache

    device = model.device
    lengths = [len(prompts[row]) for row in members]
    longest = max(lengths)
    input_ids = torch.tensor(
        [[pad_id] * (longest - len(prompts[r])) + list(prompts[r]) for r in members], device=device
    )
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths], device=device)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    rows = torch.tensor(members, device=device)
    stops = torch.tensor(list(stop_ids), device=device)
    cache = DynamicCache(config=model.config)
    said: dict[int, list[int]] = {row: [] for row in members}
    done: list[tuple[int, Reply]] = []
    for position in range(max_new_tokens):
        logits = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        chosen = pick(logits.float(), rows, position)
        is_stop = torch.isin(chosen, stops)
        for row, token in zip(rows.tolist(), chosen.tolist(), strict=True):
            said[row].append(token)
        if is_stop.any():
            done += [(row, Reply(said[row], True)) for row in rows[is_stop].tolist()]
            going = (~is_stop).nonzero().flatten()
            if not len(going):
                return done
            cache.batch_select_indices(going)
            rows, chosen, mask, position_ids = rows[going], chosen[going], mask[going], position_ids[going]
        input_ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)
        position_ids = position_ids[:, -1:] + 1
    return done + [(row, Reply(said[row], False)) for row in rows.tolist()]
