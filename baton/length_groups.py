"""Sequences of like length side by side: little padding, and it is on the right, where a causal model never sees it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

ENOUGH = {"cpu": 256}
"""Tokens that keep a device's units busy: beyond, padding costs more than another pass. Elsewhere there is no such."""
LIKE = 0.8


def groups(widths: Sequence[int], rows_each: int, max_tokens: int, enough: int | None = None) -> list[list[int]]:
    """Numbers of items of like width, widest first, so that a group's padded rows hold at most `max_tokens`.

    Each item has `rows_each` rows; one that is wider by itself is a group of its own. A group of `enough` tokens takes
    no item that is less than LIKE as wide as its widest.
    """
    order = sorted(range(len(widths)), key=lambda at: (-widths[at], at))
    found: list[list[int]] = []
    while order:
        each = rows_each * widths[order[0]]
        count = max(1, max_tokens // each)
        if enough is not None:
            least = LIKE * widths[order[0]]
            alike = sum(widths[at] >= least for at in order)
            count = min(count, max(alike, -(-enough // each)))
        found.append(order[:count])
        order = order[count:]
    return found


def padded(sequences: Sequence[Sequence[int]], filler: int, device: torch.device) -> torch.Tensor:
    """(N, L) integers, filled up on the right."""
    longest = max(len(ids) for ids in sequences)
    return torch.tensor([[*ids, *[filler] * (longest - len(ids))] for ids in sequences], device=device)
