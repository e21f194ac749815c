"""From scores and log-probabilities to rewards, advantages and returns: pure functions of tensors.

B batch, T response positions. `is_response` (B, T) is True at sampled tokens, the end-of-turn token included.
"""

from __future__ import annotations

import torch


def token_rewards(
    scores: torch.Tensor, kl: torch.Tensor, is_response: torch.Tensor, kl_coefficient: float
) -> torch.Tensor:
    """Rewards (B, T): -kl_coefficient x per-token KL, plus the score (B,) at each row's last response token.

    kl (B, T) is log pi(a|s) - log pi_ref(a|s), the k1 estimate in nats. Ziegler et al. 2019, eq. 2.
    """
    rewards = torch.where(is_response, -kl_coefficient * kl, torch.zeros_like(kl))
    last = is_response.sum(-1) - 1
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, last] += scores
    return rewards


def gae(
    rewards: torch.Tensor, values: torch.Tensor, is_response: torch.Tensor, gamma: float, lam: float
) -> torch.Tensor:
    """Generalised advantage estimation. rewards, values: (B, T) -> advantages (B, T). Schulman et al. 2016, eq. 16.

    The value after a row's last response token is zero: the episode ends there, cut off or not.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        here = is_response[:, t]
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = torch.where(here, delta + gamma * lam * running, torch.zeros_like(running))
        following = torch.where(here, values[:, t], torch.zeros_like(following))
        advantages[:, t] = running
    return advantages


def moments(tensor: torch.Tensor, is_response: torch.Tensor) -> torch.Tensor:
    """(count, sum, sum of squares) in float64 over response tokens; add them over ranks before `whiten`."""
    chosen = tensor[is_response].double()
    return torch.stack([chosen.new_tensor(float(chosen.numel())), chosen.sum(), chosen.square().sum()])


def whiten(tensor: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """(tensor - mean) / std with mean and std of the global batch, from its summed `moments`."""
    count, first, second = total.tolist()
    mean = first / max(count, 1)
    variance = max(second / max(count, 1) - mean * mean, 0.0)
    return (tensor - mean) / (variance**0.5 + 1e-8)
