"""Every shipped template against hand-marked texts, against what families publish, and against its own beginning."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from baton.chat import encode_dialogue, encode_prompt, encode_scored, install_template, stop_ids
from baton.chat_templates import FAMILIES
from baton.errors import UserError
from baton.rendering import Unrenderable, render
from tests.baton.hand_marked import MASKS, family_tokenizer, read_marked, tokenised, with_own_tokens


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TALK = [
    say("system", "Be brief."),
    say("user", "Where does Ada live?"),
    say("assistant", "In Redcliff."),
    say("user", "And her craft?"),
    say("assistant", "She is a baker."),
]
LOOK_UP = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Where a person lives",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
}


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "a1b2c3d4e", "type": "function", "function": {"name": "look_up", "arguments": arguments}}


TOOL_USE = [
    say("system", "Be brief."),
    say("user", "Where does Zoë live?"),
    say("assistant", "", tool_calls=[call({"name": "Zoë", "exact": True})]),
    say("tool", "Redcliff", tool_call_id="a1b2c3d4e"),
    say("assistant", "In Redcliff."),
]
THOUGHT = [say("user", "Where?"), say("assistant", "In Redcliff.", reasoning_content="\nRivers, so Redcliff.\n")]
DIALOGUES: dict[str, tuple[list[dict[str, Any]], list[Any] | None]] = {
    "talk": (TALK, None),
    "bare": (TALK[1:], None),
    "tools": (TOOL_USE, [LOOK_UP]),
    "thought": (THOUGHT, None),
}
MARKED = sorted(path.stem for path in MASKS.glob("*.txt"))
NAMES = [*FAMILIES, "mistral_v3", "plain"]


def installed(name: str) -> Any:
    tokenizer = family_tokenizer(name)
    install_template(tokenizer, "mistral" if name == "mistral_v3" else name, Path())
    return tokenizer


def unmarked(template: str) -> str:
    return template.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")


def dialogues_of(name: str) -> list[tuple[list[dict[str, Any]], list[Any] | None]]:
    return [DIALOGUES[case] for case in DIALOGUES if case != "tools" or name not in ("gemma", "plain")]


def test_every_template_has_hand_marked_texts() -> None:
    assert {name.rsplit("-", 1)[0] for name in MARKED} == set(NAMES)
    assert {(name, "talk") for name in NAMES} <= {tuple(name.rsplit("-", 1)) for name in MARKED}


@pytest.mark.parametrize("marked", MARKED)
def test_text_tokens_and_mask_are_the_hand_marked_ones(marked: str) -> None:
    name, case = marked.rsplit("-", 1)
    tokenizer = installed(name)
    messages, tools = DIALOGUES[case]
    stretches = read_marked(MASKS / f"{marked}.txt")
    rendered = render(tokenizer, messages, tools)
    assert rendered.text == "".join(text for text, _ in stretches)
    assert [rendered.text[first:last] for first, last in rendered.said] == [text for text, said in stretches if said]
    ids, is_said = encode_dialogue(tokenizer, messages, tools)
    assert (ids, is_said) == tokenised(tokenizer, stretches)
    # each turn of the assistant ends with a stop that is trained, and no other stop is
    stops = [at for at, token in enumerate(ids) if token in stop_ids(tokenizer) and is_said[at]]
    assert len(stops) == sum(message["role"] == "assistant" for message in messages)
    assert all(at + 1 == len(ids) or not is_said[at + 1] for at in stops)


@pytest.mark.parametrize("marked", MARKED)
def test_arguments_may_be_a_json_string_and_the_mask_is_found_without_markers(marked: str) -> None:
    name, case = marked.rsplit("-", 1)
    tokenizer = installed(name)
    messages, tools = DIALOGUES[case]
    expected = encode_dialogue(tokenizer, messages, tools)
    if case == "tools":
        written = [messages[0], messages[1], {**messages[2], "tool_calls": [call('{"name": "Zoë", "exact": true}')]}]
        assert encode_dialogue(tokenizer, [*written, *messages[3:]], tools) == expected
    tokenizer.chat_template = unmarked(tokenizer.chat_template)
    assert encode_dialogue(tokenizer, messages, tools) == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_goes_on_as_the_dialogue_does(name: str) -> None:
    """In text, and in ids: a prompt's followed by a reply's are those that a reward model reads."""
    tokenizer = installed(name)
    for messages, tools in dialogues_of(name):
        for at, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            whole = render(tokenizer, messages, tools)
            opened = render(tokenizer, messages[:at], tools, opened=True).text
            assert whole.text.startswith(opened)
            until = render(tokenizer, messages[: at + 1], tools)
            reply = until.text[len(opened) : until.said[-1][1]]
            sampled = tokenizer(reply, add_special_tokens=False)["input_ids"]
            assert sampled[-1] in stop_ids(tokenizer)
            scored = encode_scored(tokenizer, messages[: at + 1], tools)
            assert encode_prompt(tokenizer, messages[:at], tools) + sampled == scored


@pytest.mark.parametrize(
    ("name", "reply"), product(["chatml", "mistral", "plain"], ["\n\nnew", " space", "\n", " \n a"])
)
def test_a_reply_that_begins_with_white_space_is_not_merged_with_the_header(name: str, reply: str) -> None:
    """Line breaks are one token as a pair: tokenised as a whole, the header would lose its own."""
    tokenizer = installed(name)
    prompt = [say("user", "Who?")]
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    rendered = render(tokenizer, [*prompt, say("assistant", reply)])
    said = rendered.text[slice(*rendered.said[0])]
    sampled = tokenizer(said, add_special_tokens=False)["input_ids"]
    ids, is_said = encode_dialogue(tokenizer, [*prompt, say("assistant", reply)])
    assert [token for token, flag in zip(ids, is_said, strict=True) if flag] == sampled
    assert encode_scored(tokenizer, [*prompt, say("assistant", reply)]) == encode_prompt(tokenizer, prompt) + sampled


PUBLISHED = {"chatml": "qwen3_instruct_2507", "qwen3": "qwen3_instruct_2507", "qwen2.5": "qwen2_5", "gemma": "gemma3"}
TWO_CALLS = [
    say("user", " Where? "),
    say("assistant", "One moment.", tool_calls=[call({"name": "Zoë"}), call({"name": "Ada", "exact": None})]),
    say("tool", "Red\ncliff"),
    say("tool", "Bern"),
    say("assistant", "Here.\n"),
]


@pytest.mark.parametrize("name", ["chatml", "qwen2.5", "qwen3", "llama3", "gemma"])
@pytest.mark.parametrize("opened", [False, True])
def test_a_dialogue_reads_as_the_family_publishes_it(name: str, opened: bool) -> None:
    """Against the families' templates as TRL keeps them."""
    trl = pytest.importorskip("trl")
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer = installed(name)
    cases = [(TALK, None), (TALK[1:], None)]
    cases += [(TOOL_USE, [LOOK_UP]), (TOOL_USE[1:], [LOOK_UP])] if name != "gemma" else []
    cases += [(TWO_CALLS, [LOOK_UP]), (TWO_CALLS, None)] if "llama" not in name and name != "gemma" else []
    for messages, tools in cases:
        # Llama 3.1 differs from 3 by a date in the system prompt; here only with tools
        file = PUBLISHED.get(name, "llama3_1" if tools else "llama3")
        path = Path(trl.__file__).parent / "chat_templates" / f"{file}.jinja"
        if not path.exists():
            pytest.skip(f"this TRL has no {path.name}")
        shown = messages[:-1] if opened else messages
        texts, _ = render_jinja_template(
            conversations=[shown],
            tools=tools,
            chat_template=path.read_text(encoding="utf-8"),
            add_generation_prompt=opened,
            **tokenizer.special_tokens_map,
        )
        assert render(tokenizer, shown, tools, opened).text == texts[0]


