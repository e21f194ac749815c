"""PPO's clipped losses: pure functions of tensors, summed over response tokens.

B batch, T response positions, S states. The loop divides the sums by the global number of response tokens of an
optimizer step, on all ranks, so that neither micro-batches nor ranks nor padding weigh in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class PolicyLoss(NamedTuple):
    """Sums over response tokens."""

    loss: torch.Tensor  # clipped surrogate, to be minimised
    num_clipped: torch.Tensor  # tokens where a clip was active
    approx_kl: torch.Tensor  # k3 estimate of KL(old || new), in nats


class ValueLoss(NamedTuple):
    """Sums over states."""

    loss: torch.Tensor  # half the larger of the two squared errors
    num_clipped: torch.Tensor


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    is_response: torch.Tensor,
    clip_low: float,
    clip_high: float,
    *,
    dual_clip: float | None = None,
    weights: torch.Tensor | None = None,
) -> PolicyLoss:
    """Clipped surrogate; all tensors (B, T). Schulman et al. 2017, eq. 7.

    The ratio is held within [1 - clip_low, 1 + clip_high]; with two bounds, Yu et al. 2025 (clip-higher).
    `dual_clip` > 1 bounds the loss of tokens with negative advantage at dual_clip x |advantage|: Ye et al. 2020, eq. 5.
    `weights` correct for an engine that sampled from other probabilities than the trainer's; they carry no gradient.
    """
    log_ratio = torch.where(is_response, logprobs - old_logprobs, 0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = torch.maximum(plain, clipped)
    is_clipped = clipped > plain
    if dual_clip is not None:
        bounded = torch.minimum(losses, -dual_clip * advantages)
        is_clipped = is_clipped | ((advantages < 0) & (bounded < losses))
        losses = torch.where(advantages < 0, bounded, losses)
    if weights is not None:
        losses = losses * weights
    return PolicyLoss(
        loss=torch.where(is_response, losses, 0).sum(),
        num_clipped=(is_clipped & is_response).sum(),
        approx_kl=torch.where(is_response, ratio - 1 - log_ratio, 0).sum().detach(),
    )


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    is_state: torch.Tensor,
    clip_range: float,
) -> ValueLoss:
    """Clipped value loss; all inputs (B, S). Huang et al. 2024, detail on value function clipping.

    `clip_range` is in the units of the rewards: the loop scales it by the running deviation of the scores.
    """
    clipped_values = old_values + (values - old_values).clamp(-clip_range, clip_range)
    plain = (values - returns).square()
    clipped = (clipped_values - returns).square()
    losses = 0.5 * torch.maximum(plain, clipped)
    return ValueLoss(
        loss=torch.where(is_state, losses, 0).sum(),
        num_clipped=((clipped > plain) & is_state).sum(),
    )
