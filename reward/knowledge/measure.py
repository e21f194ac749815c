"""What is known of a reward: its measures on held-out pairs and SFT samples, all that its report shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from reward.knowledge import accuracy, calibration, ensemble
from reward.knowledge.accuracy import Share
from reward.knowledge.calibration import Bin
from reward.knowledge.debias import LengthFit, fit_length
from reward.knowledge.ensemble import Quantile
from reward.knowledge.evenly import evenly
from reward.knowledge.length import (
    Lengths,
    correlation,
    is_matched,
    longer_points,
    reply_lengths,
    within_pairs,
)
from reward.knowledge.remedies import Remedy, compare_remedies, reference_scores
from reward.knowledge.robustness import Perturbed, robustness
from reward.knowledge.sft_samples import SftSample
from reward.pairs import Pair
from reward.scoring import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Knowledge:
    """All that was found out; `metrics` go into the manifest, the rest into the report."""

    metrics: dict[str, float]
    margin: torch.Tensor  # (K, N) chosen minus rejected, of the pairs that one side won
    scores: torch.Tensor  # (2N,) mean over members, the chosen replies first
    lengths: Lengths  # of those pairs
    ties: torch.Tensor  # (K, T) margins of the pairs that were judged equal
    groups: dict[str, dict[str, Share]] = field(default_factory=dict)  # by what -> group -> accuracy
    bins: list[Bin] = field(default_factory=list)
    quantiles: list[Quantile] = field(default_factory=list)
    samples: list[SftSample] = field(default_factory=list)
    sample_scores: torch.Tensor | None = None  # (K, S)
    perturbed: list[Perturbed] = field(default_factory=list)
    fit: LengthFit | None = None
    fitted_on: str = ""
    remedies: list[Remedy] = field(default_factory=list)


def know(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    samples: Sequence[SftSample] = (),
    fitting: Sequence[Pair] = (),
    num_perturbed: int = 128,
    max_tokens: int | None = None,
    fit: LengthFit | None = None,
) -> Knowledge:
    """Measure a reward on held-out `pairs`, at least one of which a side has won.

    samples: the SFT model's replies to prompts of `pairs` (`sft_samples.sample_sft`), for the reward's scale and for
    shaping by reference. fitting: training pairs on which the length's worth is fitted; without any, the `fit` of
    earlier or, failing that, `pairs` themselves. num_perturbed: so many pairs, evenly taken, are scored again with
    every perturbation on either side. max_tokens: a perturbed reply that makes a sequence longer is left out.
    """
    from baton.chat import encode_scored

    decided = [pair for pair in pairs if not pair.is_tie]
    tied = [pair for pair in pairs if pair.is_tie]
    assert decided, "no pair that a side has won"
    chosen, rejected = score_pairs(scorer, decided)
    lengths = token_lengths(tokenizer, decided)
    metrics = measure(chosen, rejected, decided, lengths)
    ties = torch.zeros(len(chosen), 0)
    if tied:
        ties = torch.sub(*score_pairs(scorer, tied))
        metrics |= measure_ties(torch.sub(chosen, rejected), ties)
    sample_scores = scorer([sample.ids for sample in samples]) if samples else None
    if sample_scores is not None:
        metrics |= measure_samples(sample_scores, samples)

    margin, scores = chosen - rejected, torch.cat([chosen.mean(0), rejected.mean(0)])
    perturbed = robustness(
        scorer,
        lambda messages: encode_scored(tokenizer, messages),
        evenly(decided, num_perturbed),
        deviation=metrics.get("sft/score_deviation") or float(scores.std(correction=0)),
        max_tokens=max_tokens,
    )
    for found in perturbed:
        metrics |= found.metrics()

    fit, fitted_on = _fitted(scorer, tokenizer, decided, margin.mean(0), lengths, fitting, fit)
    if fit is not None:
        metrics |= {"length/slope": fit.slope, "length/slope_error": fit.error, "length/mean": fit.mean_tokens}
    references = None if sample_scores is None else reference_scores(decided, samples, sample_scores.mean(0))
    remedies = compare_remedies(chosen.mean(0), rejected.mean(0), lengths, fit, references)
    for remedy in remedies[1:]:
        metrics |= remedy.metrics()
    return Knowledge(
        metrics=metrics,
        margin=margin,
        scores=scores,
        lengths=lengths,
        ties=ties,
        groups=accuracy_by_group(margin.mean(0), decided),
        bins=calibration.reliability(margin.mean(0), accuracy.points(margin.mean(0))),
        quantiles=ensemble.by_disagreement(margin) if len(margin) > 1 else [],
        samples=list(samples),
        sample_scores=sample_scores,
        perturbed=perturbed,
        fit=fit,
        fitted_on=fitted_on,
        remedies=remedies,
    )


def _fitted(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    margin: torch.Tensor,
    lengths: Lengths,
    fitting: Sequence[Pair],
    fit: LengthFit | None,
) -> tuple[LengthFit | None, str]:
    """(what a token is worth, on what it was fitted); margin (N,) and lengths are of the held-out `pairs`."""
    if fitting:
        training = torch.sub(*score_pairs(scorer, fitting)).mean(0)
        return fit_length(training, token_lengths(tokenizer, fitting)), f"{len(fitting):,} training pairs"
    if fit is not None:
        return fit, "the pairs of its training"
    return fit_length(margin, lengths), f"these {len(pairs):,} pairs themselves"


def token_lengths(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> Lengths:
    """Tokens of the replies, all that stands behind the prompt and the opening of the assistant's turn."""
    from baton.chat import encode_prompt

    return reply_lengths(pairs, [len(encode_prompt(tokenizer, pair.prompt)) for pair in pairs])


