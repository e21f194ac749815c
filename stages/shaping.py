"""What each reward's scores go through: a recipe's settings, and what the reward's training recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence

from baton.errors import UserError
from baton.ppo_sections import RewardSource
from baton.registry import Version
from reward.combine import Shaping

SFT_MEAN, SFT_DEVIATION = "sft/score_mean", "sft/score_deviation"
SFT_TOKENS = "sft/tokens"
LENGTH_SLOPE, LENGTH_MEAN = "length/slope", "length/mean"


def num_members(version: Version) -> int:
    """How many models a reward version holds: more than one where it is an ensemble."""
    paths = [str(entry["path"]) for entry in version.manifest["files"]]
    return 1 + len({path.split("/")[1] for path in paths if path.startswith("members/")})


def shaping_of(label: str, setting: RewardSource, versions: Sequence[Version], sft: Version) -> Shaping:
    """The shaping of one reward; `versions` are its registry versions, none where it is no model of the registry.

    Raises UserError where a version lacks what a setting reads, or a setting would be ignored.
    """
    counts = [num_members(version) for version in versions]
    members = sum(counts) or 1
    if setting.deviation_penalty is not None and members == 1:
        raise UserError(
            f"reward {label}: deviation_penalty: {versions[0].ref} is a single model, whose members cannot disagree. "
            "Train an ensemble (ensemble: 4 in the reward's recipe), or name several versions: models: [A, B, C]"
        )
    centres: list[float] = []
    scales: list[float] = []
    if setting.normalise == "sft":
        for version, count in zip(versions, counts, strict=True):
            mean, deviation = _recorded(label, version, "normalise: sft", SFT_MEAN, SFT_DEVIATION)
            if not deviation > 0:
                raise UserError(
                    f"reward {label}: normalise: sft: {version.ref} has {SFT_DEVIATION} {deviation:g}: it scores all "
                    "of SFT's replies alike, and there is no scale to bring it to. Leave normalise out"
                )
            centres += _centres(version, count, mean)
            scales += [deviation] * count
    slope, mean_tokens = _length(label, setting, versions, sft)
    if slope and centres and setting.shape is None:
        # what length takes off SFT's own replies goes from where they stand; their spread is left as recorded
        tokens = [
            number
            for version, count in zip(versions, counts, strict=True)
            for number in _recorded(label, version, "normalise: sft with length_penalty", SFT_TOKENS) * count
        ]
        centres = [centre - slope * (own - mean_tokens) for centre, own in zip(centres, tokens, strict=True)]
    return Shaping(
        members=members,
        deviation_penalty=setting.deviation_penalty or 0.0,
        slope=slope,
        mean_tokens=mean_tokens,
        by_reference=setting.shape == "reference",
        centres=tuple(centres),
        scales=tuple(scales),
    )


def _centres(version: Version, count: int, mean: float) -> list[float]:
    """Where each of the version's members stands on SFT's replies: the version's mean, unless they were recorded.

    Their mean is the version's own. Bradley-Terry leaves each member a constant: members that differ by it alone do not
    disagree.
    """
    theirs = [version.metrics.get(f"{SFT_MEAN}/{at}") for at in range(count)]
    numbers = [float(own) for own in theirs if own is not None and _is_number(own)]
    return numbers if len(numbers) == count else [mean] * count


def _length(label: str, setting: RewardSource, versions: Sequence[Version], sft: Version) -> tuple[float | None, float]:
    """(score a token, tokens at which nothing changes)."""
    if setting.length_penalty is None:
        return None, 0.0
    if setting.length_penalty != "fitted":
        return float(setting.length_penalty), 0.0
    if len(versions) > 1:
        raise UserError(
            f"reward {label}: length_penalty: fitted is of one version; models: names {len(versions)}, each with a "
            "slope of its own. Give a number, or train them as one version (ensemble: in the reward's recipe)"
        )
    (version,) = versions
    slope, mean = _recorded(label, version, "length_penalty: fitted", LENGTH_SLOPE, LENGTH_MEAN)
    if version.manifest["tokenizer_digest"] != sft.manifest["tokenizer_digest"]:
        raise UserError(
            f"reward {label}: length_penalty: fitted: {version.ref} counts in tokens of another tokenizer than "
            f"{sft.ref}. Give a number: score a token of the policy's reply"
        )
    return slope, mean


def _recorded(label: str, version: Version, setting: str, *names: str) -> list[float]:
    """The figures that the version's training recorded under `names`."""
    found = [version.metrics.get(name) for name in names]
    absent = [name for name, value in zip(names, found, strict=True) if not _is_number(value)]
    if absent:
        raise UserError(
            f"reward {label}: {setting} reads {' and '.join(names)}; {version.ref} has no {' and no '.join(absent)} "
            "among its metrics. Train it again with held-out pairs (data.eval) and measure.sft_samples above 0: "
            "accelerate launch -m reward.train RECIPE"
        )
    return [float(value) for value in found if value is not None]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
