"""Documents packed into rows of one length, with positions that restart so that documents do not see each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
    bins = best_fit(np.array([len(ids) for ids, _ in pieces], np.int64), length)
    members: list[list[int]] = [[] for _ in range(int(bins.max()) + 1 if len(bins) else 0)]
    for index, row in enumerate(bins.tolist()):
        members[row].append(index)
    rows = [_row([pieces[index] for index in chosen], length, pad_id) for chosen in members]
    return Packed(
        rows=rows,
        num_tokens=sum(len(ids) for ids, _ in pieces),
        num_in_loss=sum(sum(in_loss[1:]) for _, in_loss in pieces),
    )


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """(n,) row of each piece of `lengths` (1 … capacity), numbered by the first piece in each: best fit decreasing.

    The longest first, each goes into the row whose room is smallest yet enough, the oldest of such; into a new row
    where there is none. Done for all pieces of one length at once: as those that fit equally well are alike, a row
    takes as many of them as it holds before the next is looked at.
    """
    rows = np.empty(len(lengths), np.int64)
    if not len(lengths):
        return rows
    assert lengths.min() > 0 and lengths.max() <= capacity, (lengths.min(), lengths.max(), capacity)
    room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # rows by the room that is left in them
    occupied = 0  # bit n: some row has room for n tokens
    num_rows = 0
    longest_first = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths)
    end = 0
    for need in range(len(counts) - 1, 0, -1):
        start, end = end, end + int(counts[need])
        while start < end:
            fitting = occupied >> need
            if fitting:
                free = need + (fitting & -fitting).bit_length() - 1
                found = room[free]
                open_rows = np.sort(np.concatenate(found)) if len(found) > 1 else found[0]
                room[free] = []
                occupied ^= 1 << free
            else:
                free = capacity
                open_rows = np.arange(num_rows, num_rows + -(-(end - start) // (capacity // need)))
                num_rows += len(open_rows)
            each = free // need
            used = open_rows[: -(-(end - start) // each)]
            placed = min(end - start, each * len(used))
            rows[longest_first[start : start + placed]] = np.repeat(used, each)[:placed]
            in_last = placed - each * (len(used) - 1)
            start += placed
            for left, those in (
                (free - each * need, used[:-1]),
                (free - in_last * need, used[-1:]),
                (free, open_rows[len(used) :]),
            ):
                if left and len(those):
                    room[left].append(those)
                    occupied |= 1 << left
    # numbered anew by each row's first piece, so that the data's order is kept
    _, firsts, of_piece = np.unique(rows, return_index=True, return_inverse=True)
    rank = np.empty(len(firsts), np.int64)
    rank[np.argsort(firsts)] = np.arange(len(firsts))
    return rank[of_piece]


def _row(pieces: list[tuple[Sequence[int], Sequence[bool]]], length: int, pad_id: int) -> dict[str, list[int]]:
    input_ids: list[int] = []
    labels: list[int] = []
    position_ids: list[int] = []
    for ids, in_loss in pieces:
        input_ids += ids
        labels.append(IGNORED)
        labels += [token if flag else IGNORED for token, flag in zip(ids[1:], in_loss[1:], strict=True)]
        position_ids += range(len(ids))
    padding = length - len(input_ids)
    return {
        "input_ids": input_ids + [pad_id] * padding,
        "labels": labels + [IGNORED] * padding,
        "position_ids": position_ids + list(range(padding)),
    }


def collate(rows: Sequence[Mapping[str, Sequence[int] | np.ndarray]]) -> dict[str, Any]:
    """Stack packed rows, of lists or arrays, into (B, L) tensors; there is deliberately no attention mask."""
    import torch

    return {
        key: torch.from_numpy(np.stack([np.asarray(row[key], np.int64) for row in rows]))
        for key in ("input_ids", "labels", "position_ids")
    }
