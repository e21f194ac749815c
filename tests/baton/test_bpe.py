"""The tokenizer: nothing is lost, digits stand alone, special tokens are there, the same text gives the same one."""

from typing import Any

import pytest

from baton.bpe import train_tokenizer

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
    assert not [token for token in tokenizer.get_vocab() if len(token) > 1 and set(token) & set("0123456789")]


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
