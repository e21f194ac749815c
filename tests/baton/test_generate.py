"""Generation and surprisal against plain softmax, and text that never shows half a character."""

import math
import os
from typing import Any

import pytest

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from baton import chat
from baton.bpe import train_tokenizer
from baton.chat import DOCUMENT_END
from baton.errors import UserError
from baton.generate import TextStream, generate, reward, surprisals, token_text

CONTEXT = 48


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["the baker bakes bread in the town, and the town eats bread"] * 4, 300, 10_000)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def plain(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    """The next token's distribution after `ids`: one forward pass over everything, no cache."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1].softmax(-1)


def test_candidates_are_the_likeliest_with_their_exact_probabilities(model: LlamaForCausalLM, tokenizer: Any) -> None:
    ids = tokenizer("the baker")["input_ids"]
    steps = list(generate(model, ids, max_new_tokens=8, stop_ids=[], candidates=5))
    assert len(steps) == 8
    for step in steps:
        expected = plain(model, ids)
        best = sorted(range(len(expected)), key=lambda token: -expected[token])[:5]
        assert [each.token_id for each in step.candidates] == best
        assert [each.probability for each in step.candidates] == pytest.approx(expected[best].tolist(), abs=1e-5)
        assert step.token_id == best[0]
        assert step.probability == pytest.approx(float(expected[best[0]]), abs=1e-5)
        ids = [*ids, step.token_id]


def test_all_candidates_sum_to_one(model: LlamaForCausalLM, tokenizer: Any) -> None:
    (step,) = generate(model, [5, 6], max_new_tokens=1, stop_ids=[], candidates=10**6)
    assert len(step.candidates) == len(tokenizer)
    assert sum(each.probability for each in step.candidates) == pytest.approx(1, abs=1e-5)


def test_a_stop_token_ends_the_reply_and_is_part_of_it(model: LlamaForCausalLM) -> None:
    free = [step.token_id for step in generate(model, [5, 6], max_new_tokens=6, stop_ids=[])]
    stop = free[3]
    stopped = [step.token_id for step in generate(model, [5, 6], max_new_tokens=6, stop_ids=[stop])]
    assert stopped == free[: free.index(stop) + 1]


def test_sampling_follows_temperature_and_seed(model: LlamaForCausalLM) -> None:
    def first_tokens(temperature: float, seeds: range) -> list[int]:
        return [
            next(generate(model, [5, 6], max_new_tokens=1, stop_ids=[], temperature=temperature, seed=seed)).token_id
            for seed in seeds
        ]

    assert first_tokens(1.0, range(20)) == first_tokens(1.0, range(20))
    assert len(set(first_tokens(1.0, range(20)))) > 1
    greedy = int(plain(model, [5, 6]).argmax())
    assert set(first_tokens(0.0, range(5))) == set(first_tokens(1e-4, range(5))) == {greedy}
    # at temperature 2 the share of the likeliest token follows softmax(logits / 2)
    share = float((plain(model, [5, 6]).log() / 2).softmax(-1)[greedy])
    seen = first_tokens(2.0, range(600)).count(greedy) / 600
    assert abs(seen - share) < 4 * math.sqrt(share * (1 - share) / 600)


def test_the_global_seed_is_left_alone(model: LlamaForCausalLM) -> None:
    state = torch.get_rng_state()
    list(generate(model, [5, 6], max_new_tokens=4, stop_ids=[], temperature=1.0))
    assert torch.equal(torch.get_rng_state(), state)


def test_gradients_stay_on_between_two_tokens(model: LlamaForCausalLM) -> None:
    for _ in generate(model, [5, 6], max_new_tokens=2, stop_ids=[]):
        assert torch.is_grad_enabled()


def test_the_context_bounds_the_reply(model: LlamaForCausalLM, tokenizer: Any) -> None:
    assert len(list(generate(model, [5] * (CONTEXT - 3), max_new_tokens=10, stop_ids=[]))) == 3
    with pytest.raises(UserError, match="48 tokens long; the model reads at most 48"):
        next(generate(model, [5] * CONTEXT, max_new_tokens=10, stop_ids=[]))
    with pytest.raises(UserError, match="reads at most 47"):
        surprisals(model, tokenizer, "x" * 48)


def test_surprisal_sums_to_the_loss(model: LlamaForCausalLM, tokenizer: Any) -> None:
    text = "the town eats 麦 bread"
    ids = [tokenizer.convert_tokens_to_ids(DOCUMENT_END), *tokenizer(text)["input_ids"]]
    with torch.no_grad():
        loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss  # the mean over all but the first token
    scored = surprisals(model, tokenizer, text)
    assert [each.token_id for each in scored] == ids[1:]
    assert sum(each.bits for each in scored) * math.log(2) == pytest.approx(float(loss) * (len(ids) - 1), rel=1e-5)
    assert scored[0].bits == pytest.approx(-math.log2(plain(model, ids[:1])[ids[1]]), abs=1e-4)


def test_empty_text_is_refused(model: LlamaForCausalLM, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="no text to score"):
        surprisals(model, tokenizer, "")


@pytest.mark.parametrize(
    "text", ["the town 町には麦の粉がある。", "他卖面包 and bread 🍞!", "  two spaces\n\nlines", "é"]
)
def test_text_streams_in_whole_characters(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert stream.flush() == ""
    if not text.isascii():
        assert "" in pieces  # bytes alone are tokens here: some wait for the rest of their character


def test_a_character_that_stays_incomplete_is_shown_at_the_end(tokenizer: Any) -> None:
    stream = TextStream(tokenizer)
    ids = tokenizer("a町")["input_ids"]
    assert "".join(stream.push(token) for token in ids[:-1]) == "a"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_special_tokens_are_not_text(tokenizer: Any) -> None:
    stream = TextStream(tokenizer)
    ids = [*tokenizer("a")["input_ids"], tokenizer.eos_token_id, *tokenizer(" b")["input_ids"]]
    assert [stream.push(token) for token in ids][:2] == ["a", ""]


def test_a_token_is_shown_by_its_text_or_its_bytes(tokenizer: Any) -> None:
    assert [token_text(tokenizer, token) for token in tokenizer("町")["input_ids"]] == ["<E7>", "<94>", "<BA>"]
    assert token_text(tokenizer, tokenizer("\n")["input_ids"][0]) == "\n"
    assert token_text(tokenizer, tokenizer.eos_token_id) == DOCUMENT_END


class Template:
    """A tokenizer whose reply is four tokens, of which the last ends a turn, with something after it."""

    eos_token_id = 2


@pytest.fixture
def template(monkeypatch: pytest.MonkeyPatch) -> Any:
    def encode(tokenizer: Any, messages: list[dict[str, str]], tools: Any, opened: bool) -> list[int]:
        assert isinstance(tokenizer, Template) and not opened
        return [10, 20, 2, 30, 2, 99] + [99] * (len(messages) - 2)

    monkeypatch.setattr(chat, "_encode", encode)
    return Template()


MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def test_reward_reads_the_last_reply_up_to_its_end(template: Any) -> None:
    class Scorer:
        device = torch.device("cpu")
        config = LlamaConfig(max_position_embeddings=8)

        def __call__(self, input_ids: torch.Tensor) -> Any:
            return type("Output", (), {"logits": input_ids.sum(-1, keepdim=True).float()})

    assert reward(Scorer(), template, MESSAGES) == 10 + 20 + 2 + 30 + 2


def test_the_reward_of_an_ensemble_is_the_mean_of_its_members(template: Any) -> None:
    class Ensemble:
        device = torch.device("cpu")
        config = LlamaConfig(max_position_embeddings=8)
        peft_config = {"default": 1.0, "member_1": 4.0}
        active = "default"

        def set_adapter(self, name: str) -> None:
            self.active = name

        def __call__(self, input_ids: torch.Tensor) -> Any:
            return type("Output", (), {"logits": torch.tensor([[self.peft_config[self.active]]])})

    assert reward(Ensemble(), template, MESSAGES) == 2.5
