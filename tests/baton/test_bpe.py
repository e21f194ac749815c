"""The tokenizer: nothing is lost, digits stand alone, special tokens are there, the same text gives the same one."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton import bpe
from baton.bpe import TextStream, train_tokenizer, weighted_sample
from baton.errors import UserError

TEXTS = [
    "the baker of the town bakes bread for the town",
    "パン屋は町にいます。",
    "面包师住在镇上。",
    "in 1984 and 2024",
] * 5


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 400, 10_000)


@pytest.mark.parametrize(
    "text",
    [
        "the baker bakes bread",
        "エイダはパン屋です。",
        "她是面包师，住在雷德克里夫。",
        "👩‍🍳🥖 é ß ñ",
        "  two  spaces\n\nand\ttabs ",
        "never seen: €ł𝔘",
        "\x00\x7f",
    ],
)
def test_round_trip(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_nothing_is_added_around_a_text(tokenizer: Any) -> None:
    assert tokenizer("the baker")["input_ids"] == tokenizer("the baker", add_special_tokens=False)["input_ids"]


def test_digits_stand_alone(tokenizer: Any) -> None:
    ids = tokenizer("1984", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([token]) for token in ids] == ["1", "9", "8", "4"]
    ordinary = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    assert not [token for token in ordinary if len(token) > 1 and set(token) & set("0123456789")]


def test_frequent_words_become_tokens(tokenizer: Any) -> None:
    assert len(tokenizer("the town", add_special_tokens=False)["input_ids"]) == 2
    assert len(tokenizer("町にいます", add_special_tokens=False)["input_ids"]) < len("町にいます".encode())


def test_special_tokens_come_first_and_are_distinct(tokenizer: Any) -> None:
    names = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    assert len(tokenizer) <= 400


def test_the_same_texts_give_the_same_tokenizer(tokenizer: Any) -> None:
    again = train_tokenizer(iter(TEXTS), 400, 10_000)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_only_the_first_bytes_are_read() -> None:
    texts = ["aaaa bbbb aaaa bbbb", *["zzzzzz qqqqqq"] * 50]
    assert "zz" not in train_tokenizer(texts, 400, 5).get_vocab()
    assert "zz" in train_tokenizer(texts, 400, 500).get_vocab()


def test_it_survives_being_saved(tokenizer: Any, tmp_path: Any) -> None:
    from baton.models import load_tokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "<|im_start|>user\nパン屋 1984<|im_end|>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.padding_side == "right" and loaded.pad_token_id == 1 and loaded.eos_token_id == 0


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"])) | st.text("a 1'’\r\n\t\u3000.,パン屋िऩ<|>_"))
def test_every_text_comes_back_byte_for_byte(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids).encode() == text.encode()
    assert not set(ids) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|im_start|>", "<tool_call>", "<|reserved_3|>"])
def test_a_text_cannot_forge_a_special_token(tokenizer: Any, token: str) -> None:
    text = f"a {token} b"
    assert tokenizer.convert_tokens_to_ids(token) in tokenizer(text)["input_ids"]
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text and not set(ids) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Don't say 'some.", ["Don", "'t", " say", " '", "some", "."]),
        ("it’s John's", ["it", "’s", " John", "'s"]),
        ("in 1984,3½", [" in".strip(), " ", "1", "9", "8", "4", ",", "3", "½"]),
        ("x  =  1\n\n    y", ["x", " ", " =", " ", " ", "1", "\n\n", "   ", " y"]),
        ("a \t\r\n b", ["a", " \t\r\n", " b"]),
        ("end...\n\nNext", ["end", "...\n\n", "Next"]),
        ("नमस्ते दुनिया", ["नमस्ते", " दुनिया"]),
        ("cafe\u0301s", ["cafe\u0301s"]),
        ("パン屋は、町に", ["パン屋は", "、町に"]),
        ("trailing  ", ["trailing", "  "]),
        ("#include (x)", ["#include", " (", "x", ")"]),
    ],
)
def test_where_text_is_cut(tokenizer: Any, text: str, pieces: list[str]) -> None:
    spans = [span for _, span in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:stop] for start, stop in spans] == pieces


def test_reserved_tokens_count_in_the_vocabulary() -> None:
    tokenizer = train_tokenizer(TEXTS, 300, 10_000, reserved=3)
    names = ["<tool_call>", "</tool_call>", "<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [4, 5, 6, 7, 8]
    assert len(tokenizer) == 300 and "<|reserved_3|>" not in tokenizer.get_vocab()
    with pytest.raises(UserError, match=r"256 bytes and 46 special tokens need 302; raise vocab_size"):
        train_tokenizer(TEXTS, 300, 10_000, reserved=40)


def endless(text: str) -> Any:
    """A source without end, which notes how much of it was read."""

    def documents() -> Iterator[str]:
        while True:
            documents.read += 1  # type: ignore[attr-defined]
            yield text

    documents.read = 0  # type: ignore[attr-defined]
    return documents


def test_a_sample_has_the_shares_asked_for() -> None:
    sources = [endless("a" * 10), endless("é" * 10), endless("c" * 5)]
    streams = [TextStream(source, share=share) for source, share in zip(sources, (3, 2, 1), strict=True)]
    sample = "".join(weighted_sample(streams, 1200))
    assert [sample.count(letter) for letter in "aéc"] == [600, 200, 200]  # an é has two bytes
    assert [source.read for source in sources] == [60, 20, 40]
    assert sample == "".join(weighted_sample(streams, 1200))
    # in turn, not one source after the other
    assert sample[:100].count("a") == pytest.approx(50, abs=10)


def test_a_weight_multiplies_a_sources_own_bytes() -> None:
    """Sizes 100 and 300, weights 3 and 1: as much of either; the first is read three times."""
    small = TextStream(lambda: ["a" * 10] * 10, weight=3.0)
    large = TextStream(lambda: ["b" * 10] * 30)
    sample = "".join(weighted_sample([small, large], 10_000))
    assert (sample.count("a"), sample.count("b")) == (300, 300)
    part = "".join(weighted_sample([small, large], 310))  # no more than that is counted of the larger
    assert part.count("a") == pytest.approx(part.count("b"), abs=10)


def test_what_is_larger_than_the_sample_is_as_large_as_said() -> None:
    first, second = endless("a" * 10), endless("b" * 10)
    streams = [TextStream(first, num_bytes=1_000), TextStream(second, num_bytes=3_000)]
    sample = "".join(weighted_sample(streams, 400))
    assert (sample.count("a"), sample.count("b")) == (100, 300)
    assert (first.read, second.read) == (40 + 10, 40 + 30)  # counted as far as the sample's size, then sampled


def test_a_long_document_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "PIECE_BYTES", 20)
    book = "one two three four five six seven " * 20
    assert "".join(bpe._pieces(book)) == book
    assert [len(piece) <= 20 and piece.split()[0] in book.split() for piece in bpe._pieces(book)]
    sample = list(weighted_sample([TextStream(lambda: [book]), TextStream(lambda: ["b" * 10] * 68)], 200))
    assert sum(piece.count("b") for piece in sample) == pytest.approx(100, abs=20)
    assert list(bpe._pieces("x" * 50)) == ["x" * 20, "x" * 20, "x" * 10]


@pytest.mark.parametrize("share", [None, 0.5])
def test_a_source_without_text(share: float | None) -> None:
    with pytest.raises(UserError, match="holds no text"):
        list(weighted_sample([TextStream(lambda: ["a"], share=share), TextStream(lambda: [""], share=share)], 10))
