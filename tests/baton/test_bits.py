"""Bits per byte: windows that predict every token once, figures by hand, any batch size and number of processes."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from baton.bits import (
    bits_per_byte,
    figures,
    model_nats,
    ngram_bits_per_byte,
    windows,
)
from baton.corpus.shards import PreparedSource, ShardWriter

END = 0


def prepared(
    folder: Path, name: str, documents: list[tuple[list[int], int, str]], per_shard: int = 2
) -> PreparedSource:
    """A source of (ids without end tokens, bytes, language), in shards of a few documents."""
    codes = list(dict.fromkeys(language for _, _, language in documents))
    shards = []
    for number, at in enumerate(range(0, len(documents), per_shard)):
        part = documents[at : at + per_shard]
        rows = [[END, *ids, END] for ids, _, _ in part]
        writer = ShardWriter(folder / name, number, np.dtype("<u2"))
        writer.add(
            np.concatenate([np.asarray(row) for row in rows]),
            [len(row) for row in rows],
            [size for _, size, _ in part],
            [codes.index(language) for _, _, language in part],
        )
        shards.append(writer.close({}, {}))
    facts = {"name": name, "path": name, "use": "eval", "languages": codes, "shards": shards}
    return PreparedSource(folder / name, facts, np.dtype("<u2"))


def ids_of(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 48, length).tolist()


@pytest.fixture()
def sources(tmp_path: Path) -> list[PreparedSource]:
    """Two sources, three languages; documents shorter and longer than rows of 8 tokens, and an empty one."""
    one = [(ids_of(4, 1), 10, "en"), (ids_of(30, 2), 50, "ja"), (ids_of(6, 3), 20, "en")]
    two = [(ids_of(17, 4), 40, "ja"), ([], 0, "und"), (ids_of(1, 5), 5, "und")]
    return [prepared(tmp_path, "books", one), prepared(tmp_path, "web", two)]


def plain_nats(model: Any, ids: np.ndarray, length: int) -> float:
    """One token at a time: from the start while it fits, then by hand-written half-row windows."""
    total, known, start = 0.0, length, 0
    for at in range(1, len(ids)):
        if at == known:  # the window is full: the next keeps its last half
            start = at - -(-length // 2)
            known = start + length
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[start:at].tolist()]), use_cache=False).logits[0, -1]
        total -= float(logits.log_softmax(-1)[int(ids[at])])
    return total


def test_windows_by_hand() -> None:
    assert list(windows(2, 8)) == [(0, 2, 1)]
    assert list(windows(8, 8)) == [(0, 8, 1)]
    # 20 tokens: 1..7, then four of context each: 8..11, 12..15, 16..19
    assert list(windows(20, 8)) == [(0, 8, 1), (4, 12, 8), (8, 16, 12), (12, 20, 16)]
    # the last is as short as it can be
    assert list(windows(9, 8)) == [(0, 8, 1), (4, 9, 8)]
    # an odd length: three of context, two predicted
    assert list(windows(9, 5)) == [(0, 5, 1), (2, 7, 5), (4, 9, 7)]


@pytest.mark.parametrize("length", [2, 3, 7, 64])
@pytest.mark.parametrize("num_tokens", [2, 3, 6, 7, 8, 63, 64, 65, 200])
def test_every_token_is_predicted_once_with_half_a_row_of_context(num_tokens: int, length: int) -> None:
    predicted = []
    for start, stop, first in windows(num_tokens, length):
        assert 0 <= start < first < stop <= num_tokens and stop - start <= length
        assert start == 0 or first - start >= length / 2
        predicted += range(first, stop)
    assert predicted == list(range(1, num_tokens))


@pytest.mark.parametrize(("length", "tokens_at_once"), [(8, 1), (8, 10_000), (7, 40), (64, 40)])
def test_nats_of_each_document(
    tiny_llama: Any, sources: list[PreparedSource], length: int, tokens_at_once: int
) -> None:
    found = model_nats(tiny_llama, sources, length, tokens_at_once, torch.float32)
    for source, costs in zip(sources, found, strict=True):
        expected = [plain_nats(tiny_llama, source.document(n), length) for n in range(source.num_documents)]
        assert costs == pytest.approx(expected, rel=1e-5)


def test_figures_by_source_and_language(tiny_llama: Any, sources: list[PreparedSource]) -> None:
    nats = [[plain_nats(tiny_llama, s.document(n), 8) for n in range(s.num_documents)] for s in sources]
    bits = [[each / math.log(2) for each in part] for part in nats]
    found = bits_per_byte(tiny_llama, sources, 8, 64, torch.float32)
    # tokens that are predicted: 5 + 31 + 7 and 18 + 1 + 2
    assert found.pop("eval/loss") == pytest.approx(sum(map(sum, nats)) / 64, rel=1e-5)
    assert found == pytest.approx(
        {
            "eval/bits_per_byte": sum(map(sum, bits)) / 125,
            "eval/bits_per_byte/books": sum(bits[0]) / 80,
            "eval/bits_per_byte/web": sum(bits[1]) / 45,
            "eval/bits_per_byte/en": (bits[0][0] + bits[0][2]) / 30,
            "eval/bits_per_byte/ja": (bits[0][1] + bits[1][0]) / 90,
        },
        rel=1e-5,
    )


def test_a_language_called_as_a_source_is(tmp_path: Path) -> None:
    sources = [
        prepared(tmp_path, "en", [([3], 4, "en"), ([4], 2, "de")]),
        prepared(tmp_path, "more", [([3], 4, "en")]),
    ]
    found = figures("b", sources, [np.log(2) * np.array([4.0, 6.0]), np.log(2) * np.array([12.0])])
    assert found == pytest.approx({"b": 2.2, "b/en": 10 / 6, "b/more": 3.0, "b/en (language)": 2.0, "b/de": 3.0})


@pytest.mark.parametrize("world", [2, 5])
def test_processes_share_the_windows(
    tiny_llama: Any, sources: list[PreparedSource], world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process' sums before they are added: together they are one process', and none does nearly all."""
    alone = model_nats(tiny_llama, sources, 8, 8, torch.float32)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    parts = [
        model_nats(tiny_llama, sources, 8, 8, torch.float32, SimpleNamespace(process_index=rank, num_processes=world))
        for rank in range(world)
    ]
    for index, costs in enumerate(alone):
        assert sum(part[index] for part in parts) == pytest.approx(costs, rel=1e-6)
    done = [sum(costs.sum() for costs in part) for part in parts]
    assert max(done) < 0.8 * sum(done)


