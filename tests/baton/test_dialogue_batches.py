"""Packed rows as batches: which tokens are predicted where, whatever lies beside them; noise by dialogue."""

import pytest
import torch

from baton.dialogue_batches import Batch, apart, dialogues_of, embedding_noise, packed

# two dialogues of 4 and 3 tokens and one token of padding; a dialogue with nothing to train and one with a last token
ROWS = [
    {
        "input_ids": [10, 11, 12, 13, 20, 21, 22, 0],
        "labels": [-100, -100, 12, 13, -100, 21, -100, -100],
        "position_ids": [0, 1, 2, 3, 0, 1, 2, 0],
    },
    {
        "input_ids": [30, 31, 32, 33, 34, 40, 41, 42],
        "labels": [-100] * 7 + [42],
        "position_ids": [0, 1, 2, 3, 4, 0, 1, 2],
    },
]
CPU = torch.device("cpu")


def predicted(batch: Batch) -> list[tuple[int, int]]:
    """(the token before, the token in the loss), sorted."""
    before = batch.input_ids[batch.places]
    return sorted(zip(before.tolist(), batch.tokens.tolist(), strict=True))


def test_dialogues_are_found_where_positions_restart() -> None:
    first, second = dialogues_of(ROWS)
    assert [item.ids for item in first] == [[10, 11, 12, 13], [20, 21, 22]]
    assert [item.targets for item in first] == [[2, 3], [1]]
    assert [(item.number, item.ids, item.targets, item.start) for item in second] == [(2, [40, 41, 42], [2], 5)]


def test_no_rows_are_no_batches() -> None:
    assert packed([], [], 8, CPU) == apart([], 8, 0, CPU) == []


@pytest.mark.parametrize("max_tokens", [1, 4, 8, 100])
def test_every_token_in_the_loss_is_predicted_once_from_the_token_before_it(max_tokens: int) -> None:
    found = dialogues_of(ROWS)
    wanted = [(11, 12), (12, 13), (20, 21), (41, 42)]
    alone = apart([item for row in found for item in row], max_tokens, 0, CPU)
    together = packed(ROWS, found, max_tokens, CPU)
    for batches in (alone, together):
        assert sorted(pair for batch in batches for pair in predicted(batch)) == wanted
    assert all(batch.position_ids is None for batch in alone)
    assert all(batch.input_ids.numel() <= max(max_tokens, 4) for batch in alone)
    assert sum(len(batch.input_ids) for batch in together) == 2


def test_micro_batches_hold_dialogues_of_like_length() -> None:
    batches = apart([item for row in dialogues_of(ROWS) for item in row], 6, 99, CPU)
    assert [batch.input_ids.tolist() for batch in batches] == [[[10, 11, 12, 13]], [[20, 21, 22], [40, 41, 42]]]
    (both,) = apart([item for row in dialogues_of(ROWS)[:1] for item in row], 8, 99, CPU)
    assert both.input_ids.tolist() == [[10, 11, 12, 13], [20, 21, 22, 99]]


def test_a_row_without_any_loss_is_no_batch() -> None:
    rows = [{"input_ids": [1, 2], "labels": [-100, -100], "position_ids": [0, 1]}]
    assert dialogues_of(rows) == [[]]
    assert packed(rows, dialogues_of(rows), 8, CPU) == [] and apart([], 8, 0, CPU) == []


def test_noise_is_a_dialogues_own() -> None:
    found = dialogues_of(ROWS)
    (together,) = packed(ROWS, found, 16, CPU)
    alone = apart([item for row in found for item in row], 100, 0, CPU)
    noise = embedding_noise(together, 64, 5.0, 1, 7)
    assert not noise[0, 7].any() and not noise[1, :5].any(), "padding and what is not trained"
    (batch,) = alone
    separate = embedding_noise(batch, 64, 5.0, 1, 7)
    for span, place in zip(batch.spans, ((0, 0), (0, 4), (1, 5)), strict=True):
        row, start = place
        assert torch.equal(separate[span.row, : span.length], noise[row, start : start + span.length])
        bound = 5.0 / (span.length * 64) ** 0.5
        drawn = separate[span.row, : span.length]
        assert 0.9 * bound < float(drawn.abs().max()) <= bound and abs(float(drawn.mean())) < 0.2 * bound
    assert not torch.equal(noise, embedding_noise(together, 64, 5.0, 1, 8))
    assert not torch.equal(noise, embedding_noise(together, 64, 5.0, 2, 7))
