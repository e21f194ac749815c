"""Scores, rewards, advantages and whitening against numbers worked by hand."""

import math
from typing import Any

import pytest
import torch

from baton.ppo_sections import Algorithm
from stages.advantages import (
    RunningScale,
    explained_variance,
    gae,
    moments,
    shape_scores,
    token_rewards,
    whiten,
)

IS_RESPONSE = torch.tensor([[True, True, True], [True, False, False]])
# four rewards, of which the third reply was cut off at its tenth and last token
REWARDS = torch.tensor([2.0, -4.0, 3.0, 0.5])
ENDED = torch.tensor([True, True, False, True])
LENGTHS = torch.tensor([3, 8, 10, 10])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [2.0, -4.0, 2.0, 0.5]),
        ({"missing_eos_penalty": 0.0}, [2.0, -4.0, 3.0, 0.5]),
        ({"missing_eos_penalty": 2.5}, [2.0, -4.0, 0.5, 0.5]),
        ({"missing_eos": "replace", "missing_eos_penalty": 7.0}, [2.0, -4.0, -7.0, 0.5]),
        ({"missing_eos": "replace", "missing_eos_penalty": -7.0}, [2.0, -4.0, 7.0, 0.5]),
        ({"normalise_reward": True}, [4.0, -8.0, 5.0, 1.0]),  # the deviation is 0.5
        ({"clip_reward": 1.5}, [1.5, -1.5, 0.5, 0.5]),
        ({"normalise_reward": True, "clip_reward": 5.0}, [4.0, -5.0, 4.0, 1.0]),
        # the last four tokens before ten: 0, (8 - 6) / 4, 1 and 1 of the penalty
        ({"overlong_tokens": 4}, [2.0, -4.5, 1.0, -0.5]),
        ({"overlong_tokens": 4, "overlong_penalty": 2.0}, [2.0, -5.0, 0.0, -1.5]),
        ({"overlong_tokens": 1}, [2.0, -4.0, 1.0, -0.5]),
        ({"overlong_tokens": 4, "missing_eos": "replace"}, [2.0, -4.5, -1.0, -0.5]),
        # all at once: x 2, within 3, less 3 x the share of four tokens, less 1
        (
            {"normalise_reward": True, "clip_reward": 3.0, "overlong_tokens": 4, "overlong_penalty": 3.0},
            [3.0, -4.5, -1.0, -2.0],
        ),
    ],
)
def test_shape_scores(settings: dict[str, Any], expected: list[float]) -> None:
    found = shape_scores(REWARDS, ENDED, LENGTHS, 10, 0.5, Algorithm(**settings))
    assert found.tolist() == expected
    wide = shape_scores(REWARDS.double(), ENDED, LENGTHS, 10, 0.5, Algorithm(**settings))
    assert wide.dtype is torch.float64


def test_the_score_lands_on_the_last_response_token() -> None:
    kl = torch.tensor([[0.1, -0.2, 0.3], [0.5, 9.0, 9.0]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), kl, IS_RESPONSE, IS_RESPONSE, 0.5)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1, 1.85], [-1.25, 0.0, 0.0]]))


def test_the_score_lands_after_the_end_where_there_is_a_state() -> None:
    """The first reply ended, the second was cut off: its score stays on its last token."""
    kl = torch.tensor([[0.1, -0.2, 0.3], [0.5, 9.0, 9.0]])
    is_state = torch.tensor([[True, True, True, True], [True, False, False, False]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), kl, IS_RESPONSE, is_state, 0.5)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1, -0.15, 2.0], [-1.25, 0.0, 0.0, 0.0]]))


def test_gae_of_a_full_and_of_a_short_row() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 99.0]])
    values = torch.tensor([[0.5, 1.0, 2.0], [0.5, 1.0, 77.0]])
    is_response = torch.tensor([[True, True, True], [True, True, False]])
    # row 0, backwards: 3 - 2 = 1; 2 + 0.5 x 2 - 1 = 2, + 0.25 x 1; 1 + 0.5 x 1 - 0.5 = 1, + 0.25 x 2.25
    # row 1: what lies behind its end counts for nothing: 2 - 1 = 1; 1 + 0.5 x 1 - 0.5 = 1, + 0.25 x 1
    expected = torch.tensor([[1.5625, 2.25, 1.0], [1.25, 1.0, 0.0]])
    torch.testing.assert_close(gae(rewards, values, is_response, gamma=0.5, lam=0.5), expected)


