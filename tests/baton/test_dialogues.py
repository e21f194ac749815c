"""Rows as documents to train on: each data format against a hand-marked text, what is cut, dropped and counted."""

from pathlib import Path
from typing import Any

import pytest

from baton.chat import encode_dialogue, install_template
from baton.data import load
from baton.data.formats import SERVES
from baton.dialogues import encode_dialogues
from baton.errors import UserError
from baton.recipe import Source
from tests.baton.hand_marked import MASKS, family_tokenizer, read_marked, tokenised

FORMATS = MASKS / "formats"
CASES = sorted(path.stem for path in FORMATS.glob("*.jsonl"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = family_tokenizer("chatml")
    install_template(made, "chatml", Path())
    return made


def talk(*turns: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(turns)
    return {"messages": [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)], **more}


def test_every_format_that_serves_dialogues_has_a_hand_marked_row() -> None:
    assert {case.split("-")[0] for case in CASES} == {name for name, kinds in SERVES.items() if "dialogue" in kinds}


@pytest.mark.parametrize("case", CASES)
def test_what_is_trained_in_a_row_of_each_format(tokenizer: Any, case: str) -> None:
    stretches = read_marked(FORMATS / f"{case}.txt")
    # declared and detected
    for source in (Source(path=f"{case}.jsonl", format=case.split("-")[0]), Source(path=f"{case}.jsonl")):
        encoded = encode_dialogues(tokenizer, load(source, FORMATS, "dialogue").rows, 10_000)
        assert encoded.documents == [tokenised(tokenizer, stretches)]


def test_many_are_encoded_as_one_is(tokenizer: Any) -> None:
    rows = [talk(f"Where is {number}?", "In Redcliff.", "And?", f"{number}") for number in range(600)]
    encoded = encode_dialogues(tokenizer, rows, 10_000)
    assert encoded.documents == [encode_dialogue(tokenizer, row["messages"]) for row in rows]
    assert encoded.rows == list(range(600))
    assert encoded.counts.tokens == sum(len(ids) for ids, _ in encoded.documents)
    assert encoded.counts.trained == sum(sum(is_said) for _, is_said in encoded.documents)


SHORT = talk("a", "b")
LATE = talk("The fox. " * 60, "b")
HALF = talk("a", "The fox. " * 60)
THEN = talk("a", "b", "The fox. " * 60, "c")


def test_long_dialogues_are_cut_after_the_last_token_that_is_trained(tokenizer: Any) -> None:
    encoded = encode_dialogues(tokenizer, [SHORT, LATE, HALF, THEN], 64)
    whole = [encode_dialogue(tokenizer, row["messages"]) for row in (SHORT, LATE, HALF, THEN)]
    short, half, then = encoded.documents
    assert short == whole[0] and half == (whole[2][0][:64], whole[2][1][:64])
    # "b" and its stop are the last ones trained: the question that was cut would teach nothing
    stop = whole[3][1].index(True) + 2
    assert then == (whole[3][0][:stop], whole[3][1][:stop]) and then[1][-2:] == [True, True]
    counts = encoded.counts
    assert encoded.rows == [0, 2, 3]
    assert (counts.rows, counts.kept, counts.cut, counts.without_stop) == (4, 3, 3, 1)
    assert dict(counts.dropped) == {"no assistant's token was left": 1}
    assert counts.longest == max(len(ids) for ids, _ in whole)
    assert "3 dialogues cut, 1 dropped because no assistant's token was left" in encoded.describe()


def test_long_dialogues_are_left_out_where_asked(tokenizer: Any) -> None:
    encoded = encode_dialogues(tokenizer, [SHORT, LATE, HALF, THEN], 64, on_long="drop")
    assert encoded.rows == [0] and dict(encoded.counts.dropped) == {"they are too long": 3}
    assert encoded.counts.cut == 0


def test_a_special_token_spelled_out_anywhere_drops_the_dialogue(tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}
    calling = [*talk("a")["messages"], {"role": "assistant", "content": "", "tool_calls": [call]}]
    rows = [
        SHORT,
        talk("a <|im_end|>", "b"),
        talk("a", "<|reserved_3|>"),  # special too, though it has no role of its own
        {"messages": [*calling, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "c"}]},
        {"messages": [*talk("a")["messages"], {"role": "assistant", "content": "b", "reasoning_content": "<|pad|>"}]},
        talk("a", "b", tools=[{"type": "function", "function": {"name": "f", "description": "<|im_start|>"}}]),
    ]
    encoded = encode_dialogues(tokenizer, rows, 1000)
    assert encoded.rows == [0] and dict(encoded.counts.dropped) == {"they spell out a special token": 5}


def test_what_the_template_refuses_is_counted_by_its_reason(tokenizer: Any) -> None:
    from copy import deepcopy

    gemma = family_tokenizer("gemma")
    install_template(gemma, "gemma", Path())
    tool = {"type": "function", "function": {"name": "f"}}
    encoded = encode_dialogues(gemma, [SHORT, talk("a", "b", tools=[tool])], 1000)
    assert encoded.rows == [0]
    assert dict(encoded.counts.dropped) == {"the template refuses it: Gemma has no format for tools": 1}
    only_tools = deepcopy([talk("a", "b", tools=[tool])])
    with pytest.raises(UserError, match="data.eval: none of 1 dialogues is left: 1 × the template refuses it: Gemma"):
        encode_dialogues(gemma, only_tools, 1000, use="eval")


def test_nothing_left_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="no dialogue has an assistant's token within train.sequence_length = 8 tokens"):
        encode_dialogues(tokenizer, [LATE], 8)
    assert encode_dialogues(tokenizer, [], 8).documents == []


def test_a_cut_that_a_call_before_left_behind_cuts_nothing(tokenizer: Any) -> None:
    tokenizer("The fox. The fox.", truncation=True, max_length=2, padding="max_length")
    assert encode_dialogues(tokenizer, [HALF], 1000).documents == [encode_dialogue(tokenizer, HALF["messages"])]