@pytest.mark.parametrize("name", ["gemma", "plain"])
def test_tools_are_refused_where_there_is_no_format_for_them(name: str) -> None:
    tokenizer = installed(name)
    with pytest.raises(Unrenderable, match="no format for tools"):
        render(tokenizer, TALK, [LOOK_UP])
    with pytest.raises(Unrenderable, match="no format for tools"):
        render(tokenizer, TOOL_USE)


def test_llama_makes_one_call_a_turn_and_keeps_what_is_said_before_it() -> None:
    tokenizer = installed("llama3")
    with pytest.raises(Unrenderable, match="one tool call a turn"):
        render(tokenizer, TWO_CALLS, [LOOK_UP])
    spoken = [TALK[1], say("assistant", "One moment.", tool_calls=[call({})]), TOOL_USE[3], TOOL_USE[4]]
    assert 'One moment.\n\n{"name": "look_up", "parameters": {}}<|eot_id|>' in render(tokenizer, spoken).text


def test_a_template_that_leaves_tools_out_is_refused() -> None:
    tokenizer = installed("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% generation %}{{ m['content'] }}<|im_end|>"
        "{% endgeneration %}\n{% endfor %}"
    )
    with pytest.raises(Unrenderable, match="leaves tool calls out"):
        render(tokenizer, TOOL_USE)
    with pytest.raises(Unrenderable, match="leaves the tools out"):
        render(tokenizer, TALK, [LOOK_UP])
    results = [say("user", "Q"), say("assistant", "look_up"), say("tool", "Redcliff"), say("assistant", "R")]
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ m['content'] }}", "{{ m['content'] if m['role'] != 'tool' else '' }}"
    )
    with pytest.raises(Unrenderable, match="leaves tool results out"):
        render(tokenizer, results)


