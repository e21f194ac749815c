"""Scaling laws: known laws are found again, hand-worked operations, honest intervals."""

import math
import random

import pytest

from baton.scaling import (
    USUAL_EXPONENT,
    Law,
    Point,
    backtest,
    fit,
    learning_rate,
    matrix_parameters,
    predict,
    tokens_per_batch,
    training_flops_per_token,
)

BUDGETS = [1e12, 4e12, 1.6e13, 6.4e13]
NEXT = 2.56e14


def points(law: Law, budgets: list[float] = BUDGETS) -> list[Point]:
    return [Point(flops, law.loss(flops)) for flops in budgets]


def test_law_by_hand() -> None:
    law = Law(floor=1.5, scale=2.0, exponent=0.5, reference=1e12)
    assert law.loss(1e12) == pytest.approx(3.5)
    assert law.loss(4e12) == pytest.approx(2.5)  # 1.5 + 2 / sqrt 4
    assert law.loss(16e12) == pytest.approx(2.0)


def test_operations_of_a_token_by_hand() -> None:
    # two heads of two, one for keys and values; a layer: q and o 16 each, k and v 8 each, three of 4 * 6
    assert matrix_parameters(4, layers=3, heads=2, kv_heads=1, intermediate_size=6, vocabulary=10) == 3 * 120 + 40
    # forward: 2 a parameter; scores and sums 2 * 4 each for each of 8 positions, in 3 layers; backward: twice that
    assert training_flops_per_token(400, layers=3, width=4, mean_context=8) == 3 * (2 * 400 + 3 * 2 * (2 * 4 * 8))


def test_rules_by_hand() -> None:
    # DeepSeek-AI 2024, equation 1, at C = 10^16: 10^-2 and 10^5.2336
    assert learning_rate(1e16) == pytest.approx(0.003118)
    assert tokens_per_batch(1e16) == pytest.approx(0.2920 * 171238, rel=1e-4)


@pytest.mark.parametrize("floor", [0.6, 1.7])
def test_a_law_with_the_usual_exponent_is_found_exactly(floor: float) -> None:
    law = Law(floor, 1.3, USUAL_EXPONENT, 8e12)
    found = fit(points(law))
    assert found.floor == pytest.approx(floor, rel=1e-3)
    assert found.exponent == pytest.approx(USUAL_EXPONENT, rel=1e-3)
    assert found.loss(NEXT) == pytest.approx(law.loss(NEXT), rel=1e-5)


@pytest.mark.parametrize("floor", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("exponent", [0.08, 0.12, 0.3])
def test_other_laws_are_predicted_within_a_hundredth_and_a_half(floor: float, exponent: float) -> None:
    law = Law(floor, 3.0, exponent, 8e12)
    found = predict(points(law), NEXT)
    assert found.loss == pytest.approx(law.loss(NEXT), rel=0.015)
    assert found.low < law.loss(NEXT) < found.high


def test_many_points_overrule_the_usual_exponent() -> None:
    law = Law(2.0, 3.0, 0.45, 1e14)
    found = fit(points(law, [1e11 * 2**step for step in range(20)]))
    assert found.exponent == pytest.approx(0.45, rel=0.02) and found.floor == pytest.approx(2.0, rel=0.02)


def test_the_interval_holds_what_comes_in_most_noisy_ladders() -> None:
    draw, law, inside = random.Random(0), Law(1.4, 2.0, 0.17, 8e12), 0
    for _ in range(20):
        noisy = [point._replace(loss=point.loss * (1 + draw.gauss(0, 0.005))) for point in points(law)]
        found = predict(noisy, NEXT)
        inside += found.low < law.loss(NEXT) * (1 + draw.gauss(0, 0.005)) < found.high
    assert 18 <= inside <= 20


def test_further_away_is_less_sure() -> None:
    known = points(Law(1.4, 2.0, 0.17, 8e12))
    near, far = predict(known, NEXT), predict(known, 100 * NEXT)
    assert near.low < near.loss < near.high
    assert (far.high - far.low) / far.loss > 2 * (near.high - near.low) / near.loss
    assert far.loss < near.loss


def test_points_that_follow_no_law_are_less_sure() -> None:
    # losses that were measured where trainings of a few hundred steps fall faster and faster
    bent = [Point(1.40e11, 4.6122), Point(3.09e11, 4.5623), Point(5.87e11, 4.3152), Point(1.61e12, 4.0122)]
    found, straight = predict(bent, 3.97e12), predict(points(Law(1.4, 2.0, 0.17, 8e12)), NEXT)
    assert straight.misfit < 1e-3
    assert 0.01 < found.misfit < 0.03
    assert (found.high - found.low) / found.loss > 2 * (straight.high - straight.low) / straight.loss


def test_units_do_not_matter() -> None:
    known = points(Law(1.4, 2.0, 0.17, 8e12))
    scaled = [Point(1000 * flops, 3 * loss) for flops, loss in known]
    assert predict(scaled, 1000 * NEXT).loss == pytest.approx(3 * predict(known, NEXT).loss, rel=1e-6)
    assert fit(known[::-1]).loss(NEXT) == pytest.approx(fit(known).loss(NEXT), rel=1e-9)


def test_a_point_left_out() -> None:
    law = Law(1.4, 2.0, USUAL_EXPONENT, 8e12)
    assert predict(points(law)[:3], NEXT).left_out == ()
    left_out = predict(points(law), NEXT).left_out
    assert left_out == pytest.approx([law.loss(NEXT)] * 4, rel=1e-4)


def test_backtest_looks_at_smaller_points_alone() -> None:
    law = Law(1.4, 2.0, USUAL_EXPONENT, 8e12)
    known = points(law)
    assert backtest(known[:3]) == {}
    spoilt = [*known[:3], Point(known[3].flops, 99.0)]
    assert backtest(spoilt) == {3: pytest.approx(known[3].loss, rel=1e-4)}
    assert set(backtest([*known, Point(NEXT, 1.0)])) == {3, 4}


@pytest.mark.parametrize(
    "bad",
    [
        [Point(1e12, 4.0), Point(2e12, 3.0)],
        [Point(1e12, 4.0), Point(1e12, 3.9), Point(2e12, 3.0)],
        [Point(1e12, 4.0), Point(2e12, math.nan), Point(4e12, 3.0)],
    ],
    ids=["two", "two-budgets", "nan"],
)
def test_what_cannot_be_fitted(bad: list[Point]) -> None:
    with pytest.raises(ValueError):
        fit(bad)
