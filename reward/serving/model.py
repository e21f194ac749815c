"""The model that is served: a reward version of the registry, which turns samples into ids and ids into scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from baton.errors import UserError
from baton.ppo_sections import RewardSource
from baton.registry import Registry, Version
from reward.sample import RewardError, Sample
from reward.serving.limits import Limits, RefusedError

if TYPE_CHECKING:
    import torch

    from reward.classifier import ClassifierSource


@dataclass(frozen=True)
class Scores:
    """What rows got: one reward a row and, from an ensemble, how far its members are apart on it."""

    rewards: list[float]
    deviations: list[float] | None

    def part(self, start: int, stop: int) -> Scores:
        """The rows `start` to `stop`, without the last."""
        return Scores(self.rewards[start:stop], self.deviations and self.deviations[start:stop])


@dataclass(frozen=True)
class Model:
    """One version in memory. Its methods are called from one thread at a time."""

    version: Version
    source: ClassifierSource
    dtype: str
    device: str
    row_tokens: int  # that are read, of prompt and reply together
    num_members: int = 1

    def encode(self, samples: Sequence[Sample]) -> list[list[int]]:
        """The ids that the classifier reads, a row each. Raises RefusedError 422 at the first row that it does not."""
        sequences = []
        for at, sample in enumerate(samples):
            try:
                ids = self.source.encode(sample)
            except RewardError:  # its text holds the prompt
                what = f"samples.{at}: prompt and response are none, or more than {self.row_tokens} tokens"
                raise RefusedError(422, what) from None
            except Exception as error:  # a template may raise anything at turns that it does not know
                what = f"samples.{at}: the chat template of {self.version.ref} refuses it ({type(error).__name__})"
                raise RefusedError(422, what) from error
            if len(ids) > self.row_tokens:
                what = f"samples.{at}: prompt and response are {len(ids)} tokens; at most {self.row_tokens} are read"
                raise RefusedError(422, what)
            sequences.append(ids)
        return sequences

    def score(self, sequences: Sequence[Sequence[int]]) -> Scores:
        """Rewards in order: of an ensemble the members' mean, and then deviations too."""
        if not sequences:
            return Scores([], None)
        members = self.source.member_scores(sequences)
        deviations = members.std(0, correction=0).tolist() if len(members) > 1 else None
        return Scores(members.mean(0).tolist(), deviations)


def reward_version(registry: Registry, ref: str) -> Version:
    """The version that `ref` means. Raises UserError where it is no reward model."""
    version = registry.resolve(ref)
    if version.kind != "reward":
        raise UserError(
            f"{version.ref} is a {version.kind} version; what is served is a reward model. Train one: accelerate "
            "launch -m reward.train RECIPE"
        )
    return version


def open_model(
    registry: Registry, version: Version, *, dtype: str, device: str, batch_tokens: int, limits: Limits
) -> Model:
    """Load a reward version.

    dtype: a name or `auto`; device: `auto`, `cpu`, `cuda`, `cuda:1`, …; batch_tokens: of a forward pass, padding
    included. Raises UserError where there is no such device.
    """
    from baton.models import compute_dtype
    from reward.classifier import ClassifierSource, load_registered

    place = _device(device)
    number_format = compute_dtype(dtype, place.type)
    loaded = load_registered(registry, version, number_format)
    known = getattr(loaded[0].config.get_text_config(), "max_position_embeddings", None) or limits.row_tokens
    return Model(
        version,
        ClassifierSource(RewardSource(model=version.ref), version.ref, loaded, place, batch_tokens),
        dtype=str(number_format).removeprefix("torch."),
        device=str(place),
        row_tokens=min(known, limits.row_tokens),
        num_members=max(1, len(getattr(loaded[0], "peft_config", {}))),
    )


def _device(setting: str) -> torch.device:
    import torch

    if setting == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(setting)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--device {setting}: this machine has none such ({reason}). Give auto, cpu or cuda") from None
    return device
