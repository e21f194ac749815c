"""The divergence of the policy from the reference: its estimators, and a coefficient that keeps it near a target."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: torch.Tensor, reference: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """KL(policy || reference) of each sampled token in nats; inputs and output of one shape. Schulman 2020.

    With r = p_ref / p of the token: k1 = -log r (unbiased), k2 = (log r)^2 / 2 (low variance, with the KL's gradient),
    k3 = r - 1 - log r (unbiased, never negative).
    """
    log_ratio = reference - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return log_ratio.expm1() - log_ratio


@dataclass
class KLCoefficient:
    """beta, fixed or adapted by a proportional controller. Ziegler et al. 2019, section 2.2."""

    value: float
    target_nats: float | None
    horizon_episodes: int

    def adapt(self, kl_nats: float, episodes: int) -> None:
        """After a batch of `episodes` whose mean KL a reply was `kl_nats`."""
        if self.target_nats is None:
            return
        error = min(max(kl_nats / self.target_nats - 1, -0.2), 0.2)
        # the exponential of the paper's 1 + x, which would turn negative where a batch is longer than the horizon
        self.value *= math.exp(error * episodes / self.horizon_episodes)