@pytest.mark.parametrize(
    ("name", "begin", "stop", "stops"),
    [
        ("chatml", "<|endoftext|>", "<|im_end|>", ["<|im_end|>"]),
        ("llama3", "<|begin_of_text|>", "<|eot_id|>", ["<|eot_id|>", "<|eom_id|>"]),
        ("gemma", "<bos>", "<end_of_turn>", ["<end_of_turn>"]),
        ("mistral", "<s>", "</s>", ["</s>"]),
        ("plain", "<|endoftext|>", "<|endoftext|>", ["<|endoftext|>"]),
    ],
)
def test_begin_stop_and_pad(name: str, begin: str, stop: str, stops: list[str]) -> None:
    tokenizer = installed(name)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (begin, stop)
    assert tokenizer.convert_ids_to_tokens(stop_ids(tokenizer)) == stops
    assert tokenizer.pad_token not in tokenizer.chat_template and tokenizer.pad_token not in (begin, stop)


@pytest.mark.parametrize(
    ("tokens", "name"),
    [
        (["<|im_start|>", "<|im_end|>", "<|reserved_0|>", "<|reserved_1|>"], "chatml"),
        (["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "llama3"),
        (["<bos>", "<start_of_turn>", "<end_of_turn>"], "gemma"),
        (["[INST]", "[/INST]"], "mistral"),
        (["<|reserved_special_token_0|>"], "plain text"),
        ([], "plain text"),
    ],
)
def test_auto_takes_the_family_whose_tokens_the_vocabulary_has(tokens: list[str], name: str) -> None:
    tokenizer = with_own_tokens(*tokens)
    size = len(tokenizer)
    assert install_template(tokenizer, "auto", Path()).name == name
    assert len(tokenizer) == size
    ids, _ = encode_dialogue(tokenizer, TALK)
    assert max(ids) < size


@pytest.mark.parametrize(
    ("start", "end", "more"),
    [
        ("<|reserved_special_token_2|>", "<|reserved_special_token_10|>", "<|reserved_special_token_11|>"),
        ("<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>"),
        ("<unused0>", "<unused7>", "<unused10>"),
        ("[control_8]", "[control_9]", "[control_10]"),
        ("<SPECIAL_20>", "<SPECIAL_21>", "<SPECIAL_22>"),
    ],
)
@pytest.mark.parametrize("bos", [False, True])
def test_auto_writes_turns_in_reserved_tokens_without_resizing(start: str, end: str, more: str, bos: bool) -> None:
    tokenizer = with_own_tokens(end, more, start, bos=bos)
    size = len(tokenizer)
    choice = install_template(tokenizer, "auto", Path())
    assert choice.new_tokens == (start, end) and f"{start} and {end} in the place of" in choice.name
    assert len(tokenizer) == size and tokenizer.eos_token == end
    ids, is_said = encode_dialogue(tokenizer, TALK[1:3])
    # the base expects its begin of text exactly once where it puts one in front of every text
    begin = "<s>" if bos else ""
    assert tokenizer.decode(ids) == (
        f"{begin}{start}user\nWhere does Ada live?{end}\n{start}assistant\nIn Redcliff.{end}\n"
    )
    said = tokenizer.decode([token for token, flag in zip(ids, is_said, strict=True) if flag])
    assert said == f"In Redcliff.{end}"


def test_auto_keeps_a_template_that_the_base_brings() -> None:
    tokenizer = with_own_tokens("<|im_start|>", "<|im_end|>")
    own = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
    tokenizer.chat_template = own + "{% if add_generation_prompt %}assistant: {% endif %}"
    assert install_template(tokenizer, "auto", Path()).name == "the base's own"
    assert tokenizer.chat_template.startswith(own) and tokenizer.eos_token == "</s>"


def test_a_stop_of_its_own_that_is_not_the_bases_end_of_text() -> None:
    """Gemma's instruct models come with eos = <eos>, which their template never writes."""
    tokenizer = family_tokenizer("gemma")
    install_template(tokenizer, "gemma", Path())
    tokenizer.chat_template, tokenizer.eos_token = unmarked(tokenizer.chat_template), "<eos>"
    install_template(tokenizer, "keep", Path())
    assert tokenizer.eos_token == "<end_of_turn>"
    ids, is_said = encode_dialogue(tokenizer, TALK)
    assert (ids, is_said) == tokenised(tokenizer, read_marked(MASKS / "gemma-talk.txt"))


FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not loop.last %}"
    "{{ m['content'][:1] }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_an_unmarked_template_that_changes_earlier_turns_is_refused_with_the_difference() -> None:
    """As templates do that take the thoughts out of all turns but the last."""
    tokenizer = family_tokenizer("chatml")
    tokenizer.chat_template, tokenizer.eos_token = FORGETS, "<|im_end|>"
    messages = [say("user", "a"), say("assistant", "bcd"), say("user", "e"), say("assistant", "f")]
    expected = (
        "not prefix-stable: the whole dialogue does not begin with its first 2 messages; at character 53 there is "
        "'<|im_end|>\\n<|im_start|>user\\ne<' instead of 'cd<|im_end|>\\n'"
    )
    with pytest.raises(Unrenderable) as caught:
        render(tokenizer, messages)
    assert expected in str(caught.value)
    opens_otherwise = FORGETS.replace("assistant\n{% endif", "assistant\n<think>{% endif").replace("[:1]", "")
    tokenizer.chat_template = opens_otherwise
    with pytest.raises(UserError, match="message 2 rendered does not begin with the opening of the assistant's turn"):
        install_template(tokenizer, "keep", Path())


def test_a_template_that_tells_the_date_tells_the_same_one_every_day() -> None:
    tokenizer = family_tokenizer("chatml")
    install_template(tokenizer, "chatml", Path())
    plain = render(tokenizer, TALK).text
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}:" + str(tokenizer.chat_template)
    assert render(tokenizer, TALK).text == "26 Jul 2024:" + plain


