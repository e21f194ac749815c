"""How a reward answers to perturbed replies: does the score rise, does the order of a pair turn over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from baton.data.turns import Messages
from reward.knowledge.perturbations import PERTURBATIONS, Perturbation
from reward.pairs import Pair

Render = Callable[[Messages], Sequence[int]]
"""A dialogue -> the token ids that the reward reads."""


@dataclass(frozen=True)
class Perturbed:
    """What one perturbation does to the scores of replies and to the order of pairs."""

    name: str
    changes: list[float]  # of each reply's score, in deviations of the score; both sides of the pairs
    num_ordered: int  # pairs whose chosen reply had the higher score, and whose rejected reply could be perturbed
    num_flipped: int  # of those, pairs whose rejected reply, perturbed, scores at least as high as the chosen one
    num_left_out: int  # replies that it does not change, or makes too long

    @property
    def mean_change(self) -> float:
        """In deviations of the score."""
        return sum(self.changes) / len(self.changes)

    @property
    def error(self) -> float:
        """The standard error of `mean_change`."""
        squares = sum((change - self.mean_change) ** 2 for change in self.changes)
        return math.sqrt(squares / max(len(self.changes) - 1, 1) / len(self.changes))

    @property
    def risen(self) -> float:
        """Share of replies whose score rises."""
        return sum(change > 0 for change in self.changes) / len(self.changes)

    @property
    def flipped(self) -> float | None:
        """Share of rightly ordered pairs that turn over when the rejected reply alone is perturbed."""
        return self.num_flipped / self.num_ordered if self.num_ordered else None

    def metrics(self) -> dict[str, float]:
        """For the manifest."""
        found = {f"perturbed/{self.name}": self.mean_change, f"perturbed/{self.name}/risen": self.risen}
        return found if self.flipped is None else found | {f"perturbed/{self.name}/flipped": self.flipped}


def robustness(
    score: Callable[[Sequence[Sequence[int]]], torch.Tensor],
    render: Render,
    pairs: Sequence[Pair],
    *,
    deviation: float,
    max_tokens: int | None = None,
    perturbations: Mapping[str, Perturbation] = PERTURBATIONS,
) -> list[Perturbed]:
    """Perturb the last reply of both sides of all `pairs`, by each perturbation that can change any of them.

    score: sequences -> (K, N). deviation: of the score, the unit of the changes; where it is 0, changes stay in score
    units. max_tokens: longer sequences are left out. Replies that a perturbation leaves as they are do not count.
    """
    sides = [[*pair.prompt, *pair.chosen] for pair in pairs] + [[*pair.prompt, *pair.rejected] for pair in pairs]
    if not sides:
        return []
    unit = deviation or 1.0
    before = score([list(render(side)) for side in sides]).mean(0).double()
    found = []
    for name, perturb in perturbations.items():
        at, sequences = [], []
        for row, side in enumerate(sides):
            text = str(side[-1]["content"])
            if (changed := perturb(text)) == text:
                continue
            ids = list(render([*side[:-1], side[-1] | {"content": changed}]))
            if max_tokens is None or len(ids) <= max_tokens:
                at.append(row)
                sequences.append(ids)
        if not at:
            continue
        after = score(sequences).mean(0).double()
        changes = ((after - before[torch.tensor(at)]) / unit).tolist()
        is_ordered, is_flipped = _order(before, dict(zip(at, after.tolist(), strict=True)), len(pairs))
        found.append(Perturbed(name, changes, is_ordered, is_flipped, len(sides) - len(at)))
    return found


def _order(before: torch.Tensor, after: Mapping[int, float], num_pairs: int) -> tuple[int, int]:
    """(pairs in the right order with a perturbed rejected reply, those of them that turn over)."""
    ordered = [row for row in range(num_pairs) if before[row] > before[num_pairs + row] and num_pairs + row in after]
    return len(ordered), sum(after[num_pairs + row] >= float(before[row]) for row in ordered)
