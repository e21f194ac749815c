"""Where rewards come from: a recipe's reward opened as a source of checked numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from baton.ppo_sections import RewardSource
from baton.registry import Registry, Version
from reward.sample import RewardError, Sample, failure, shown

if TYPE_CHECKING:
    import torch

__all__ = ["RewardError", "Sample", "Source", "checked", "open_source"]


class Source(Protocol):
    """Gives one reward a reply; `label` names it in metrics and errors, `weight` is its share of the sum."""

    label: str
    weight: float

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Rewards in the samples' order, before the weight. May raise anything: call it by `checked`."""
        ...


def open_source(
    setting: RewardSource,
    *,
    registry: Registry,
    version: Version | None,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int,
) -> Source:
    """Open a recipe's reward: import its function, load its model; everything that can fail early fails here.

    version: the resolved registry version of a `model:` reward that does not share the policy's base (one that does
    is scored on the policy's own base, by the roles). folder: the recipe's, where a relative `classifier:` starts.
    device, dtype, max_tokens: of a model's forward passes. Raises UserError.
    """
    if setting.function is not None:
        from reward.callables import FunctionSource

        return FunctionSource(setting)
    if setting.url is not None:
        from reward.endpoint import EndpointSource

        return EndpointSource(setting)
    from reward.classifier import ClassifierSource, load_classifier, load_registered

    if setting.model is not None:
        assert version is not None, "a model: reward comes with its resolved version"
        name, loaded = version.ref, load_registered(registry, version, dtype)
    else:
        assert setting.classifier is not None
        name, loaded = setting.classifier, load_classifier(setting.classifier, folder, dtype)
    return ClassifierSource(setting, name, loaded, device, max_tokens)


def checked(source: Source, samples: Sequence[Sample]) -> list[float]:
    """One finite number a sample, in order.

    Raises RewardError that names the source and the row where the source raises, returns another number of rewards,
    or a reward that is not finite.
    """
    if not samples:
        return []
    try:
        rewards = source.score(samples)
    except RewardError:
        raise
    except Exception as error:  # a source may be anything, and its failure must name the row
        raise failure(source.label, f"it raised {type(error).__name__}: {error}", samples) from error
    if len(rewards) != len(samples):
        counts = f"{len(rewards)} rewards for {len(samples)} rows"
        raise failure(source.label, f"it gave {counts}: {shown(rewards)}", samples)
    for reward, sample in zip(rewards, samples, strict=True):
        if not math.isfinite(reward):
            raise failure(source.label, f"it gave {reward}, which is not a finite number", [sample])
    return rewards
