"""Whether an engine samples from the trained policy, by its log-probabilities; weights where it does not quite."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from baton.errors import UserError


def drift_nats(engine: Sequence[Sequence[float]], trainer: Sequence[Sequence[float]]) -> float:
    """Mean |log p_engine - log p_trainer| over the sampled tokens of all replies, in nats a token.

    One sequence of log-probabilities a reply, the same tokens in both. Raises ValueError where they differ in length:
    an engine that gives no log-probabilities cannot be checked.
    """
    lengths = [[len(reply) for reply in side] for side in (engine, trainer)]
    if lengths[0] != lengths[1]:
        raise ValueError(f"the engine gives log-probabilities for {lengths[0]} tokens, the trainer for {lengths[1]}")
    gaps = [abs(a - b) for ours, theirs in zip(engine, trainer, strict=True) for a, b in zip(ours, theirs, strict=True)]
    return sum(gaps) / len(gaps) if gaps else 0.0


def check_engine(engine: Sequence[Sequence[float]], trainer: Sequence[Sequence[float]], limit: float) -> float:
    """The drift in nats a token; raises UserError above `limit` (`rollout.drift_nats`), or where it is not a number."""
    found = drift_nats(engine, trainer)
    if found <= limit:
        return found
    gaps = [
        (abs(a - b), reply, at)
        for reply, (ours, theirs) in enumerate(zip(engine, trainer, strict=True))
        for at, (a, b) in enumerate(zip(ours, theirs, strict=True))
    ]
    # a gap that is no number is the worst of all
    worst, reply, at = max(gaps, key=lambda gap: (gap[0] != gap[0], gap[0]))
    raise UserError(
        f"the rollout engine and the trainer disagree about the sampled tokens: {found:.4g} nats a token on average "
        f"over {len(gaps):,} tokens (at most {limit:g}; see rollout.drift_nats); the worst is {worst:.4g} nats "
        f"at token {at} of reply {reply}. The engine has other weights, or computes otherwise: check that it "
        "serves the same base, dtype and adapter; where only its numerics differ, raise rollout.drift_nats and set "
        "rollout.importance_cap"
    )


def importance_weights(trainer: torch.Tensor, engine: torch.Tensor, cap: float) -> torch.Tensor:
    """min(p_trainer / p_engine, cap) of each token: (B, T) log-probabilities -> (B, T) weights without gradient.

    Truncated importance sampling (Ionides 2008; Yao et al. 2025 for rollout engines). Positions that are no response
    tokens must hold the same number, such as zero, in both; their weight is then min(1, cap).
    """
    # the cap before the exponential: a large gap would overflow
    return (trainer - engine).detach().clamp(max=float(torch.tensor(cap, dtype=torch.float64).log())).exp()
