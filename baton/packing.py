"""Documents packed into rows of one length, with positions that restart so that documents do not see each other."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

IGNORED = -100
"""The label of a token that is not in the loss."""


@dataclass(frozen=True)
class Packed:
    """Rows for a trainer, and how well they are filled."""

    rows: list[dict[str, list[int]]]
    num_tokens: int
    num_in_loss: int

    @property
    def padding_share(self) -> float:
        """The share of the rows' positions that hold no token."""
        capacity = sum(len(row["input_ids"]) for row in self.rows)
        return 1 - self.num_tokens / capacity if capacity else 0.0


def pack(documents: Sequence[tuple[Sequence[int], Sequence[bool]]], length: int, pad_id: int) -> Packed:
    """Pack (ids, in_loss) documents into rows of `length` tokens, best fit first (Ding et al. 2024).

    A document longer than `length` is cut into pieces of that length. A row has `input_ids`, `labels` (-100 where not
    in the loss, at every document's first token and at padding) and `position_ids` that restart at 0 with every
    document: transformers reads the document borders from them when there is no attention mask and no cache.
    """
    pieces: list[tuple[Sequence[int], Sequence[bool]]] = []
    for ids, in_loss in documents:
        for start in range(0, len(ids), length):
            pieces.append((ids[start : start + length], in_loss[start : start + length]))
    order = sorted(range(len(pieces)), key=lambda index: (-len(pieces[index][0]), index))
    bins: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for index in order:
        need = len(pieces[index][0])
        at = bisect_left(space, (need, -1))
        if at == len(space):
            bins.append([index])
            free, chosen = length, len(bins) - 1
        else:
            free, chosen = space.pop(at)
            bins[chosen].append(index)
        if free - need:
            insort(space, (free - need, chosen))
    rows = [_row([pieces[index] for index in sorted(members)], length, pad_id) for members in bins]
    # in the order of each row's first document, so that the data's shuffled order is kept
    ranked = sorted(range(len(rows)), key=lambda at: min(bins[at]))
    ordered = [rows[at] for at in ranked]
    return Packed(
        rows=ordered,
        num_tokens=sum(len(ids) for ids, _ in pieces),
        num_in_loss=sum(label != IGNORED for row in ordered for label in row["labels"]),
    )


def _row(pieces: list[tuple[Sequence[int], Sequence[bool]]], length: int, pad_id: int) -> dict[str, list[int]]:
    input_ids: list[int] = []
    labels: list[int] = []
    position_ids: list[int] = []
    for ids, in_loss in pieces:
        input_ids += ids
        labels += [token if flag and at else IGNORED for at, (token, flag) in enumerate(zip(ids, in_loss, strict=True))]
        position_ids += range(len(ids))
    padding = length - len(input_ids)
    return {
        "input_ids": input_ids + [pad_id] * padding,
        "labels": labels + [IGNORED] * padding,
        "position_ids": position_ids + list(range(padding)),
    }


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Stack packed rows into (B, L) tensors; there is deliberately no attention mask."""
    import torch

    return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels", "position_ids")}
