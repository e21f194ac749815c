"""Continuations: as many as asked for of every language, from where they are said to be, the same every time."""

from typing import Any

import numpy as np
import pytest

from baton.bpe import train_tokenizer
from baton.continuations import Continuation, continuations, continuations_table
from baton.corpus.shards import PreparedSource, ShardWriter

BOOK = "".join(f"Das ist der {word} Satz über 町 und パン屋. " for word in ("erste", "zweite", "dritte", "vierte"))
TEXTS = {"en": [f"the baker number {number} bakes bread in the town" for number in range(6)], "de": [BOOK]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([*TEXTS["en"], BOOK], 320, 10_000)


@pytest.fixture(scope="module")
def sources(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> list[PreparedSource]:
    folder, found = tmp_path_factory.mktemp("prepared"), []
    for language, texts in TEXTS.items():
        rows = [[0, *tokenizer(text)["input_ids"], 0] for text in texts]
        writer = ShardWriter(folder / language, 0, np.dtype("<u2"))
        sizes = [len(text.encode()) for text in texts]
        writer.add(np.concatenate(rows), [len(row) for row in rows], sizes, [0] * len(rows))
        facts = {"name": f"{language}_held_out", "path": "", "use": "eval", "languages": [language]}
        found.append(PreparedSource(folder / language, {**facts, "shards": [writer.close({}, {})]}, np.dtype("<u2")))
    return found


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, use_cache=False, **shape)
    return LlamaForCausalLM(config).train()


@pytest.fixture(scope="module")
def found(model: Any, tokenizer: Any, sources: list[PreparedSource]) -> list[Continuation]:
    return continuations(model, tokenizer, sources, 3, max_new_tokens=12)


def test_three_of_every_language(found: list[Continuation]) -> None:
    assert [(each.language, each.source) for each in found] == [("en", "en_held_out")] * 3 + [("de", "de_held_out")] * 3


def test_of_many_documents_every_second_from_its_beginning(found: list[Continuation]) -> None:
    for each, text in zip(found[:3], TEXTS["en"][::2], strict=True):
        assert each.prompt and text.startswith(each.prompt + each.truth) and each.truth


def test_one_document_gives_three_places(found: list[Continuation]) -> None:
    places = [BOOK.index(each.prompt) for each in found[3:]]
    assert places[0] == 0 and len(BOOK) / 5 < places[1] < len(BOOK) / 2 < places[2]
    for each in found[3:]:
        assert each.prompt + each.truth.rstrip("\ufffd") in BOOK and "\ufffd" not in each.prompt


def test_the_same_again_whatever_else_is_asked(
    model: Any, tokenizer: Any, sources: list[PreparedSource], found: list[Continuation]
) -> None:
    assert continuations(model, tokenizer, sources, 3, max_new_tokens=12) == found
    assert model.training and model.config.use_cache is False
    others = continuations(model, tokenizer, sources, 3, max_new_tokens=12, seed=1)
    assert [each.prompt for each in others] == [each.prompt for each in found]
    assert [each.text for each in others] != [each.text for each in found]
    assert len({each.text for each in found}) == 6


def test_a_model_that_has_learned_a_text_goes_on_with_it(tokenizer: Any, sources: list[PreparedSource]) -> None:
    """A stand-in that always gives the next id of its one document: the continuation is the truth."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = sources[1].document(0)
    follows = dict(zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True))
    hidden = len(tokenizer)
    config = LlamaConfig(
        vocab_size=hidden,
        hidden_size=hidden - hidden % 2,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        for token in range(config.hidden_size):
            model.model.embed_tokens.weight[token, token] = 1
            model.lm_head.weight[follows.get(token, 0), token] = 100
    first = continuations(model, tokenizer, sources[1:], 1, max_new_tokens=4)[0]
    said = tokenizer(first.prompt)["input_ids"]
    expected = []
    for _ in range(4):
        expected.append(follows[(said + expected)[-1]])
    assert first.text == tokenizer.decode(said + expected)[len(first.prompt) :]


def test_the_table(found: list[Continuation]) -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(continuations_table([Continuation("und", "web", "[bold]Once", " upon", " a time")]))
    shown = console.export_text()
    assert "[bold]Once upon" in shown and " a time" in shown and "web" in shown and "und" not in shown


def test_nothing_held_out(model: Any, tokenizer: Any) -> None:
    assert continuations(model, tokenizer, [], 3) == []
