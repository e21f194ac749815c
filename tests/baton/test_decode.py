"""Decoding against transformers' own generate and against plain forwards without a cache, one row at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from baton.decode import Choice, Pick, Reply, decode

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

    def pick(logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> Choice:
        sizes.append(len(rows))
        return Choice(logits.argmax(-1))

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

    def pick(logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> Choice:
        nonlocal calls
        calls += 1
        return Choice(torch.full((len(rows),), 1))

    found = decode(tiny_llama, PROMPTS, max_new_tokens=NEW, stop_ids=[1], pad_id=2, pick=pick)
    assert found == [Reply([1], True)] * len(PROMPTS) and calls == 1


def test_pick_gets_rows_of_the_original_order_and_float32(tiny_llama: Any) -> None:
    seen: dict[int, int] = {}

    def pick(logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> Choice:
        assert logits.dtype is torch.float32 and logits.shape == (len(rows), 48)
        seen.update(zip(rows.tolist(), positions.tolist(), strict=True))
        return Choice(rows + 10)

    found = decode(tiny_llama, PROMPTS, max_new_tokens=2, stop_ids=[], pad_id=2, pick=pick)
    assert [reply.ids for reply in found] == [[at + 10, at + 10] for at in range(len(PROMPTS))]
    assert seen == dict.fromkeys(range(len(PROMPTS)), 1)


def test_no_prompts_no_replies(tiny_llama: Any) -> None:
    assert decode(tiny_llama, [], max_new_tokens=3, stop_ids=[1], pad_id=2) == []


LENGTHS = [5, 1, 9, 2, 30, 1, 4, 17, 3, 8, 1, 12]
STOPS = [1, 7, 20]


@pytest.fixture(scope="module")
def wide_llama(tiny_llama: Any) -> Any:
    """The tiny model in float64."""
    import copy

    return copy.deepcopy(tiny_llama).double()


def some_prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 48, (length,), generator=generator).tolist() for length in lengths]


def seeded(prompts: list[list[int]], steps: int) -> Pick:
    """Samples by Gumbel noise that belongs to prompt and position."""
    generator = torch.Generator().manual_seed(2)
    table = -(-torch.rand(len(prompts), steps, 48, generator=generator, dtype=torch.float64).log()).log()

    def pick(logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> Choice:
        ids = (logits + table[rows, positions]).argmax(-1)
        return Choice(ids, logits.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1))

    return pick


def without_cache(model: Any, prompts: list[list[int]], steps: int, stops: list[int]) -> list[Reply]:
    """One row at a time, the whole text read again for each token."""
    pick, found = seeded(prompts, steps), []
    for row, prompt in enumerate(prompts):
        said: list[int] = []
        logprobs: list[float] = []
        while len(said) < steps and not (said and said[-1] in stops):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + said]), use_cache=False).logits[:, -1]
            choice = pick(logits, torch.tensor([row]), torch.tensor([len(said)]))
            assert choice.logprobs is not None
            said.append(int(choice.ids))
            logprobs.append(float(choice.logprobs))
        found.append(Reply(said, said[-1] in stops, logprobs))
    return found


def agree_to(found: list[Reply], expected: list[Reply], bound: float) -> None:
    assert [(reply.ids, reply.ended) for reply in found] == [(reply.ids, reply.ended) for reply in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=bound, rel=0)


@pytest.mark.parametrize("max_rows", [1, 2, 3, 8, 12, 64])
def test_slots_equal_plain_forwards(wide_llama: Any, max_rows: int) -> None:
    prompts = some_prompts(LENGTHS)
    expected = without_cache(wide_llama, prompts, 25, STOPS)
    lengths = {len(reply.ids) for reply in expected}
    assert len(lengths) > 4 and 25 in lengths, "rows should end at different steps, some cut off"
    found = decode(
        wide_llama, prompts, max_new_tokens=25, stop_ids=STOPS, pad_id=2, pick=seeded(prompts, 25), max_rows=max_rows
    )
    agree_to(found, expected, 1e-12)


def test_slots_with_eager_attention(tiny_llama: Any) -> None:
    import copy

    model = copy.deepcopy(tiny_llama).double()
    model.set_attn_implementation("eager")
    prompts = some_prompts(LENGTHS)
    found = decode(model, prompts, max_new_tokens=25, stop_ids=STOPS, pad_id=2, pick=seeded(prompts, 25), max_rows=4)
    # eager attention takes its softmax in float32, whatever the model
    agree_to(found, without_cache(model, prompts, 25, STOPS), 1e-5)


@pytest.mark.parametrize("max_rows", [2, 5])
def test_the_cache_grows_and_lets_go_of_old_columns(
    wide_llama: Any, max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import baton.slot_cache

    capacities: list[int] = []
    rehouse = baton.slot_cache.SlotCache._rehouse

    def watched(self: Any, capacity: int, shift: int) -> None:
        capacities.append(capacity)
        rehouse(self, capacity, shift)

    monkeypatch.setattr(baton.slot_cache.SlotCache, "_rehouse", watched)
    monkeypatch.setattr(baton.slot_cache, "BLOCK", 4)
    prompts = some_prompts(LENGTHS)
    found = decode(
        wide_llama, prompts, max_new_tokens=25, stop_ids=STOPS, pad_id=2, pick=seeded(prompts, 25), max_rows=max_rows
    )
    agree_to(found, without_cache(wide_llama, prompts, 25, STOPS), 1e-12)
    assert len(capacities) > 8 and max(capacities) <= 29 + 25 + 4, "never more than the longest row and a block"


def test_float32_slots_equal_plain_forwards(tiny_llama: Any) -> None:
    prompts = some_prompts(LENGTHS)
    found = decode(
        tiny_llama, prompts, max_new_tokens=25, stop_ids=STOPS, pad_id=2, pick=seeded(prompts, 25), max_rows=4
    )
    agree_to(found, without_cache(tiny_llama, prompts, 25, STOPS), 2e-4)


def test_prompts_are_read_in_bounded_forwards(wide_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import baton.decode

    monkeypatch.setattr(baton.decode, "PREFILL_TOKENS", 30)
    sizes: list[int] = []
    hook = wide_llama.register_forward_pre_hook(
        lambda module, args, inputs: sizes.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    prompts = some_prompts(LENGTHS)
    try:
        found = decode(wide_llama, prompts, max_new_tokens=25, stop_ids=STOPS, pad_id=2, pick=seeded(prompts, 25))
    finally:
        hook.remove()
    assert max(sizes) <= 30
    agree_to(found, without_cache(wide_llama, prompts, 25, STOPS), 1e-12)


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [6], [1, 40]])
def test_few_and_one_token_prompts(wide_llama: Any, lengths: list[int]) -> None:
    prompts = some_prompts(lengths)
    found = decode(wide_llama, prompts, max_new_tokens=5, stop_ids=STOPS, pad_id=2, pick=seeded(prompts, 5), max_rows=2)
    agree_to(found, without_cache(wide_llama, prompts, 5, STOPS), 1e-12)


def test_waiting_prompts_take_free_places(tiny_llama: Any) -> None:
    """With two rows, a long reply shares its batch with one short reply after the other."""
    sizes: list[int] = []

    def pick(logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> Choice:
        sizes.append(len(rows))
        return Choice(torch.where((rows == 0) | (positions == 0), 5, 1))

    found = decode(tiny_llama, [[3, 4, 9]] + [[3]] * 4, max_new_tokens=8, stop_ids=[1], pad_id=2, pick=pick, max_rows=2)
    assert [len(reply.ids) for reply in found] == [8, 2, 2, 2, 2]
    assert sizes == [2] * 8


def other_models() -> dict[str, Callable[[], Any]]:
    import transformers as hf

    sizes: dict[str, Any] = dict(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    small = hf.GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    return {
        "gpt2": lambda: hf.GPT2LMHeadModel(small),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**sizes, head_dim=16)),
        "sliding": lambda: hf.MistralForCausalLM(hf.MistralConfig(**sizes, sliding_window=6)),
    }


@pytest.mark.parametrize(("name", "in_slots"), [("gpt2", True), ("qwen3", True), ("sliding", False)])
def test_models_of_other_kinds(name: str, in_slots: bool) -> None:
    from baton.slot_cache import fits

    torch.manual_seed(3)
    model = other_models()[name]().double().eval()
    assert fits(model) is in_slots
    prompts = some_prompts(LENGTHS)
    found = decode(model, prompts, max_new_tokens=12, stop_ids=STOPS, pad_id=2, pick=seeded(prompts, 12), max_rows=4)
    agree_to(found, without_cache(model, prompts, 12, STOPS), 1e-10)


@pytest.mark.parametrize("max_rows", [1, 3])
@pytest.mark.parametrize("sliding", [False, True])
def test_processes_that_are_done_keep_step(tiny_llama: Any, max_rows: int, sliding: bool) -> None:
    """Two processes, here two threads: the first has one prompt, the second many; both call their model as often."""
    import copy
    import threading

    original = other_models()["sliding"]().eval() if sliding else tiny_llama
    models = [copy.deepcopy(original) for _ in range(2)]
    meeting, votes = threading.Barrier(2, timeout=30), [False, False]
    calls, found = [0, 0], [[], []]

    def process(rank: int, prompts: list[list[int]]) -> None:
        def agree(going_on: bool) -> bool:
            votes[rank] = going_on
            meeting.wait()
            result = any(votes)
            meeting.wait()
            return result

        models[rank].register_forward_pre_hook(lambda *_: calls.__setitem__(rank, calls[rank] + 1))
        found[rank] = decode(
            models[rank], prompts, max_new_tokens=6, stop_ids=[], pad_id=2, max_rows=max_rows, agree=agree
        )

    threads = [threading.Thread(target=process, args=pair) for pair in enumerate([[[4, 5]], PROMPTS])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert calls[0] == calls[1] >= 6
    assert found[1] == decode(models[1], PROMPTS, max_new_tokens=6, stop_ids=[], pad_id=2)
