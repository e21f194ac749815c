"""How far a reward's judgement is its replies' length: correlations, length-matched pairs, and longest-wins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from reward.pairs import Pair

MATCHED_WITHIN = 0.1
"""Replies are of like length when the shorter lacks at most so much of the longer."""


class Lengths(NamedTuple):
    """Tokens of the replies of N pairs, (N,) each."""

    chosen: torch.Tensor
    rejected: torch.Tensor

    @property
    def difference(self) -> torch.Tensor:
        """Chosen minus rejected (N,)."""
        return self.chosen - self.rejected


def reply_lengths(pairs: Sequence[Pair], prompt_tokens: Sequence[int] | None = None) -> Lengths:
    """Tokens behind the prompt; without the prompts' `prompt_tokens` those behind what both sides begin with.

    An opening that both replies have in common counts only where the prompts' own lengths are known.
    """
    begins = [pair.shared for pair in pairs] if prompt_tokens is None else list(prompt_tokens)
    assert len(begins) == len(pairs), (len(begins), len(pairs))
    rows = [
        (max(len(pair.chosen_ids) - begin, 1), max(len(pair.rejected_ids) - begin, 1))
        for pair, begin in zip(pairs, begins, strict=True)
    ]
    columns = torch.tensor(rows, dtype=torch.double).reshape(-1, 2)
    return Lengths(columns[:, 0], columns[:, 1])


def longer_points(lengths: Lengths) -> torch.Tensor:
    """What always preferring the longer reply gets (N,): 1, 0, or 0.5 where both are equally long."""
    return (lengths.difference > 0).double() + 0.5 * (lengths.difference == 0).double()


def is_matched(lengths: Lengths, within: float = MATCHED_WITHIN) -> torch.Tensor:
    """Of each pair (N,), whether its replies are of like length: |a − b| <= within · max(a, b)."""
    return lengths.difference.abs() <= within * torch.maximum(lengths.chosen, lengths.rejected)


def correlation(left: torch.Tensor, right: torch.Tensor) -> float | None:
    """Pearson's r of two (N,); None where one of them does not vary."""
    return _cosine(left.double() - left.double().mean(), right.double() - right.double().mean())


def within_pairs(margin: torch.Tensor, lengths: Lengths) -> float | None:
    """Correlation of score and length among the replies to one prompt; None where one of them does not vary.

    That is Pearson's r of both after each prompt's mean is taken away, so prompts that want long answers do not enter;
    of a pair the differences decide, and which side is called chosen does not matter.
    """
    return _cosine(margin.double(), lengths.difference.double())


def _cosine(left: torch.Tensor, right: torch.Tensor) -> float | None:
    scale = math.sqrt(float((left**2).sum()) * float((right**2).sum()))
    return None if scale < 1e-12 else max(-1.0, min(1.0, float((left * right).sum()) / scale))