def score_pairs(scorer: Scorer, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (K, N) of the chosen sides and of the rejected."""
    scores = scorer([*(pair.chosen_ids for pair in pairs), *(pair.rejected_ids for pair in pairs)])
    assert scores.ndim == 2 and scores.shape[1] == 2 * len(pairs), scores.shape
    return scores[:, : len(pairs)], scores[:, len(pairs) :]


def measure(
    chosen: torch.Tensor, rejected: torch.Tensor, pairs: Sequence[Pair], lengths: Lengths | None = None
) -> dict[str, float]:
    """The manifest's `eval/…` from scores (K, N) of N > 0 pairs, none of them a tie.

    lengths: of the replies in tokens; by default those behind what both sides begin with. What is not defined on
    these pairs (a correlation of equal scores, say) is left out.
    """
    assert chosen.shape == rejected.shape == (len(chosen), len(pairs)) and len(pairs), (chosen.shape, len(pairs))
    lengths = lengths or reply_lengths(pairs)
    margins = (chosen - rejected).double()
    margin = margins.mean(0)
    given, matched = accuracy.points(margin), is_matched(lengths)
    clusters = accuracy.prompt_clusters(pairs)
    whole = accuracy.share(given, clusters)
    bins = calibration.reliability(margin, given)
    found: dict[str, float | None] = {
        "eval/pairs": whole.count,
        "eval/loss": float(-torch.nn.functional.logsigmoid(margin).mean()),
        "eval/margin": float(margin.mean()),
        "eval/accuracy": whole.rate,
        "eval/accuracy_low": whole.low,
        "eval/accuracy_high": whole.high,
        "eval/calibration_error": calibration.expected_calibration_error(bins),
        "eval/calibration_noise": calibration.calibration_noise(bins),
        "eval/temperature": calibration.best_temperature(margin),
        "eval/accuracy_longer": accuracy.share(longer_points(lengths)).rate,
        "eval/pairs_matched": int(matched.sum()),
        "eval/length_correlation": correlation(
            torch.cat([chosen.mean(0), rejected.mean(0)]), torch.cat([lengths.chosen, lengths.rejected])
        ),
        "eval/length_correlation_within": within_pairs(margin, lengths),
        "eval/error_auroc": ensemble.auroc(-margin.abs(), given < 1),
    }
    if matched.any():
        like = accuracy.share(given[matched], [clusters[at] for at in matched.nonzero().flatten().tolist()])
        found |= {
            "eval/accuracy_matched": like.rate,
            "eval/accuracy_matched_low": like.low,
            "eval/accuracy_matched_high": like.high,
            "eval/accuracy_longer_matched": accuracy.share(longer_points(lengths)[matched]).rate,
        }
    if len(chosen) > 1:
        found |= {
            "eval/agreement": ensemble.unanimity(margins),
            "eval/agreement_pairwise": ensemble.pairwise_agreement(margins),
            "eval/deviation_auroc": ensemble.auroc(ensemble.mean_and_deviation(margins)[1], given < 1),
        }
        found |= {f"eval/accuracy/member/{k}": accuracy.share(accuracy.points(m)).rate for k, m in enumerate(margins)}
    for by, groups in accuracy_by_group(margin, pairs).items():
        if by != "score margin":
            found |= {_group_key(by, group): seen.rate for group, seen in groups.items()}
    return {key: float(value) for key, value in found.items() if value is not None}


def accuracy_by_group(margin: torch.Tensor, pairs: Sequence[Pair]) -> dict[str, dict[str, Share]]:
    """Accuracy by source, turns, annotated margin (of the pairs that have one) and the reward's own |margin| (N,)."""
    given = accuracy.points(margin)
    clusters = accuracy.prompt_clusters(pairs)
    found = {
        "source": accuracy.by_group(given, [pair.source for pair in pairs], clusters),
        "turns": dict(sorted(accuracy.by_group(given, accuracy.turn_groups(pairs), clusters).items())),
    }
    graded = [at for at, pair in enumerate(pairs) if pair.margin is not None]
    if graded:
        margins = [float(pairs[at].margin or 0.0) for at in graded]
        found["margin"] = _by_number(margins, given[torch.tensor(graded)], [clusters[at] for at in graded])
    found["score margin"] = _by_number(margin.abs().tolist(), given, clusters)
    return found


def _by_number(values: list[float], given: torch.Tensor, clusters: list[str]) -> dict[str, Share]:
    """Shares of points by a number, from the lowest."""
    groups = accuracy.number_groups(values)
    lowest = {group: min(v for v, g in zip(values, groups, strict=True) if g == group) for group in set(groups)}
    shares = accuracy.by_group(given, groups, clusters)
    return {group: shares[group] for group in sorted(shares, key=lambda group: lowest[group])}


def _group_key(by: str, group: str) -> str:
    return f"eval/accuracy/{group}" if by == "source" else f"eval/accuracy/{by}/{group}"


def measure_ties(decided: torch.Tensor, ties: torch.Tensor) -> dict[str, float]:
    """How much closer two replies score that were judged equal: margins (K, N) of decided pairs, (K, T) of ties."""
    decided, ties = decided.mean(0).abs(), ties.mean(0).abs()
    is_decided = torch.arange(len(decided) + len(ties)) < len(decided)
    apart = ensemble.auroc(torch.cat([decided, ties]), is_decided)
    found = {"eval/ties": float(len(ties)), "eval/tie_margin": float(ties.mean())}
    return found if apart is None else found | {"eval/tie_auroc": apart}


def measure_samples(scores: torch.Tensor, samples: Sequence[SftSample]) -> dict[str, float]:
    """The manifest's `sft/…` from scores (K, S) of the SFT model's replies.

    Bradley-Terry fixes a member's scores but for a constant: `sft/score_mean/<k>` says where each member stands, to be
    taken off before the deviation over members means anything.
    """
    mean = scores.double().mean(0)
    found = {
        "sft/samples": float(len(samples)),
        "sft/score_mean": float(mean.mean()),
        "sft/score_deviation": float(mean.std(correction=0)),
        "sft/tokens": sum(len(sample.reply_ids) for sample in samples) / len(samples),
        "sft/ended": sum(sample.ended for sample in samples) / len(samples),
    }
    if len(scores) > 1:
        centred = scores.double() - scores.double().mean(1, keepdim=True)
        found["sft/member_deviation"] = float(centred.std(0, correction=0).mean())
        for number, member in enumerate(scores.double()):
            found[f"sft/score_mean/{number}"] = float(member.mean())
            found[f"sft/score_deviation/{number}"] = float(member.std(correction=0))
    return found
