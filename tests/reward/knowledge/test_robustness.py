"""Robustness against a reward that can be worked out by hand: the number of characters."""

import pytest
import torch

from reward.knowledge.robustness import robustness


def by_length(sequences):
    return torch.tensor([[float(len(ids)) for ids in sequences]] * 2)


def render(messages):
    return [ord(letter) for message in messages for letter in message["content"]]


def pairs(make_pair, *texts):
    def said(text):
        return [{"role": "assistant", "content": text}]

    return [make_pair(1, 1, chosen=said(chosen), rejected=said(rejected)) for chosen, rejected in texts]


def test_changes_and_flips(make_pair) -> None:
    # "Q" and the replies: scores 1 + 6 and 1 + 4; 1 + 9 and 1 + 2; the second pair's order is wrong: 1 + 1 and 1 + 3
    given = pairs(make_pair, ("a b c.", "d e."), ("long word", "g."), ("x", "y z"))
    changes = {"twice": lambda text: text * 2, "spaces": lambda text: text.replace(" ", "   ")}
    twice, spaces = robustness(by_length, render, given, deviation=2.0, perturbations=changes)
    # each reply gains its own length, in deviations of 2
    assert twice.changes == [3.0, 4.5, 0.5, 2.0, 1.0, 1.5]
    assert (twice.mean_change, twice.risen) == (pytest.approx(12.5 / 6), 1.0)
    # rightly ordered: the first two; doubled, 4 becomes 8 > 6, 2 becomes 4 < 9
    assert (twice.num_ordered, twice.num_flipped, twice.flipped) == (2, 1, 0.5)
    assert twice.metrics() == {
        "perturbed/twice": twice.mean_change,
        "perturbed/twice/risen": 1.0,
        "perturbed/twice/flipped": 0.5,
    }
    # "g." and "x" have no spaces and are left out; "d e." becomes as long as its rival
    assert spaces.changes == [2.0, 1.0, 1.0, 1.0] and spaces.num_left_out == 2
    assert (spaces.num_ordered, spaces.num_flipped) == (1, 1)
    # squares around 1.25: 0.5625 + 3 · 0.0625 = 0.75; / 3 / 4
    assert spaces.error == pytest.approx(0.25)


def test_too_long_and_unchanged_are_left_out(make_pair) -> None:
    given = pairs(make_pair, ("abcdef", "ab"))
    changes = {"twice": lambda text: text * 2, "same": lambda text: text}
    (twice,) = robustness(by_length, render, given, deviation=0.0, max_tokens=7, perturbations=changes)
    assert (twice.changes, twice.num_left_out) == ([2.0], 1)
    assert robustness(by_length, render, [], deviation=1.0) == []
