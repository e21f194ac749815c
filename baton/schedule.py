"""The order of training rows as a function of seed and step alone: the same at any world size and after any restart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def row_order(
    num_rows: int, rows_per_batch: int, steps: int, seed: int, lengths: Sequence[int] | None = None
) -> list[int]:
    """The rows of `steps` batches, in training order: every row once an epoch, each epoch in its own seeded order.

    With `lengths`, the rows of a batch stand longest first, so that its micro-batches pad little; which rows a batch
    holds does not change.
    """
    assert num_rows > 0, "no rows to order"
    order: list[int] = []
    epoch = 0
    while len(order) < steps * rows_per_batch:
        order += np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_rows).tolist()
        epoch += 1
    batches = [order[at : at + rows_per_batch] for at in range(0, steps * rows_per_batch, rows_per_batch)]
    if lengths is not None:
        batches = [sorted(batch, key=lambda row: (-lengths[row], row)) for batch in batches]
    return [row for batch in batches for row in batch]


def batch_number(step: int, skipped: Sequence[int] = ()) -> int:
    """Which batch the optimizer step `step` (from 0) reads: batches in their order, without the `skipped` ones."""
    number = step
    for batch in sorted(set(skipped)):
        if batch > number:
            break
        number += 1
    return number
