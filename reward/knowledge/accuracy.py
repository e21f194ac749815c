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


def wilson(rate: float, count: float) -> tuple[float, float]:
    """Wilson's score interval (95%) of a share `rate` seen in `count` > 0 trials. Wilson 1927.

    Half points vary less than whole ones, so with equal scores it is a little too wide, never too narrow.
    """
    assert count > 0 and 0 <= rate <= 1, (rate, count)
    spread = Z_95 * math.sqrt(rate * (1 - rate) / count + Z_95**2 / (4 * count**2))
    middle, scale = rate + Z_95**2 / (2 * count), 1 + Z_95**2 / count
    return max((middle - spread) / scale, 0.0), min((middle + spread) / scale, 1.0)


def share(given: torch.Tensor, clusters: Sequence[str] | None = None) -> Share:
    """The share of points `given` (N,), each in [0, 1], N > 0.

    clusters: N labels; points of one cluster may go together, as pairs about one prompt do, and the interval then
    counts as many trials as they are worth.
    """
    rate = min(max(float(given.double().mean()), 0.0), 1.0)
    worth = len(given) if clusters is None else effective_count(given, clusters)
    return Share(rate, *wilson(rate, worth), len(given))


def effective_count(given: torch.Tensor, clusters: Sequence[str]) -> float:
    """How many independent points (N,) are worth, N over the design effect. Kish 1965; Korn and Graubard 1998.

    The design effect is the variance of the mean when whole clusters are drawn, over that when points are; never below
    1, for a cluster's points that differ from each other by chance must not narrow the interval.
    """
    assert len(given) == len(clusters) > 0, (len(given), len(clusters))
    labels = {label: at for at, label in enumerate(dict.fromkeys(clusters))}
    off = given.double() - given.double().mean()
    sums = torch.zeros(len(labels), dtype=torch.double)
    sums.index_add_(0, torch.tensor([labels[label] for label in clusters]), off)
    alone = float(off.square().sum())
    return len(given) / max(float(sums.square().sum()) / alone, 1.0) if alone else float(len(given))


def by_group(given: torch.Tensor, groups: Sequence[str], clusters: Sequence[str]) -> dict[str, Share]:
    """The share of points (N,) in each of `groups` (N labels), in the order in which the groups first occur.

    clusters: N labels, as `share` has them.
    """
    assert len(given) == len(groups) == len(clusters), (len(given), len(groups), len(clusters))
    members: dict[str, list[int]] = {}
    for at, group in enumerate(groups):
        members.setdefault(group, []).append(at)
    return {
        group: share(given[torch.tensor(rows)], [clusters[row] for row in rows]) for group, rows in members.items()
    }


def prompt_clusters(pairs: Sequence[Pair]) -> list[str]:
    """Of each pair, what its dialogue begins with: pairs of one prompt, or of one dialogue's turns, go together."""
    return [str(next((m["content"] for m in pair.prompt if m["role"] == "user"), "")) for pair in pairs]


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
