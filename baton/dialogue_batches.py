"""Packed rows of dialogues as tensors for one forward pass: as they are, or each dialogue by itself.

B rows, L tokens, N tokens in the loss, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from baton.length_groups import ENOUGH, groups, padded
from baton.packing import IGNORED

Row = dict[str, list[int]]


class Dialogue(NamedTuple):
    """One dialogue of a packed row."""

    number: int  # of all dialogues in the data
    ids: list[int]
    targets: list[int]  # places of the tokens in the loss; each is predicted at the place before
    start: int  # its first token's place in its row


class Span(NamedTuple):
    """Where a dialogue lies in a batch."""

    number: int
    row: int
    start: int
    length: int


@dataclass
class Batch:
    """What one forward pass reads. Padding is on the right, or a document of its own: no token in the loss sees it."""

    input_ids: torch.Tensor  # (B, L)
    position_ids: torch.Tensor | None  # (B, L), restarting with every dialogue; None: a dialogue a row
    places: tuple[torch.Tensor, torch.Tensor]  # (N,) rows and (N,) columns whose states predict the tokens
    tokens: torch.Tensor  # (N,)
    spans: list[Span]


def dialogues_of(rows: Sequence[Row]) -> list[list[Dialogue]]:
    """The dialogues of each packed row, by where its positions restart; padding and what has no loss is left out."""
    found: list[list[Dialogue]] = []
    number = 0
    for row in rows:
        starts = [at for at, place in enumerate(row["position_ids"]) if place == 0]
        inside = []
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            labels = row["labels"][start:end]
            targets = [at for at, label in enumerate(labels) if label != IGNORED]
            if targets:
                inside.append(Dialogue(number, row["input_ids"][start:end], targets, start))
                number += 1
        found.append(inside)
    return found


def apart(dialogues: Sequence[Dialogue], max_tokens: int, pad_id: int, device: torch.device) -> list[Batch]:
    """Each dialogue in a row of its own, with others of like length, at most `max_tokens` with padding."""
    batches = []
    for group in groups([len(dialogue.ids) for dialogue in dialogues], 1, max_tokens, ENOUGH.get(device.type)):
        chosen = [dialogues[at] for at in group]
        spans = [Span(item.number, row, 0, len(item.ids)) for row, item in enumerate(chosen)]
        ids = padded([item.ids for item in chosen], pad_id, device)
        batches.append(_batch(ids, None, [(row, 0, item) for row, item in enumerate(chosen)], spans))
    return batches


def packed(
    rows: Sequence[Row], dialogues: Sequence[Sequence[Dialogue]], max_tokens: int, device: torch.device
) -> list[Batch]:
    """Rows as they are, `max_tokens` at once; `dialogues` are each row's. No rows, no batches."""
    if not rows:  # a process that has none of few held-out rows
        return []
    batches = []
    at_once = max(1, max_tokens // len(rows[0]["input_ids"]))
    for first in range(0, len(rows), at_once):
        chosen = range(first, min(first + at_once, len(rows)))
        ids, positions = (
            torch.tensor([rows[at][key] for at in chosen], device=device) for key in ("input_ids", "position_ids")
        )
        placed = [(row, item.start, item) for row, at in enumerate(chosen) for item in dialogues[at]]
        spans = [Span(item.number, row, start, len(item.ids)) for row, start, item in placed]
        if placed:
            batches.append(_batch(ids, positions, placed, spans))
    return batches


def _batch(
    ids: torch.Tensor, positions: torch.Tensor | None, placed: Sequence[tuple[int, int, Dialogue]], spans: list[Span]
) -> Batch:
    at = [(row, start + target) for row, start, item in placed for target in item.targets]
    row, column = torch.tensor(at, device=ids.device).unbind(1)
    return Batch(ids, positions, (row, column - 1), ids[row, column], spans)


def embedding_noise(batch: Batch, hidden: int, alpha: float, seed: int, step: int) -> torch.Tensor:
    """(B, L, H): uniform in ±alpha / sqrt(L H), L a dialogue's own length (NEFTune, Jain et al. 2023, algorithm 1).

    A dialogue's noise is a function of seed, step and the dialogue alone: of no packing, micro-batch or process.
    """
    noise = torch.zeros(*batch.input_ids.shape, hidden, device=batch.input_ids.device)
    for span in batch.spans:
        generator = torch.Generator(noise.device).manual_seed(_seed(seed, step, span.number))
        drawn = torch.rand(span.length, hidden, generator=generator, device=noise.device).mul_(2).sub_(1)
        noise[span.row, span.start : span.start + span.length] = drawn * (alpha / (span.length * hidden) ** 0.5)
    return noise


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
