"""Pairs as rows of token ids: each side by itself, or both behind one copy of the tokens with which they begin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from baton.length_groups import padded
from reward.pairs import Pair


class Rows(NamedTuple):
    """What one forward pass reads: B rows of L tokens, padded on the right; the last two say where N pairs end."""

    input_ids: torch.Tensor  # (B, L)
    position_ids: torch.Tensor | None  # (B, L); None: 0, 1, 2, …
    table: torch.Tensor | None  # (B, 1, L, L) float32, 0 where row i's token may see column j's, else minus infinity
    row: torch.Tensor  # (2, N), chosen and rejected
    last: torch.Tensor  # (2, N), the places of the last tokens in their rows


def width(pair: Pair, share_prompt: bool) -> int:
    """Tokens of the pair's row, or of the longer one of its two."""
    if share_prompt:
        return len(pair.chosen_ids) + len(pair.rejected_ids) - pair.shared
    return max(len(pair.chosen_ids), len(pair.rejected_ids))


def pair_rows(pairs: Sequence[Pair], share_prompt: bool, pad_id: int, device: torch.device) -> Rows:
    """The rows of `pairs`: one a pair with `share_prompt`, else two."""
    return _joined(pairs, pad_id, device) if share_prompt else _apart(pairs, pad_id, device)


def _apart(pairs: Sequence[Pair], pad_id: int, device: torch.device) -> Rows:
    sides = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    row = torch.arange(len(sides), device=device).view(2, -1)
    last = torch.tensor([len(ids) - 1 for ids in sides], device=device).view(2, -1)
    return Rows(padded(sides, pad_id, device), None, None, row, last)


def _joined(pairs: Sequence[Pair], pad_id: int, device: torch.device) -> Rows:
    """Shared tokens, rest of chosen, rest of rejected; the last part goes on from the shared tokens in place and sight.

    So each token sees what it would see in a row of its own, at the same distances.
    """
    ids = [[*pair.chosen_ids, *pair.rejected_ids[pair.shared :]] for pair in pairs]
    input_ids = padded(ids, pad_id, device)
    places = torch.arange(input_ids.shape[1], device=device)
    shared = torch.tensor([pair.shared for pair in pairs], device=device)[:, None]
    chosen = torch.tensor([len(pair.chosen_ids) for pair in pairs], device=device)[:, None]
    is_second = places >= chosen  # padding too: nothing looks at it
    position_ids = torch.where(is_second, places - chosen + shared, places)
    is_first_alone = (places >= shared) & ~is_second
    is_hidden = (places[None, :] > places[:, None])[None] | (is_second[:, :, None] & is_first_alone[:, None, :])
    table = torch.zeros(is_hidden.shape, device=device).masked_fill_(is_hidden, -math.inf)[:, None]
    row = torch.arange(len(pairs), device=device).expand(2, -1)
    last = torch.tensor([[len(p.chosen_ids) - 1 for p in pairs], [len(row) - 1 for row in ids]], device=device)
    return Rows(input_ids, position_ids, table, row, last)
