"""Greedy decoding against transformers' own generate, row by row; company and padding must not matter."""

from typing import Any

import pytest
import torch

from baton.decode import Reply, decode

PROMPTS = [[5, 9, 33], [7], [40, 2, 2, 11, 30, 8], [12, 13, 14, 15], [1, 1, 20], [46, 21], [2, 2]]
NEW = 10


@pytest.fixture(scope="module")
def generated(tiny_llama: Any) -> list[list[int]]:
    """What generate says to each prompt alone, never stopping."""
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = tiny_llama.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def cut(ids: list[int], stops: list[int]) -> Reply:
    """The reply that ends at its first stop token."""
    for at, token in enumerate(ids):
        if token in stops:
            return Reply(ids[: at + 1], True)
    return Reply(ids, False)


def greedy(model: Any, prompts: list[list[int]], stops: list[int], pad_id: int = 2, max_rows: int = 64) -> list[Reply]:
    return decode(model, prompts, max_new_tokens=NEW, stop_ids=stops, pad_id=pad_id, max_rows=max_rows)


def test_equals_generate_without_a_stop(tiny_llama: Any, generated: list[list[int]]) -> None:
    assert greedy(tiny_llama, PROMPTS, []) == [Reply(ids, False) for ids in generated]


def test_rows_that_stop_leave_and_the_others_go_on(tiny_llama: Any, generated: list[list[int]]) -> None:
    stops = [generated[0][2], generated[3][5]]
    expected = [cut(ids, stops) for ids in generated]
    assert len({len(reply.ids) for reply in expected}) > 2, "rows should stop at different positions"
    sizes: list[int] = []

    def pick(logits: torch.Tensor, rows: torch.Tensor, position: int) -> torch.Tensor:
        sizes.append(len(rows))
        return logits.argmax(-1)

    found = decode(tiny_llama, PROMPTS, max_new_tokens=NEW, stop_ids=stops, pad_id=2, pick=pick)
    assert found == expected
    assert sizes == [sum(len(reply.ids) > position for reply in expected) for position in range(len(sizes))]


@pytest.mark.parametrize("pad_id", [0, 1, 2, 33])
def test_the_pad_id_does_not_matter(tiny_llama: Any, generated: list[list[int]], pad_id: int) -> None:
    stops = [1, pad_id, generated[2][4]]
    assert greedy(tiny_llama, PROMPTS, stops, pad_id) == [cut(ids, stops) for ids in generated]


@pytest.mark.parametrize("max_rows", [1, 2, 3])
def test_company_and_order_do_not_matter(tiny_llama: Any, generated: list[list[int]], max_rows: int) -> None:
    expected = [Reply(ids, False) for ids in generated]
    assert greedy(tiny_llama, PROMPTS, [], max_rows=max_rows) == expected
    assert greedy(tiny_llama, PROMPTS[::-1], [], max_rows=max_rows) == expected[::-1]


def test_all_rows_stopping_at_once_end_the_decoding(tiny_llama: Any, generated: list[list[int]]) -> None:
    calls = 0

    def pick(logits: torch.Tensor, rows: torch.Tensor, position: int) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.full((len(rows),), 1)

    found = decode(tiny_llama, PROMPTS, max_new_tokens=NEW, stop_ids=[1], pad_id=2, pick=pick)
    assert found == [Reply([1], True)] * len(PROMPTS) and calls == 1


def test_pick_gets_rows_of_the_original_order_and_float32(tiny_llama: Any) -> None:
    seen: dict[int, int] = {}

    def pick(logits: torch.Tensor, rows: torch.Tensor, position: int) -> torch.Tensor:
        assert logits.dtype is torch.float32 and logits.shape == (len(rows), 48)
        seen.update(dict.fromkeys(rows.tolist(), position))
        return rows + 10

    found = decode(tiny_llama, PROMPTS, max_new_tokens=2, stop_ids=[], pad_id=2, pick=pick)
    assert [reply.ids for reply in found] == [[at + 10, at + 10] for at in range(len(PROMPTS))]
    assert seen == dict.fromkeys(range(len(PROMPTS)), 1)


def test_no_prompts_no_replies(tiny_llama: Any) -> None:
    assert decode(tiny_llama, [], max_new_tokens=3, stop_ids=[1], pad_id=2) == []