def test_gae_with_a_state_after_the_end() -> None:
    """The score is given one state later than the last token, whose value then is a bootstrap of its own."""
    rewards = torch.tensor([[0.0, 0.0, 4.0], [0.0, 4.0, 0.0]])
    values = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 88.0]])
    is_state = torch.tensor([[True, True, True], [True, True, False]])
    # row 0: 4 - 3 = 1; 0 + 0.5 x 3 - 2 = -0.5, + 0.25 x 1; 0 + 0.5 x 2 - 1 = 0, + 0.25 x -0.25
    # row 1: 4 - 2 = 2; 0.5 x 2 - 1 = 0, + 0.25 x 2
    expected = torch.tensor([[-0.0625, -0.25, 1.0], [0.5, 2.0, 0.0]])
    torch.testing.assert_close(gae(rewards, values, is_state, gamma=0.5, lam=0.5), expected)


def test_gae_without_discount_is_return_minus_value() -> None:
    rewards, values = torch.randn(2, 3), torch.randn(2, 3)
    is_response = torch.ones(2, 3, dtype=torch.bool)
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(gae(rewards, values, is_response, gamma=1.0, lam=1.0), to_go - values)


def test_moments_count_response_tokens_alone() -> None:
    found = moments(torch.tensor([[1.0, 3.0, 5.0], [7.0, 100.0, 100.0]]), IS_RESPONSE)
    assert found.tolist() == [4.0, 16.0, 84.0]
    assert found.dtype is torch.float64


def test_whitening_by_the_moments_of_all_ranks() -> None:
    ours, theirs = torch.tensor([[1.0, 3.0]]), torch.tensor([[5.0, 7.0]])
    everything = torch.ones(1, 2, dtype=torch.bool)
    total = moments(ours, everything) + moments(theirs, everything)
    # 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    deviation = math.sqrt(5)
    torch.testing.assert_close(whiten(ours, total), torch.tensor([[-3 / deviation, -1 / deviation]]))
    torch.testing.assert_close(whiten(theirs, total), torch.tensor([[1 / deviation, 3 / deviation]]))


def test_whitening_of_equal_advantages_is_finite() -> None:
    same = torch.full((1, 4), 2.5)
    total = moments(same, torch.ones(1, 4, dtype=torch.bool))
    assert whiten(same, total).tolist() == [[0.0, 0.0, 0.0, 0.0]]


def test_explained_variance() -> None:
    every = torch.ones(1, 4, dtype=torch.bool)
    returns = torch.tensor([[1.0, 3.0, 5.0, 7.0]])  # variance 5

    def share(values: list[float]) -> float:
        return explained_variance(moments(returns - torch.tensor([values]), every), moments(returns, every))

    assert share([1.0, 3.0, 5.0, 7.0]) == pytest.approx(1.0)
    assert share([0.0, 0.0, 0.0, 0.0]) == pytest.approx(0.0)
    assert share([9.0, 9.0, 9.0, 9.0]) == pytest.approx(0.0), "a constant explains nothing"
    assert share([0.0, 4.0, 4.0, 8.0]) == pytest.approx(1 - 1 / 5)  # residuals 1, -1, 1, -1
    assert share([7.0, 5.0, 3.0, 1.0]) == pytest.approx(1 - 20 / 5)  # residuals -6, -2, 2, 6
    same = moments(torch.full((1, 4), 3.0), every)
    assert explained_variance(same, same) == 0.0


def test_the_running_deviation() -> None:
    scale = RunningScale()
    scale.add([2.0, 4.0, 10.0])  # 1 and 3
    assert scale.deviation == pytest.approx(1.0)
    scale.add([2.0, 12.0, 74.0])  # 5 and 7
    assert scale.deviation == pytest.approx(math.sqrt(5))
    same = RunningScale()
    same.add([3.0, 6.0, 12.0])
    assert same.deviation > 0
