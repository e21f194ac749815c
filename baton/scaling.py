"""Scaling laws: loss against training compute, fitted on small runs, and what it says of a run not made yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

# The exponent of compute where tokens grow with parameters: half of that of parameters, 0.35, and of tokens, 0.37
# (Besiroglu et al. 2024, who fitted Hoffmann et al. 2022 again). Three or four points over a factor of a hundred in
# compute cannot tell a floor from a small exponent by themselves; this says which of the two is likely.
USUAL_EXPONENT = 0.18
EXPONENT_SPREAD = 0.35  # one standard deviation of its natural logarithm
NOISE = 0.005  # relative, one standard deviation: another seed, and a learning rate that fits a size less well
HIGHEST_FLOOR = 0.95  # of the lowest loss seen
LEAST_POINTS = 3


class Point(NamedTuple):
    """One trained model."""

    flops: float  # of its whole training
    loss: float  # held out, nats a token


@dataclass(frozen=True)
class Law:
    """L(C) = floor + scale * (C / reference)^-exponent (Kaplan et al. 2020; Hoffmann et al. 2022), C in FLOPs."""

    floor: float  # nats a token
    scale: float  # nats a token, at the reference
    exponent: float
    reference: float  # FLOPs

    def loss(self, flops: float) -> float:
        """Nats a token after training with so many FLOPs."""
        return float(self.floor + self.scale * (flops / self.reference) ** -self.exponent)


@dataclass(frozen=True)
class Prediction:
    """What the law says of a run with `flops`; the interval holds 95% of what the points and the noise leave open."""

    law: Law
    flops: float
    loss: float
    low: float
    high: float
    misfit: float  # how far the points are from the law, relative; well above NOISE they follow no law at all
    left_out: tuple[float, ...]  # the same prediction without one of the points, for each; empty with three points


def training_flops_per_token(matrix_parameters: int, layers: int, width: int, mean_context: float) -> float:
    """Floating-point operations of one token's forward and backward pass (Kaplan et al. 2020, table 1, times three).

    6 for each parameter that multiplies (the output head among them, the table of embeddings not), and the
    attention's scores and sums over the `mean_context` positions that a token attends to.
    """
    return 6.0 * matrix_parameters + 12.0 * layers * width * mean_context


def matrix_parameters(
    width: int, layers: int, heads: int, kv_heads: int, intermediate_size: int, vocabulary: int
) -> int:
    """Parameters of a Llama that multiply a token's vector: projections and output head, not the embedding table."""
    attention = 2 * width * width + 2 * width * (width // heads) * kv_heads
    return layers * (attention + 3 * width * intermediate_size) + vocabulary * width


def learning_rate(flops: float) -> float:
    """Adam's best peak learning rate for a training of so much compute (DeepSeek-AI 2024, equation 1)."""
    return float(0.3118 * flops**-0.1250)


def tokens_per_batch(flops: float) -> float:
    """The best batch for a training of so much compute, in tokens (DeepSeek-AI 2024, equation 1)."""
    return float(0.2920 * flops**0.3271)


def fit(points: Sequence[Point]) -> Law:
    """The likeliest law: least squares of the relative errors, and the usual exponent as one more observation.

    For an exponent and a floor the best scale is a closed form, so that only those two are searched, on a grid that is
    made finer four times. Raises ValueError for fewer than three different compute budgets.
    """
    import numpy as np

    _check(points)
    low_alpha, high_alpha, low_floor, high_floor = math.log(0.01), math.log(2.0), 0.0, HIGHEST_FLOOR
    for _ in range(5):
        log_alphas = np.linspace(low_alpha, high_alpha, 81)
        floors = np.linspace(low_floor, high_floor, 81)
        grid = _Grid.over(points, log_alphas, floors)
        row, column = np.unravel_index(int(np.argmin(grid.cost)), grid.cost.shape)
        d_alpha, d_floor = 3 * (log_alphas[1] - log_alphas[0]), 3 * (floors[1] - floors[0])
        low_alpha, high_alpha = log_alphas[row] - d_alpha, log_alphas[row] + d_alpha
        low_floor = max(0.0, floors[column] - d_floor)
        high_floor = min(HIGHEST_FLOOR, floors[column] + d_floor)
    lowest = min(point.loss for point in points)
    return Law(
        float(floors[column]) * lowest, float(grid.scale[row, column]), math.exp(log_alphas[row]), _reference(points)
    )


def predict(points: Sequence[Point], flops: float) -> Prediction:
    """The loss after `flops` by the law of `points`, its 95% interval, and how much it hangs on any one of them."""
    law = fit(points)
    errors = [law.loss(point.flops) / point.loss - 1 for point in points]
    # two of the law's three figures are the points' own; of exponent and floor together the usual exponent is one
    misfit = math.sqrt(sum(error**2 for error in errors) / (len(points) - 2))
    low, high = _interval(points, flops, max(NOISE, misfit))
    others = [[*points[:at], *points[at + 1 :]] for at in range(len(points))] if len(points) > LEAST_POINTS else []
    return Prediction(law, flops, law.loss(flops), low, high, misfit, tuple(fit(rest).loss(flops) for rest in others))


def backtest(points: Sequence[Point]) -> dict[int, float]:
    """Index -> what the points with less compute would have predicted for it, wherever there are three of them."""
    found = {}
    for at, point in enumerate(points):
        smaller = [other for other in points if other.flops < point.flops]
        if len({other.flops for other in smaller}) >= LEAST_POINTS:
            found[at] = fit(smaller).loss(point.flops)
    return found


@dataclass(frozen=True)
class _Grid:
    """Laws by exponent (rows) and floor (columns): the best scale of each, its precision, and the cost."""

    log_alphas: np.ndarray[Any, Any]
    floors: np.ndarray[Any, Any]  # nats
    scale: np.ndarray[Any, Any]
    scale_precision: np.ndarray[Any, Any]  # 1 / variance of the scale, given exponent and floor
    cost: np.ndarray[Any, Any]  # minus the logarithm of the posterior's density

    @classmethod
    def over(
        cls,
        points: Sequence[Point],
        log_alphas: np.ndarray[Any, Any],
        floor_shares: np.ndarray[Any, Any],
        noise: float = NOISE,
    ) -> _Grid:
        import numpy as np

        losses = np.array([point.loss for point in points])
        units = losses * noise  # nats of one standard deviation
        floors = floor_shares * losses.min()
        relative = np.array([point.flops for point in points]) / _reference(points)
        shape = relative[None, None, :] ** -np.exp(log_alphas)[:, None, None] / units  # (exponents, 1, points)
        wanted = (losses - floors[:, None])[None] / units  # (1, floors, points)
        squares = (shape**2).sum(-1)
        scale = np.maximum((shape * wanted).sum(-1) / squares, 1e-9)
        errors = scale[..., None] * shape - wanted
        prior = (log_alphas - math.log(USUAL_EXPONENT)) / EXPONENT_SPREAD
        cost = 0.5 * (errors**2).sum(-1) + 0.5 * prior[:, None] ** 2
        return cls(log_alphas, floors, scale, squares, cost)


def _interval(points: Sequence[Point], flops: float, noise: float) -> tuple[float, float]:
    """The middle 95% of the predictive distribution: every exponent and floor by its posterior weight, scale and noise.

    The prior of the floor is flat from nothing to almost the lowest loss seen.
    """
    import numpy as np

    log_alphas, floors = np.linspace(math.log(0.02), math.log(1.5), 121), np.linspace(0.0, HIGHEST_FLOOR, 96)
    grid = _Grid.over(points, log_alphas, floors, noise)
    weights = np.exp(grid.cost.min() - grid.cost)
    kept = weights > 1e-4
    ratio = (flops / _reference(points)) ** -np.exp(grid.log_alphas)[:, None]
    means = (grid.floors[None] + grid.scale * ratio)[kept]
    variances = (ratio**2 / grid.scale_precision + 0 * grid.floors)[kept] + (noise * means) ** 2
    normal = NormalDist()
    steps = [normal.inv_cdf((number + 0.5) / 41) for number in range(41)]  # a normal distribution in 41 equal parts
    losses = (means[:, None] + np.sqrt(variances)[:, None] * np.array(steps)).ravel()
    order = np.argsort(losses)
    below = np.cumsum(np.repeat(weights[kept], len(steps))[order])
    low, high = losses[order[np.searchsorted(below / below[-1], [0.025, 0.975])]]
    return float(low), float(high)


def _reference(points: Sequence[Point]) -> float:
    """The geometric mean of the points' compute, about which exponent and scale are all but independent."""
    return math.exp(sum(math.log(point.flops) for point in points) / len(points))


def _check(points: Sequence[Point]) -> None:
    if len({point.flops for point in points}) < LEAST_POINTS:
        raise ValueError(f"a law needs {LEAST_POINTS} different compute budgets; there are {len(points)} points")
    if not all(point.flops > 0 and point.loss > 0 and math.isfinite(point.loss) for point in points):
        raise ValueError(f"compute and losses must be positive: {list(points)}")
