"""From scores and log-probabilities to rewards, advantages and returns: pure functions of tensors.

B batch, T response positions, S states. `is_response` (B, T) is True at sampled tokens, the end-of-turn token included;
`is_state` (B, S) is the same, with one state more after the end where the score is given there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from baton.ppo_sections import Algorithm


@dataclass
class RunningScale:
    """Mean and deviation of all scores so far, from their count, sum and sum of squares."""

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def add(self, sums: list[float]) -> None:
        """Add [count, sum, sum of squares]."""
        self.count += sums[0]
        self.total += sums[1]
        self.squares += sums[2]

    @property
    def deviation(self) -> float:
        """1 as long as all scores are equal: dividing by next to nothing would blow them up."""
        mean = self.total / max(self.count, 1)
        variance = self.squares / max(self.count, 1) - mean * mean
        return math.sqrt(variance) if variance > 1e-8 else 1.0


def shape_scores(
    rewards: torch.Tensor,
    ended: torch.Tensor,
    lengths: torch.Tensor,
    max_new_tokens: int,
    deviation: float,
    settings: Algorithm,
) -> torch.Tensor:
    """The score (B,) that PPO optimises, from the weighted sum of rewards (B,); `ended`, `lengths` (B,).

    In this order: divided by the running `deviation` of the rewards, which keeps their mean's sign; clipped; lessened
    by the overlong penalty, linear over the last `overlong_tokens` before the limit (Yu et al. 2025, eq. 13); and,
    where a reply did not end, lessened or replaced by the missing-EOS penalty (Huang et al. 2024, the EOS trick).
    """
    scores = rewards / deviation if settings.normalise_reward else rewards
    if settings.clip_reward is not None:
        scores = scores.clamp(-settings.clip_reward, settings.clip_reward)
    if settings.overlong_tokens is not None:
        over = (lengths - (max_new_tokens - settings.overlong_tokens)).clamp(min=0).to(scores.dtype)
        over = over / settings.overlong_tokens
        scores = scores - settings.overlong_penalty * over.clamp(max=1.0)
    if settings.missing_eos == "replace":
        return torch.where(ended, scores, -settings.missing_eos_penalty)
    return scores - settings.missing_eos_penalty * (~ended).to(scores.dtype)


def token_rewards(
    scores: torch.Tensor,
    kl: torch.Tensor,
    is_response: torch.Tensor,
    is_state: torch.Tensor,
    kl_coefficient: float,
) -> torch.Tensor:
    """Rewards (B, S): -kl_coefficient x the KL estimate (B, T) of each token, plus the score (B,) at the last state.

    Ziegler et al. 2019, eq. 2. The last state is before the last response token, or after it (`is_state` longer).
    """
    rewards = torch.zeros(is_state.shape, dtype=kl.dtype, device=kl.device)
    rewards[:, : kl.shape[1]] = torch.where(is_response, -kl_coefficient * kl, 0)
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, is_state.sum(-1) - 1] += scores
    return rewards


def gae(rewards: torch.Tensor, values: torch.Tensor, is_state: torch.Tensor, gamma: float, lam: float) -> torch.Tensor:
    """Generalised advantage estimation. rewards, values: (B, S) -> advantages (B, S). Schulman et al. 2016, eq. 16.

    The value after a row's last state is zero: the episode ends there, cut off or not.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        here = is_state[:, t]
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = torch.where(here, delta + gamma * lam * running, 0)
        following = torch.where(here, values[:, t], 0)
        advantages[:, t] = running
    return advantages


def moments(tensor: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """(count, sum, sum of squares) in float64 over `chosen`; add them over ranks before `whiten`."""
    picked = tensor[chosen].double()
    return torch.stack([picked.new_tensor(float(picked.numel())), picked.sum(), picked.square().sum()])


def whiten(tensor: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """(tensor - mean) / std with mean and std of the global batch, from its summed `moments`."""
    count, first, second = total.tolist()
    mean = first / max(count, 1)
    variance = max(second / max(count, 1) - mean * mean, 0.0)
    return (tensor - mean) / (variance**0.5 + 1e-8)


def explained_variance(residuals: torch.Tensor, returns: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns), from the summed `moments` (3,) of residuals and of returns."""
    spread = [float(m[2] / m[0] - (m[1] / m[0]) ** 2) for m in (residuals, returns)]
    return 1 - spread[0] / spread[1] if spread[1] > 1e-12 else 0.0
