"""Packed rows worked by hand, and that packed documents do not see each other."""

from typing import Any

import pytest
import torch

from baton.packing import IGNORED, collate, pack

PAD = 0


def whole(ids: list[int]) -> tuple[list[int], list[bool]]:
    """A document that is in the loss throughout."""
    return ids, [True] * len(ids)


def test_rows_worked_by_hand() -> None:
    packed = pack([whole([11, 12, 13]), whole([21, 22]), whole([31, 32, 33, 34])], 6, PAD)
    # longest first: 4 tokens, then 3 (no room), then 2 beside the 4 (exactly full); rows in the documents' order
    assert [row["input_ids"] for row in packed.rows] == [[11, 12, 13, PAD, PAD, PAD], [21, 22, 31, 32, 33, 34]]
    assert [row["labels"] for row in packed.rows] == [
        [IGNORED, 12, 13, IGNORED, IGNORED, IGNORED],
        [IGNORED, 22, IGNORED, 32, 33, 34],
    ]
    assert [row["position_ids"] for row in packed.rows] == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]]
    assert (packed.num_tokens, packed.num_in_loss) == (9, 6)
    assert packed.padding_share == pytest.approx(3 / 12)


def test_labels_follow_the_mask_and_a_real_pad_id_is_kept() -> None:
    packed = pack([([PAD, 5, PAD, 6], [True, False, True, True])], 4, PAD)
    assert packed.rows[0]["labels"] == [IGNORED, IGNORED, PAD, 6]
    assert packed.num_in_loss == 2


def test_a_long_document_is_cut_and_each_piece_starts_anew() -> None:
    packed = pack([whole([1, 2, 3, 4, 5, 6, 7])], 3, PAD)
    assert [row["input_ids"] for row in packed.rows] == [[1, 2, 3], [4, 5, 6], [7, PAD, PAD]]
    assert [row["labels"] for row in packed.rows] == [[IGNORED, 2, 3], [IGNORED, 5, 6], [IGNORED] * 3]
    assert packed.num_tokens == 7


def test_every_token_is_packed_once_and_rows_are_well_filled() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (200,), generator=generator).tolist()
    documents = [whole([1000 * at + place for place in range(1, length + 1)]) for at, length in enumerate(lengths)]
    packed = pack(documents, 40, PAD)
    assert sorted(token for row in packed.rows for token in row["input_ids"] if token != PAD) == sorted(
        token for ids, _ in documents for token in ids
    )
    assert len(packed.rows) <= 1.05 * sum(lengths) / 40
    assert pack(documents, 40, PAD) == packed


def test_nothing_to_pack() -> None:
    packed = pack([], 8, PAD)
    assert packed.rows == [] and packed.padding_share == 0.0


def test_collate_makes_no_attention_mask() -> None:
    batch = collate(pack([whole([1, 2, 3]), whole([4, 5])], 3, PAD).rows)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].shape == (2, 3)


@pytest.fixture(scope="module")
def documents() -> list[tuple[list[int], list[bool]]]:
    generator = torch.Generator().manual_seed(1)
    return [whole(torch.randint(3, 48, (length,), generator=generator).tolist()) for length in (9, 5, 7, 3)]


@pytest.fixture(scope="module")
def alone(tiny_llama: Any, documents: list[tuple[list[int], list[bool]]]) -> list[torch.Tensor]:
    """Logits of each document by itself."""
    with torch.no_grad():
        return [tiny_llama(input_ids=torch.tensor([ids])).logits[0] for ids, _ in documents]


def packed_gap(
    model: Any, documents: list[tuple[list[int], list[bool]]], alone: list[torch.Tensor], **options: Any
) -> float:
    """The largest difference between packed logits and those of the documents alone."""
    packed = pack(documents, 26, PAD)
    assert len(packed.rows) == 1, "all documents in one row"
    batch = collate(packed.rows)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], **options).logits[0]
    start, gap = 0, 0.0
    for expected in alone:
        gap = max(gap, float((logits[start : start + len(expected)] - expected).abs().max()))
        start += len(expected)
    return gap


def test_packed_documents_do_not_see_each_other(tiny_llama: Any, documents: Any, alone: list[torch.Tensor]) -> None:
    assert packed_gap(tiny_llama, documents, alone, use_cache=False) < 1e-5


def test_a_cache_or_a_mask_would_leak(tiny_llama: Any, documents: Any, alone: list[torch.Tensor]) -> None:
    mask = torch.ones(1, 26, dtype=torch.long)
    assert packed_gap(tiny_llama, documents, alone, use_cache=True) > 0.1
    assert packed_gap(tiny_llama, documents, alone, use_cache=False, attention_mask=mask) > 0.1
