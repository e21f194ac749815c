"""How often a reward prefers the chosen reply, with the interval that so many pairs allow, whole and by group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reward.pairs import Pair

Z_95 = 1.959963984540054
"""The normal quantile of a two-sided 95% interval."""
MOST_GROUPS = 5
"""A numeric property with more values than this is cut into quarters."""


@dataclass(frozen=True)
class Share:
    """A share of `count` trials and its 95% interval."""

    rate: float
    low: float
    high: float
    count: int


def points(margin: torch.Tensor) -> torch.Tensor:
    """margin (N,), chosen minus rejected -> 1 where chosen is preferred, 0 where not, 0.5 where both are equal."""
    return (margin > 0).double() + 0.5 * (margin == 0).double()


def wilson(rate: float, count: int) -> tuple[float, float]:
    """Wilson's score interval (95%) of a share `rate` seen in `count` > 0 trials. Wilson 1927.

    Half points vary less than whole ones, so with equal scores it is a little too wide, never too narrow.
    """
    assert count > 0 and 0 <= rate <= 1, (rate, count)
    spread = Z_95 * math.sqrt(rate * (1 - rate) / count + Z_95**2 / (4 * count**2))
    middle, scale = rate + Z_95**2 / (2 * count), 1 + Z_95**2 / count
    return max((middle - spread) / scale, 0.0), min((middle + spread) / scale, 1.0)


def share(given: torch.Tensor) -> Share:
    """The share of points `given` (N,), each in [0, 1], N > 0."""
    rate = min(max(float(given.double().mean()), 0.0), 1.0)
    return Share(rate, *wilson(rate, len(given)), len(given))


def by_group(given: torch.Tensor, groups: Sequence[str]) -> dict[str, Share]:
    """The share of points (N,) in each of `groups` (N labels), in the order in which the groups first occur."""
    assert len(given) == len(groups), (len(given), len(groups))
    members: dict[str, list[int]] = {}
    for at, group in enumerate(groups):
        members.setdefault(group, []).append(at)
    return {group: share(given[torch.tensor(rows)]) for group, rows in members.items()}


def turn_groups(pairs: Sequence[Pair]) -> list[str]:
    """Of each pair, its number of user turns; five and more are one group."""
    return [str(pair.turns) if pair.turns < 5 else "5+" for pair in pairs]


def number_groups(values: Sequence[float]) -> list[str]:
    """Of each value, itself, or the quarter it falls in where there are more than MOST_GROUPS different ones."""
    distinct = sorted(set(values))
    if len(distinct) <= MOST_GROUPS:
        return [f"{value:g}" for value in values]
    cuts = torch.tensor(sorted(values), dtype=torch.double).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    edges = sorted(set(cuts))
    names = [f"up to {edges[0]:.3g}"]
    names += [f"{low:.3g} to {high:.3g}" for low, high in zip(edges, edges[1:], strict=False)]
    names += [f"over {edges[-1]:.3g}"]
    return [names[sum(value > edge for edge in edges)] for value in values]
