"""Where rewards come from: a recipe's reward opened as a source of checked numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from baton.ppo_sections import RewardSource
from baton.registry import Registry, Version
from reward.sample import RewardError, Sample, failure, shown

if TYPE_CHECKING:
    import torch

__all__ = ["RewardError", "Sample", "Source", "checked", "checked_members", "open_sources"]


class Source(Protocol):
    """Gives one reward a reply; `label` names it in metrics and errors, `weight` is its share of the sum."""

    label: str
    weight: float

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Rewards in the samples' order, before the weight. May raise anything: call it by `checked`."""
        ...


def open_sources(
    setting: RewardSource,
    *,
    registry: Registry,
    versions: Sequence[Version],
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int,
) -> list[Source]:
    """Open a recipe's reward: import its function, load its models; everything that can fail early fails here.

    A source for each of `models:`, one for any other reward. versions: the resolved registry versions of a `model:` or
    `models:` reward that does not share the policy's base (one that does is scored on the policy's own base, by the
    roles). folder: the recipe's, where a relative `classifier:` starts. device, dtype, max_tokens: of a model's forward
    passes. Raises UserError.
    """
    if setting.function is not None:
        from reward.callables import FunctionSource

        return [FunctionSource(setting)]
    if setting.url is not None:
        from reward.endpoint import EndpointSource

        return [EndpointSource(setting)]
    from reward.classifier import ClassifierSource, load_classifier, load_registered

    if setting.classifier is not None:
        loaded = load_classifier(setting.classifier, folder, dtype)
        return [ClassifierSource(setting, setting.classifier, loaded, device, max_tokens)]
    assert len(versions) == len(setting.references), "a model: reward comes with its resolved versions"
    return [
        ClassifierSource(setting, version.ref, load_registered(registry, version, dtype), device, max_tokens)
        for version in versions
    ]


def checked(source: Source, samples: Sequence[Sample]) -> list[float]:
    """One finite number a sample, in order.

    Raises RewardError that names the source and the row where the source raises, returns another number of rewards,
    or a reward that is not finite.
    """
    return _checked(source.label, samples, lambda: [source.score(samples)])[0]


def checked_members(source: Source, samples: Sequence[Sample]) -> list[list[float]]:
    """`checked` rewards by each member of an ensemble: one list where the source is none."""
    from reward.classifier import ClassifierSource

    if not isinstance(source, ClassifierSource):
        return [checked(source, samples)]
    return _checked(source.label, samples, lambda: source.score_members(samples))


def _checked(label: str, samples: Sequence[Sample], score: Callable[[], Sequence[list[float]]]) -> list[list[float]]:
    if not samples:
        return [[]]
    try:
        members = list(score())
    except RewardError:
        raise
    except Exception as error:  # a source may be anything, and its failure must name the row
        raise failure(label, f"it raised {type(error).__name__}: {error}", samples) from error
    for rewards in members:
        if len(rewards) != len(samples):
            counts = f"{len(rewards)} rewards for {len(samples)} rows"
            raise failure(label, f"it gave {counts}: {shown(rewards)}", samples)
        for reward, sample in zip(rewards, samples, strict=True):
            if not math.isfinite(reward):
                raise failure(label, f"it gave {reward}, which is not a finite number", [sample])
    return members
