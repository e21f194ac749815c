"""Remedies for a biased reward: what a token is worth to it, and shaping by a reference reply.

The penalty itself is `reward.combine.less_length`, which PPO applies: what is measured is what is used.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from reward.knowledge.length import Lengths


class LengthFit(NamedTuple):
    """What a token more was worth to the reward, other things equal."""

    slope: float  # score a token
    error: float  # the slope's standard error
    mean_tokens: float  # of the replies it was fitted on: there, a penalty changes nothing


def fit_length(margin: torch.Tensor, lengths: Lengths) -> LengthFit | None:
    """The least-squares slope of score on length within prompts; None where no pair's lengths differ.

    margin (N,), chosen minus rejected, of training pairs. With a constant for every prompt, two replies a prompt, the
    normal equation is slope = sum(dm · dl) / sum(dl²) over the differences of margin and length: what is common to the
    replies of one prompt drops out. N − 1 degrees of freedom are left of the N differences.
    """
    score, tokens = margin.double(), lengths.difference.double()
    squares = float((tokens**2).sum())
    if not squares:
        return None
    slope = float((score * tokens).sum()) / squares
    rest = float(((score - slope * tokens) ** 2).sum())
    error = math.sqrt(rest / max(len(score) - 1, 1) / squares)
    return LengthFit(slope, error, float(torch.cat([lengths.chosen, lengths.rejected]).mean()))


def shape_by_reference(scores: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """scores (…, N) minus the scores (…, N) of the SFT model's replies to the same prompts.

    What a prompt adds to all of its replies goes; the order within a prompt stays. The reward then says how much
    better than SFT a reply is (reward shaping as in Fu et al. 2025, "Reward shaping to mitigate reward hacking").
    """
    return scores - reference