def test_the_model_is_left_as_it_was(tiny_llama: Any, sources: list[PreparedSource]) -> None:
    tiny_llama.train()
    try:
        bits_per_byte(tiny_llama, sources, 8, 64, torch.float32)
        assert tiny_llama.training
    finally:
        tiny_llama.eval()


def test_bfloat16_is_near(tiny_llama: Any, sources: list[PreparedSource]) -> None:
    wide, narrow = (bits_per_byte(tiny_llama, sources, 8, 64, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert narrow["eval/bits_per_byte"] == pytest.approx(wide["eval/bits_per_byte"], rel=0.02)
    assert narrow != wide


def test_logits_that_are_capped_after_the_head(tmp_path: Path) -> None:
    """Gemma 2 caps its logits: the head alone would measure another model."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=1.0,
        final_logit_softcapping=1.0,
    )
    model = Gemma2ForCausalLM(config).eval()
    source = prepared(tmp_path, "text", [(ids_of(5, 1), 10, "en")])
    found = model_nats(model, [source], 16, 64, torch.float32)
    assert found[0] == pytest.approx([plain_nats(model, source.document(0), 16)], rel=1e-5)


def test_ngram_by_hand(tmp_path: Path) -> None:
    """As tests/baton/test_ngram.py's bigram: the end token before a document is its context and costs nothing."""
    train = [prepared(tmp_path, "train", [([1, 2], 2, "en"), ([1, 1], 2, "en")])]
    held_out = [prepared(tmp_path, "held_out", [([1, 2], 4, "en")])]
    by_hand = (0.75 + 0.25 * 0.375) * (0.5 / 3 + 0.5 * 0.175) * (0.5 + 0.5 * 0.375)
    bits = -math.log2(by_hand) / 4
    found = ngram_bits_per_byte(train, held_out, order=2, vocabulary=4)
    assert found == pytest.approx({f"eval/ngram_bits_per_byte{of}": bits for of in ("", "/held_out", "/en")}, rel=1e-9)


def test_an_ngram_of_a_part_says_so(tmp_path: Path) -> None:
    """Half of either source is counted: the first 6 tokens, of which the end tokens before documents are none."""
    train = [
        prepared(tmp_path, "one", [([1, 2], 2, "en"), ([1, 1], 2, "en"), ([3, 3], 2, "en")]),
        prepared(tmp_path, "two", [([2, 2], 2, "en"), ([2, 1], 2, "en"), ([3, 3], 2, "en")]),
    ]
    first = [
        prepared(tmp_path, "part_one", [([1, 2], 2, "en")]),
        prepared(tmp_path, "part_two", [([2, 2], 2, "en")]),
    ]
    held_out = [prepared(tmp_path, "held_out", [([1, 2], 4, "en")])]
    found = ngram_bits_per_byte(train, held_out, 2, 4, max_tokens=8)
    assert found.pop("eval/ngram_counted_share") == pytest.approx(6 / 18)
    assert found == ngram_bits_per_byte(first, held_out, 2, 4)
