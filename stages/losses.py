"""PPO's clipped losses: pure functions of tensors, summed over response tokens.

B batch, T response positions. The loop divides the sums by the global number of response tokens of an optimizer step,
on all ranks, so that neither micro-batches nor ranks nor padding weigh in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class PolicyLoss(NamedTuple):
    """Sums over response tokens."""

    loss: torch.Tensor  # clipped surrogate, to be minimised
    num_clipped: torch.Tensor  # tokens where the clip was active
    approx_kl: torch.Tensor  # k3 estimate of KL(old || new), in nats


class ValueLoss(NamedTuple):
    """Sums over response tokens."""

    loss: torch.Tensor  # half the larger of the two squared errors
    num_clipped: torch.Tensor


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    is_response: torch.Tensor,
    clip_ratio: float,
) -> PolicyLoss:
    """Clipped surrogate; all inputs (B, T). Schulman et al. 2017, eq. 7."""
    log_ratio = torch.where(is_response, logprobs - old_logprobs, torch.zeros_like(logprobs))
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    losses = torch.maximum(plain, clipped)
    zero = torch.zeros_like(losses)
    return PolicyLoss(
        loss=torch.where(is_response, losses, zero).sum(),
        num_clipped=((clipped > plain) & is_response).sum(),
        approx_kl=torch.where(is_response, ratio - 1 - log_ratio, zero).sum().detach(),
    )


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    is_response: torch.Tensor,
    clip_range: float,
) -> ValueLoss:
    """Clipped value loss; all inputs (B, T). Huang et al. 2024, detail on value function clipping.

    `clip_range` is in the units of the rewards: the loop scales it by the running deviation of the scores.
    """
    clipped_values = old_values + (values - old_values).clamp(-clip_range, clip_range)
    plain = (values - returns).square()
    clipped = (clipped_values - returns).square()
    losses = 0.5 * torch.maximum(plain, clipped)
    return ValueLoss(
        loss=torch.where(is_response, losses, torch.zeros_like(losses)).sum(),
        num_clipped=((clipped > plain) & is_response).sum(),
    )
