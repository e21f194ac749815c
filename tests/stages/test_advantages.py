"""Rewards, advantages and whitening against numbers worked by hand."""

import math

import torch

from stages.advantages import gae, moments, token_rewards, whiten

IS_RESPONSE = torch.tensor([[True, True, True], [True, False, False]])


def test_the_score_lands_on_the_last_response_token() -> None:
    kl = torch.tensor([[0.1, -0.2, 0.3], [0.5, 9.0, 9.0]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), kl, IS_RESPONSE, 0.5)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1, 1.85], [-1.25, 0.0, 0.0]]))


def test_gae_of_a_full_and_of_a_short_row() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 99.0]])
    values = torch.tensor([[0.5, 1.0, 2.0], [0.5, 1.0, 77.0]])
    is_response = torch.tensor([[True, True, True], [True, True, False]])
    # row 0, backwards: 3 - 2 = 1; 2 + 0.5 x 2 - 1 = 2, + 0.25 x 1; 1 + 0.5 x 1 - 0.5 = 1, + 0.25 x 2.25
    # row 1: what lies behind its end counts for nothing: 2 - 1 = 1; 1 + 0.5 x 1 - 0.5 = 1, + 0.25 x 1
    expected = torch.tensor([[1.5625, 2.25, 1.0], [1.25, 1.0, 0.0]])
    torch.testing.assert_close(gae(rewards, values, is_response, gamma=0.5, lam=0.5), expected)


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
