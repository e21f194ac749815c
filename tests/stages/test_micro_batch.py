"""Groups under a token budget, and micro-batches with exact masks: all worked by hand."""

import pytest
import torch

from baton.decode import Reply
from stages.micro_batch import MicroBatch, group_by_length, make_micro_batch, make_text_batch
from stages.rollout import Episode

EPISODES = [
    Episode(0, [5, 6, 7], Reply([8, 1], True)),
    Episode(1, [1], Reply([2, 9, 9, 9], False)),  # begins with the stop token, whose reply begins with the pad token
    Episode(2, [4, 4], Reply([1], True)),
]


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([3, 9, 5, 5], 10, [[1], [2, 3], [0]]),  # longest first; 9 + 5 is too much, 5 + 5 is not
        ([3, 9, 5, 5], 13, [[1], [2, 3, 0]]),
        ([3, 9, 5, 5], 22, [[1, 2, 3, 0]]),
        ([3, 9, 5, 5], 1, [[1], [2], [3], [0]]),  # each is too long, and makes a group of its own
        ([4], 4, [[0]]),
        ([], 4, []),
    ],
)
def test_groups_hold_at_most_the_budget(lengths: list[int], budget: int, expected: list[list[int]]) -> None:
    assert group_by_length(lengths, budget) == expected


def test_groups_of_many_rows() -> None:
    lengths = [int(n) for n in torch.randint(1, 60, (200,), generator=torch.Generator().manual_seed(0))]
    groups = group_by_length(lengths, 100)
    assert sorted(at for group in groups for at in group) == list(range(200))
    assert all(sum(lengths[at] for at in group) <= 100 for group in groups)
    order = [lengths[at] for group in groups for at in group]
    assert order == sorted(order, reverse=True)
    assert len(groups) <= 1.35 * sum(lengths) / 100, "little room is wasted"


def test_at_least_so_many_groups() -> None:
    lengths = [5, 4, 3, 2, 1]
    assert group_by_length(lengths, 100, 1) == [[0, 1, 2, 3, 4]]
    assert group_by_length(lengths, 100, 2) == [[0, 1, 2], [3, 4]]
    assert group_by_length(lengths, 100, 3) == [[0, 1], [2], [3, 4]]
    assert group_by_length(lengths, 100, 5) == [[0], [1], [2], [3], [4]]
    assert group_by_length(lengths, 100, 9) == [[0], [1], [2], [3], [4]], "no more than rows"


def tables(batch: MicroBatch) -> dict[str, list]:
    return {name: item.tolist() for name, item in vars(batch).items() if isinstance(item, torch.Tensor)}


def test_a_micro_batch() -> None:
    batch = make_micro_batch(EPISODES, [2, 0, 1], 2)
    assert batch.members == [2, 0, 1]
    assert tables(batch) == {
        "input_ids": [[4, 4, 1, 2, 2], [5, 6, 7, 8, 1], [1, 2, 9, 9, 9]],
        "response_ids": [[1, 0, 0, 0], [8, 1, 0, 0], [2, 9, 9, 9]],
        "before_response": [[1, 0, 0, 0], [2, 3, 0, 0], [0, 1, 2, 3]],
        "is_response": [[True, False, False, False], [True, True, False, False], [True] * 4],
        "state_at": [[1, 0, 0, 0], [2, 3, 0, 0], [0, 1, 2, 3]],
        "is_state": [[True, False, False, False], [True, True, False, False], [True] * 4],
        "last": [2, 4, 4],
        "ended": [True, True, False],
    }


def test_with_the_state_after_the_end() -> None:
    """Only where a reply ended: after one that was cut off there is nothing to value."""
    plain = make_micro_batch(EPISODES, [2, 0, 1], 2)
    batch = make_micro_batch(EPISODES, [2, 0, 1], 2, score_after_eos=True)
    found = tables(batch)
    assert found.pop("state_at") == [[1, 2, 0, 0, 0], [2, 3, 4, 0, 0], [0, 1, 2, 3, 0]]
    assert found.pop("is_state") == [[True] * 2 + [False] * 3, [True] * 3 + [False] * 2, [True] * 4 + [False]]
    assert found == {name: table for name, table in tables(plain).items() if name in found}


def test_no_padding_beyond_the_longest_of_the_group() -> None:
    assert make_micro_batch(EPISODES, [2], 0).input_ids.tolist() == [[4, 4, 1]]


@pytest.mark.parametrize("after", [False, True])
def test_a_blank_micro_batch_is_the_shortest_row_without_anything_in_the_loss(after: bool) -> None:
    blank = make_micro_batch(EPISODES, [0, 2, 1], 2, score_after_eos=after).blank()
    assert blank.members == []
    assert tables(blank) == {
        "input_ids": [[4, 4, 1]],
        "response_ids": [[0]],
        "before_response": [[0]],
        "is_response": [[False]],
        "state_at": [[0]],
        "is_state": [[False]],
        "last": [2],
        "ended": [True],
    }
    assert tables(blank.blank()) == tables(blank)


def test_a_blank_micro_batch_has_gradients_that_are_zero(roles: object, episodes: list[Episode]) -> None:
    """Ranks run it for the collectives of its forward and backward pass."""
    blank = make_micro_batch(episodes, [0, 1], 2).blank()
    forward = roles(blank)  # type: ignore[operator]
    assert not forward.logprobs.any() and not forward.values.any()
    (forward.logprobs.sum() + forward.values.sum()).backward()
    for parameter in roles.trained_parameters().values():  # type: ignore[attr-defined]
        assert parameter.grad is None or not parameter.grad.any()


def test_text() -> None:
    """The first token is never in the loss: nothing predicts it."""
    rows = [([5, 6, 7, 8], [True, True, False, True]), ([9, 3], [False, True])]
    batch = make_text_batch(rows, [1, 0], 2)
    assert batch.members == [1, 0]
    found = tables(batch)
    assert found["input_ids"] == [[9, 3, 2, 2], [5, 6, 7, 8]]
    assert found["response_ids"] == [[3, 0], [6, 8]]
    assert found["before_response"] == [[0, 0], [0, 2]]
    assert found["is_response"] == [[True, False], [True, True]]
    assert found["last"] == [1, 3]
    assert not batch.is_state.any()
    assert tables(batch.blank())["input_ids"] == [[9, 3]]


def test_on_a_device_it_is_the_same() -> None:
    batch = make_micro_batch(EPISODES, [0, 1], 2)
    moved = batch.to(torch.device("meta"))
    assert all(item.device.type == "meta" for item in vars(moved).values() if isinstance(item, torch.Tensor))
    assert moved.members == batch.members and batch.input_ids.device.type == "cpu"
