"""How members' scores become the one number that PPO optimises: pure functions of tensors (K, N) -> (N,)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def pessimistic(scores: torch.Tensor, penalty: float) -> torch.Tensor:
    """scores (K, N) of K members -> mean - penalty x population deviation over the members (N,).

    What the members disagree about is worth less (Eisenstein et al. 2023, "mean minus standard deviation"; Coste et
    al. 2023, eq. 4, subtract the variance in its place). A penalty of 0 is the plain mean.
    """
    mean = scores.mean(0)
    return mean - penalty * deviation(scores) if penalty else mean


def deviation(scores: torch.Tensor) -> torch.Tensor:
    """scores (K, N) -> population deviation (N,) over the K members."""
    return scores.std(0, correction=0)


def less_length(scores: torch.Tensor, tokens: torch.Tensor, slope: float, mean_tokens: float) -> torch.Tensor:
    """scores (K, N) less `slope` for each token (N,) of the reply beyond `mean_tokens`."""
    return scores - slope * (tokens.to(scores.dtype) - mean_tokens)


@dataclass(frozen=True)
class Shaping:
    """What one reward's scores go through, with the figures of its recipe and of its versions' records.

    In this order: length, reference, normalisation, for each member by itself; then the combination. A Bradley-Terry
    reward is known only up to a constant for each prompt: members are compared after the reference's reply has taken
    it away, where `by_reference` says so, and after each version has its own scale.
    """

    members: int = 1
    deviation_penalty: float = 0.0
    slope: float | None = None  # score a token of the reply; None leaves length alone
    mean_tokens: float = 0.0
    by_reference: bool = False
    centres: Sequence[float] = ()  # of each member, subtracted; none where scores keep their scale
    scales: Sequence[float] = ()  # of each member, divided by

    @property
    def changes(self) -> bool:
        """Whether what is optimised differs from the members' plain mean."""
        return bool(self.deviation_penalty or self.scales or self.by_reference or self.slope is not None)

    def by_length(self, scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The first step: scores (K, N) of replies of so many `tokens` (N,); also for the reference's replies."""
        return scores if self.slope is None else less_length(scores, tokens, self.slope, self.mean_tokens)

    def each(self, scores: torch.Tensor, tokens: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
        """Every member's score (K, N) before the combination; `reference` (K, N) has been through `by_length`."""
        assert len(scores) == self.members, (scores.shape, self.members)
        assert (reference is not None) == self.by_reference
        scores = self.by_length(scores, tokens)
        if reference is not None:
            scores = scores - reference
        if self.scales:
            # what is subtracted from reply and reference alike has gone already
            centres = [0.0] * self.members if self.by_reference else list(self.centres)
            scores = (scores - _column(centres, scores)) / _column(self.scales, scores)
        return scores

    def combine(self, scores: torch.Tensor) -> torch.Tensor:
        """What `each` gave (K, N) as one number a reply (N,)."""
        return pessimistic(scores, self.deviation_penalty)


def _column(figures: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(figures), dtype=like.dtype, device=like.device)[:, None]
