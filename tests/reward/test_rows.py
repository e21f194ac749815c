"""Rows of pairs, worked by hand."""

import torch

from baton.length_groups import groups
from reward.pairs import Pair
from reward.rows import pair_rows, width


def pair(chosen: list[int], rejected: list[int], shared: int) -> Pair:
    return Pair(chosen, rejected, shared, [], [], [], "", 1)


CPU = torch.device("cpu")
PAIRS = [pair([5, 6, 7, 8], [5, 6, 9], 2), pair([5, 3], [5, 4], 1)]


def test_a_width_is_that_of_the_row_or_of_the_longer_side() -> None:
    assert [width(item, True) for item in PAIRS] == [5, 3]
    assert [width(item, False) for item in PAIRS] == [4, 2]


def test_groups_are_of_like_width_and_within_the_budget() -> None:
    assert groups([3, 9, 4, 3], 1, 9) == [[1], [2, 0], [3]]
    assert groups([3, 9, 4, 3], 2, 20) == [[1], [2, 0], [3]]
    assert groups([3, 9, 4, 3], 1, 1) == [[1], [2], [0], [3]]
    assert groups([], 1, 10) == []


def test_two_rows_a_pair() -> None:
    rows = pair_rows(PAIRS, False, 0, CPU)
    assert rows.input_ids.tolist() == [[5, 6, 7, 8], [5, 3, 0, 0], [5, 6, 9, 0], [5, 4, 0, 0]]
    assert rows.position_ids is None and rows.table is None
    assert rows.row.tolist() == [[0, 1], [2, 3]] and rows.last.tolist() == [[3, 1], [2, 1]]


def test_one_row_a_pair() -> None:
    rows = pair_rows(PAIRS, True, 0, CPU)
    assert rows.input_ids.tolist() == [[5, 6, 7, 8, 9], [5, 3, 4, 0, 0]]
    assert rows.position_ids is not None and rows.table is not None
    assert rows.position_ids.tolist()[0] == [0, 1, 2, 3, 2]
    assert rows.position_ids.tolist()[1][:3] == [0, 1, 1]
    assert rows.row.tolist() == [[0, 1], [0, 1]] and rows.last.tolist() == [[3, 1], [4, 2]]
    seen = (rows.table[:, 0] == 0).int().tolist()
    assert seen[0] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert [row[:3] for row in seen[1][:3]] == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    # padding sees itself at least: a row that sees nothing is no number
    assert all(sum(row) for rows_seen in seen for row in rows_seen)
