"""The order of training rows: every row once an epoch, a function of seed and step, lengths sorted inside a batch."""

from baton.schedule import batch_number, row_order


def batches(order: list[int], size: int) -> list[list[int]]:
    return [order[at : at + size] for at in range(0, len(order), size)]


def test_every_row_once_an_epoch_and_each_epoch_in_its_own_order() -> None:
    order = row_order(10, 4, 8, seed=1)
    assert len(order) == 32
    epochs = [order[:10], order[10:20], order[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_longer_run_begins_as_a_shorter_one() -> None:
    assert row_order(10, 4, 9, seed=1)[:12] == row_order(10, 4, 3, seed=1)
    assert row_order(10, 4, 3, seed=2) != row_order(10, 4, 3, seed=1)


def test_a_batch_larger_than_the_data_repeats_it() -> None:
    order = row_order(3, 7, 1, seed=0)
    assert len(order) == 7 and sorted(order[:3]) == sorted(order[3:6]) == [0, 1, 2]


def test_lengths_sort_inside_a_batch_and_never_across() -> None:
    lengths = [5, 1, 9, 9, 2, 7, 3, 8, 4, 6]
    plain, by_length = (batches(row_order(10, 4, 5, 3, given), 4) for given in (None, lengths))
    for ours, theirs in zip(by_length, plain, strict=True):
        assert sorted(ours) == sorted(theirs)
        assert [lengths[row] for row in ours] == sorted((lengths[row] for row in theirs), reverse=True)
    assert by_length != plain


def test_batches_are_read_in_order_without_the_skipped_ones() -> None:
    assert [batch_number(step) for step in range(4)] == [0, 1, 2, 3]
    assert [batch_number(step, [5, 3, 4, 0, 3]) for step in range(5)] == [1, 2, 6, 7, 8]
