"""What each remedy does to a reward's measures on held-out pairs: the table of before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reward.combine import less_length
from reward.knowledge import accuracy, calibration, ensemble
from reward.knowledge.accuracy import Share
from reward.knowledge.debias import LengthFit, shape_by_reference
from reward.knowledge.length import Lengths, correlation, is_matched, within_pairs
from reward.knowledge.sft_samples import SftSample, prompt_key
from reward.pairs import Pair

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Multiples of the fitted slope at which a penalty is tried."""


@dataclass(frozen=True)
class Remedy:
    """The measures under one remedy."""

    name: str
    count: int  # pairs that they are taken over
    accuracy: Share
    matched: Share | None  # on pairs of like length
    calibration_error: float
    length_correlation: float | None
    length_within: float | None  # among the replies to one prompt
    across_prompts: float | None  # how often a chosen reply outscores a rejected one, whatever their prompts

    def metrics(self) -> dict[str, float]:
        """For the manifest."""
        found = {
            "accuracy": self.accuracy.rate,
            "accuracy_matched": None if self.matched is None else self.matched.rate,
            "calibration_error": self.calibration_error,
            "length_correlation": self.length_correlation,
            "length_correlation_within": self.length_within,
            "across_prompts": self.across_prompts,
        }
        return {f"{self.name}/{key}": value for key, value in found.items() if value is not None}


def compare_remedies(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    lengths: Lengths,
    fit: LengthFit | None,
    reference: torch.Tensor | None,
) -> list[Remedy]:
    """The reward as it is, then under each remedy there are the means for; all on the same pairs.

    chosen, rejected: (N,) scores. reference: (N,) scores of SFT's replies to the pairs' prompts, NaN where there is
    none; pairs without one are left out of every row, so that rows can be compared.
    """
    if reference is not None:
        has_one = ~reference.isnan()
        reference = reference[has_one] if has_one.any() else None
        if reference is not None:
            chosen, rejected = chosen[has_one], rejected[has_one]
            lengths = Lengths(lengths.chosen[has_one], lengths.rejected[has_one])
    found = [effect("none", chosen, rejected, lengths)]
    if fit is not None:
        found.append(effect("length_penalty", *penalised(chosen, rejected, lengths, fit), lengths))
    if reference is not None:
        shaped = shape_by_reference(chosen, reference), shape_by_reference(rejected, reference)
        found.append(effect("reference_shaping", *shaped, lengths))
        if fit is not None:
            found.append(effect("both", *penalised(*shaped, lengths, fit), lengths))
    return found


def penalised(
    chosen: torch.Tensor, rejected: torch.Tensor, lengths: Lengths, fit: LengthFit, strength: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides' scores (N,) less `strength` times the fitted worth of their length."""
    slope = strength * fit.slope
    return (
        less_length(chosen, lengths.chosen, slope, fit.mean_tokens),
        less_length(rejected, lengths.rejected, slope, fit.mean_tokens),
    )


def effect(name: str, chosen: torch.Tensor, rejected: torch.Tensor, lengths: Lengths) -> Remedy:
    """The measures of scores (N,) of the chosen replies and of the rejected."""
    margin = chosen - rejected
    given, matched = accuracy.points(margin), is_matched(lengths)
    scores = torch.cat([chosen, rejected])
    return Remedy(
        name=name,
        count=len(margin),
        accuracy=accuracy.share(given),
        matched=accuracy.share(given[matched]) if matched.any() else None,
        calibration_error=calibration.expected_calibration_error(calibration.reliability(margin, given)),
        length_correlation=correlation(scores, torch.cat([lengths.chosen, lengths.rejected])),
        length_within=within_pairs(margin, lengths),
        across_prompts=ensemble.auroc(scores, torch.arange(len(scores)) < len(chosen)),
    )


def reference_scores(pairs: Sequence[Pair], samples: Sequence[SftSample], scores: torch.Tensor) -> torch.Tensor:
    """The mean of the samples' scores (S,) at each pair's prompt, (N,); NaN at a prompt without samples."""
    by_prompt: dict[str, list[float]] = {}
    for sample, score in zip(samples, scores.tolist(), strict=True):
        by_prompt.setdefault(prompt_key(sample.prompt), []).append(score)
    means = {key: sum(found) / len(found) for key, found in by_prompt.items()}
    return torch.tensor([means.get(prompt_key(pair.prompt), float("nan")) for pair in pairs])
