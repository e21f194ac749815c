"""The seeded order: every row once, another one for every key, and none preferred."""

from collections import Counter

import pytest

from baton.corpus.order import SeededOrder


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_every_row_comes_once(size: int) -> None:
    order = SeededOrder(size, (7, 0, 0))
    assert sorted(order[place] for place in range(size)) == list(range(size))


def test_the_order_depends_on_every_part_of_the_key_and_on_nothing_else() -> None:
    def rows(*key: int) -> list[int]:
        order = SeededOrder(100, key)
        return [order[place] for place in range(100)]

    assert rows(1, 2, 3) == rows(1, 2, 3)
    orders = {tuple(rows(*key)) for key in [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (12, 3)]}
    assert len(orders) == 5
    assert tuple(range(100)) not in orders


def test_the_order_is_the_same_on_every_machine() -> None:
    """Written down once: a run that goes on with another version of this file must not read other rows."""
    order = SeededOrder(10, (3, 0, 1))
    assert [order[place] for place in range(10)] == [6, 5, 0, 9, 8, 3, 4, 7, 2, 1]


def test_few_rows_take_every_order_about_equally_often() -> None:
    seen: Counter[tuple[int, ...]] = Counter()
    for seed in range(2400):
        order = SeededOrder(4, (seed,))
        seen[tuple(order[place] for place in range(4))] += 1
    assert len(seen) == 24
    # chi-square of 24 equally likely orders: mean 23, deviation 6.8
    assert sum((count - 100) ** 2 / 100 for count in seen.values()) < 23 + 5 * 6.8


def test_neighbours_do_not_stay_neighbours() -> None:
    size = 5000
    order = SeededOrder(size, (11,))
    rows = [order[place] for place in range(size)]
    # of random rows about two in `size` follow their neighbour
    assert sum(after == before + 1 for before, after in zip(rows, rows[1:], strict=False)) < 12
    # the mean distance of two random rows is a third
    assert sum(abs(a - b) for a, b in zip(rows, rows[1:], strict=False)) / size == pytest.approx(size / 3, rel=0.05)


def test_rows_without_number_need_no_memory() -> None:
    order = SeededOrder(10**15 + 37, (1,))
    places = [0, 1, 10**14, 10**15 + 36]
    rows = [order[place] for place in places]
    assert len(set(rows)) == 4 and all(0 <= row < 10**15 + 37 for row in rows)
