"""Accuracy, Wilson's interval and groups, by hand."""

import pytest
import torch

from reward.knowledge.accuracy import (
    by_group,
    effective_count,
    number_groups,
    points,
    prompt_clusters,
    share,
    turn_groups,
    wilson,
)


def test_points() -> None:
    assert points(torch.tensor([0.5, -0.1, 0.0])).tolist() == [1.0, 0.0, 0.5]


def test_wilson_at_the_textbook() -> None:
    # 8 of 10, Agresti and Coull 1998: the interval that solves |p − 0.8| = z sqrt(p (1 − p) / 10)
    low, high = wilson(0.8, 10)
    for end in (low, high):
        assert abs(end - 0.8) == pytest.approx(1.959963984540054 * (end * (1 - end) / 10) ** 0.5, abs=1e-12)
    assert low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.9433, abs=1e-4)


def test_wilson_at_the_ends() -> None:
    # z² / (n + z²) = 3.8415 / 103.8415
    assert wilson(0.0, 100) == (pytest.approx(0.0, abs=1e-12), pytest.approx(0.036994, abs=1e-6))
    assert wilson(1.0, 100) == (pytest.approx(1 - 0.036994, abs=1e-6), pytest.approx(1.0))


def test_wilson_against_published_values() -> None:
    """Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1 / 29, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(1.0, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)


def test_share_counts_half_points() -> None:
    found = share(torch.tensor([1.0, 0.5, 0.0, 1.0]))
    assert (found.rate, found.count) == (0.625, 4)


def test_points_that_go_together_are_worth_fewer_trials(make_pair) -> None:
    # two prompts of three pairs each, all right or all wrong: worth two trials
    given, clusters = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]), ["x"] * 3 + ["y"] * 3
    assert effective_count(given, clusters) == pytest.approx(2.0)
    found = share(given, clusters)
    assert (found.count, found.low, found.high) == (6, *wilson(0.5, 2.0))
    # half of each prompt's right: the mean varies less than six tosses', and the interval stays that of four
    assert effective_count(torch.tensor([1.0, 0.0, 1.0, 0.0]), ["x", "x", "y", "y"]) == 4
    assert effective_count(torch.ones(3), ["x", "x", "x"]) == 3
    # by hand: off = ±1/4, ±3/4; squares of x: (1/4 + 1/4)² = 1/4, of y: (1/4 − 3/4)² = 1/4; alone 12/16
    assert effective_count(torch.tensor([1.0, 1.0, 1.0, 0.0]), ["x", "x", "y", "y"]) == 4
    one_prompt = [make_pair(1, 1, turns=turns) for turns in (1, 2)]
    assert len(set(prompt_clusters(one_prompt))) == 1


def test_by_group_keeps_the_order_in_which_groups_occur() -> None:
    found = by_group(torch.tensor([1.0, 0.0, 1.0, 1.0]), ["b", "a", "b", "a"], ["1", "2", "3", "4"])
    assert [(name, seen.rate, seen.count) for name, seen in found.items()] == [("b", 1.0, 2), ("a", 0.5, 2)]


def test_turns_of_five_and_more_are_one_group(make_pair) -> None:
    assert turn_groups([make_pair(1, 1, turns=turns) for turns in (1, 4, 5, 9)]) == ["1", "4", "5+", "5+"]


def test_few_numbers_stay_and_many_are_quartered() -> None:
    assert number_groups([1.0, 3.0, 1.0]) == ["1", "3", "1"]
    # the quartiles of 0 … 8 are 2, 4 and 6
    found = number_groups([float(value) for value in range(9)])
    assert found == ["up to 2"] * 3 + ["2 to 4"] * 2 + ["4 to 6"] * 2 + ["over 6"] * 2
