"""Dialogues as ids: what is trained, token by token, where replies stop, and what both reward model and PPO read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.bpe import train_tokenizer
from baton.chat import (
    CannotRenderError,
    choose_pad,
    encode_dialogue,
    encode_prompt,
    encode_scored,
    install_template,
    stop_ids,
)
from baton.errors import UserError

TEXTS = ["Where does Ada live? Ada lives in Redcliff. She is a baker. user assistant system\n"] * 4


@pytest.fixture
def bare() -> Any:
    """A base's tokenizer, as stage 1 makes it."""
    return train_tokenizer(TEXTS, 380, 10_000)


@pytest.fixture
def tokenizer(bare: Any) -> Any:
    install_template(bare, "chatml", Path())
    return bare


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


DIALOGUE = [
    message("system", "Be brief."),
    message("user", "Where does Ada live?"),
    message("assistant", "In Redcliff."),
    message("user", "And her craft?"),
    message("assistant", "She is a baker."),
]
# every stretch of the rendered dialogue, and whether it is trained
HAND_MARKED = [
    ("<|im_start|>system\nBe brief.<|im_end|>\n", False),
    ("<|im_start|>user\nWhere does Ada live?<|im_end|>\n", False),
    ("<|im_start|>assistant\n", False),
    ("In Redcliff.<|im_end|>", True),
    ("\n<|im_start|>user\nAnd her craft?<|im_end|>\n", False),
    ("<|im_start|>assistant\n", False),
    ("She is a baker.<|im_end|>", True),
    ("\n", False),
]


def test_mask_equals_the_hand_marked_dialogue_token_by_token(tokenizer: Any) -> None:
    expected_ids: list[int] = []
    expected_mask: list[bool] = []
    for text, trained in HAND_MARKED:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected_ids += ids
        expected_mask += [trained] * len(ids)
    ids, mask = encode_dialogue(tokenizer, DIALOGUE)
    assert ids == expected_ids
    assert mask == expected_mask


@pytest.mark.parametrize(
    "content", [" leading space", "\nnewline first", "エイダはパン屋です。", "trailing \n", "1984", ""]
)
def test_the_mask_covers_exactly_what_the_assistant_says(tokenizer: Any, content: str) -> None:
    ids, mask = encode_dialogue(tokenizer, [message("user", "Who?"), message("assistant", content)])
    said = [token for token, trained in zip(ids, mask, strict=True) if trained]
    assert tokenizer.decode(said) == content + "<|im_end|>"


def test_the_stop_token_is_trained_at_every_turn_of_the_assistant(tokenizer: Any) -> None:
    ids, mask = encode_dialogue(tokenizer, DIALOGUE)
    (stop,) = stop_ids(tokenizer)
    assert stop == tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id
    assert [mask[at] for at, token in enumerate(ids) if token == stop] == [False, False, True, False, True]


def test_pad_is_neither_the_stop_nor_another_token_of_dialogues(tokenizer: Any) -> None:
    ids, _ = encode_dialogue(tokenizer, DIALOGUE)
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.pad_token_id not in ids


def test_scored_ids_end_at_the_stop_token(tokenizer: Any) -> None:
    ids = encode_scored(tokenizer, DIALOGUE)
    whole, _ = encode_dialogue(tokenizer, DIALOGUE)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert ids + newline == whole and ids[-1] in stop_ids(tokenizer)


@pytest.mark.parametrize("reply", ["She is a baker.", "Ada", "エイダ 1984", "a\nb"])
def test_ppo_reads_the_ids_that_the_reward_model_was_trained_on(tokenizer: Any, reply: str) -> None:
    prompt = DIALOGUE[:-1]
    sampled = tokenizer(reply, add_special_tokens=False)["input_ids"] + stop_ids(tokenizer)
    assert encode_prompt(tokenizer, prompt) + sampled == encode_scored(
        tokenizer, [*prompt, message("assistant", reply)]
    )


def test_a_prompt_opens_the_assistants_turn(tokenizer: Any) -> None:
    text = tokenizer.decode(encode_prompt(tokenizer, [message("user", "Who?")]))
    assert text == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"


UNMARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NEVER_STOPS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}"
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Put a template into the recipe's folder, which is returned."""

    def put(template: str) -> Path:
        (tmp_path / "mine.jinja").write_text(template)
        return tmp_path

    return put


def test_a_template_without_markers_gets_its_mask_from_its_prefixes(bare: Any, write: Callable[[str], Path]) -> None:
    bare.eos_token = "<|im_end|>"
    install_template(bare, "mine.jinja", write(UNMARKED))
    ids, mask = encode_dialogue(bare, DIALOGUE)
    said = [token for token, trained in zip(ids, mask, strict=True) if trained]
    assert bare.decode(said) == "In Redcliff.<|im_end|>She is a baker.<|im_end|>"
    bare.chat_template = UNMARKED
    install_template(bare, "keep", Path())
    assert encode_dialogue(bare, DIALOGUE) == (ids, mask)


