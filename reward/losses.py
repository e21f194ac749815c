"""The loss of preference pairs: Bradley-Terry, with a margin, smoothed labels, ties and scores centred on zero."""

from __future__ import annotations

import torch
from torch.nn import functional

from baton.recipe import PairLoss

TIE = 0.5
"""Of a tie either reply is the preferred one with this probability."""


def targets(is_tie: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """is_tie (N,) -> (N,), the probability that the chosen reply is the preferred one.

    `label_smoothing` is the share of labels that are taken to be swapped: Wang et al. 2024, "Secrets of RLHF in Large
    Language Models part II", section 2.2.
    """
    return torch.where(is_tie, TIE, 1 - label_smoothing)


def pair_losses(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor, target: torch.Tensor, loss: PairLoss
) -> torch.Tensor:
    """Losses (N,) in nats of scores (N,): the cross-entropy of `target` and sigmoid(chosen - rejected - m).

    Bradley and Terry 1952, as in Ouyang et al. 2022, eq. 1; with m = margin_weight x margin (N,) as in Touvron et al.
    2023 (Llama 2), eq. 2; zero where a pair has none. `centring` x (chosen + rejected)^2 keeps the scores around zero,
    which differences alone leave open: Eisenstein et al. 2023, section 2, TRL's `center_rewards_coefficient`.
    """
    gap = chosen - rejected - loss.margin_weight * margin
    # -t log sigmoid(g) - (1 - t) log sigmoid(-g)
    entropy = functional.softplus(-gap) + (1 - target) * gap
    return entropy + loss.centring * (chosen + rejected).square()