def test_a_sentencepiece_tokenizer_is_not_cut_into_pieces() -> None:
    """It puts a space in front of every text: pieces would hold spaces that the dialogue has not."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<pad>", "<s>", "</s>", "[INST]", "[/INST]"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    made.train_from_iterator(["Where does Ada live? In Redcliff. She is a baker. And her craft?\n a b"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    install_template(tokenizer, "mistral", Path())
    rendered = render(tokenizer, TALK[1:])
    assert rendered.text == (
        "<s>[INST] Where does Ada live?[/INST] In Redcliff.</s>[INST] And her craft?[/INST] She is a baker.</s>"
    )
    ids, is_said = encode_dialogue(tokenizer, TALK[1:])
    assert ids == tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
    said = tokenizer.convert_ids_to_tokens([token for token, flag in zip(ids, is_said, strict=True) if flag])
    assert "".join(said) == "▁In▁Redcliff.</s>▁She▁is▁a▁baker.</s>"


def test_what_is_said_of_the_choice() -> None:
    chosen = install_template(with_own_tokens("<unused0>", "<unused1>"), "auto", Path()).describe()
    assert chosen.startswith("chat template: ChatML with <unused0> and <unused1> in the place of <|im_start|>")
    assert "frozen embeddings may not tell them apart" in chosen
    assert install_template(family_tokenizer("chatml"), "qwen3", Path()).describe() == "chat template: qwen3"