def test_a_template_that_opens_no_turn_is_refused(bare: Any, write: Callable[[str], Path]) -> None:
    """Without markers and without a generation prompt, the assistant's header would count as what it says."""
    bare.eos_token = "<|im_end|>"
    silent = UNMARKED.replace("<|im_end|>", "") + "{% if add_generation_prompt %}!{% endif %}"
    with pytest.raises(UserError, match="mine.jinja: the template marks no assistant turns and is not prefix-stable"):
        install_template(bare, "mine.jinja", write(silent))


def test_a_template_that_never_trains_the_stop_is_refused(bare: Any, write: Callable[[str], Path]) -> None:
    bare.eos_token = "<|im_end|>"
    with pytest.raises(UserError, match=r"trains the token that ends a turn \(<\|im_end\|>\) at the end of 0 of 2"):
        install_template(bare, "mine.jinja", write(NEVER_STOPS))


BETWEEN = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}ASSISTANT: {% generation %}{{ m['content'] }}"
    "{% if not loop.last %}<|im_end|>{% endif %}\n{% endgeneration %}{% else %}USER: {{ m['content'] }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)


def test_a_template_that_stops_only_between_turns_is_refused(bare: Any, write: Callable[[str], Path]) -> None:
    bare.eos_token = "<|im_end|>"
    with pytest.raises(UserError, match="at the end of 1 of 2 replies"):
        install_template(bare, "mine.jinja", write(BETWEEN))


def test_a_reply_is_apart_from_a_header_that_ends_in_a_space(bare: Any, write: Callable[[str], Path]) -> None:
    """As a whole, the space would join the reply's first word, which no sampled reply begins with."""
    bare.eos_token = "<|im_end|>"
    install_template(
        bare, "mine.jinja", write(BETWEEN.replace("{% if not loop.last %}<|im_end|>{% endif %}", "<|im_end|>"))
    )
    ids, mask = encode_dialogue(bare, DIALOGUE)
    said = [token for token, trained in zip(ids, mask, strict=True) if trained]
    # the line break behind the turn's last token is inside the markers, and is never sampled
    assert bare.decode(said) == "In Redcliff.<|im_end|>She is a baker.<|im_end|>"
    sampled = bare("She is a baker.", add_special_tokens=False)["input_ids"] + stop_ids(bare)
    assert encode_prompt(bare, DIALOGUE[:-1]) + sampled == encode_scored(bare, DIALOGUE)
    assert ids[: len(encode_prompt(bare, DIALOGUE[:-1]))] == encode_prompt(bare, DIALOGUE[:-1])
    whole = bare.apply_chat_template(DIALOGUE, tokenize=True, return_dict=True)["input_ids"]
    assert whole[: len(ids)] != ids, "else this template shows nothing"


def test_tools_that_only_a_call_names_are_not_rendered(tokenizer: Any) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "description": "of a town"}}]
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [tools[0] | {"function": {"name": "weather", "arguments": {}}}],
    }
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% generation %}{{ m['content'] }}"
        "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }}{% endfor %}<|im_end|>{% endgeneration %}"
        "{% endfor %}"
    )
    with pytest.raises(CannotRenderError, match="leaves the tools out"):
        encode_scored(tokenizer, [message("user", "Rain?"), call], tools)


def test_a_template_of_ones_own(bare: Any, write: Callable[[str], Path]) -> None:
    bare.eos_token = "<|im_end|>"
    template = NEVER_STOPS.replace("{{ m['content'] }}{% endgeneration", "{{ m['content'] }}<|im_end|>{% endgeneration")
    install_template(bare, "mine.jinja", write(template))
    assert bare.chat_template == template


def test_a_vocabulary_without_the_turn_tokens_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>")
    with pytest.raises(UserError, match=r"chatml needs <\|im_start\|> and <\|im_end\|>, which this base's vocabulary"):
        install_template(plain, "chatml", Path())


def test_keep_without_a_template_and_an_unknown_name(bare: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="chat_template: keep, but the base has none"):
        install_template(bare, "keep", tmp_path)
    with pytest.raises(UserError, match="chat_template: chatlm is neither chatml, .* keep nor a file at"):
        install_template(bare, "chatlm", tmp_path)


@pytest.mark.parametrize("pad", ["<|im_end|>", "<|im_start|>", None])
def test_a_pad_that_dialogues_contain_is_replaced(bare: Any, pad: str | None) -> None:
    """As SmolLM2-Instruct comes: pad = eos = <|im_end|>."""
    bare.pad_token = pad
    install_template(bare, "chatml", Path())
    assert bare.pad_token == "<|pad|>"


def test_a_good_pad_is_kept(bare: Any) -> None:
    bare.pad_token = "<|endoftext|>"
    bare.eos_token, bare.bos_token = "<|im_end|>", "<|im_end|>"
    choose_pad(bare)
    assert bare.pad_token == "<|endoftext|>"


def test_no_token_to_pad_with_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>", bos_token="<s>")
    with pytest.raises(UserError, match="no special token to pad with"):
        choose_pad(plain)
