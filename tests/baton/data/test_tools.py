"""Tool calls and tools as files write them: what they become, and what is none."""

import json
from pathlib import Path
from typing import Any

import pytest

from baton.data import load
from baton.data.faults import Unusable
from baton.data.formats import convert
from baton.data.turns import check_row
from baton.errors import UserError
from baton.recipe import Source

WANTED = {"type": "function", "function": {"name": "look", "arguments": {"x": 1}}}
FUNCTION = {"name": "look", "parameters": {"type": "object"}}


def rows_of(row: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    (folder / "a.jsonl").write_text(json.dumps(row) + "\n")
    return load(Source(path="a.jsonl"), folder, "dialogue").rows


def with_call(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": None, **fields}]
    return {"messages": [*messages, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "A"}]}


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_calls": [WANTED]},
        {"tool_calls": [{"function": {"name": "look", "arguments": '{"x": 1}'}}]},
        {"tool_calls": [{"name": "look", "arguments": {"x": 1}}]},
        {"tool_calls": json.dumps([{"name": "look", "parameters": {"x": 1}}])},
        {"function_call": {"name": "look", "arguments": '{"x": 1}'}},
    ],
)
def test_calls_are_read_into_one_form(tmp_path: Path, fields: dict[str, Any]) -> None:
    (row,) = rows_of(with_call(**fields), tmp_path)
    assert row["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [WANTED]}


def test_ids_are_kept_and_no_arguments_are_an_empty_object(tmp_path: Path) -> None:
    (row,) = rows_of(with_call(tool_calls=[{"id": "7", "function": {"name": "look", "arguments": ""}}]), tmp_path)
    call = {"id": "7", "type": "function", "function": {"name": "look", "arguments": {}}}
    assert row["messages"][1]["tool_calls"] == [call]


@pytest.mark.parametrize("call", ["look", 3, {}, {"function": {"arguments": {}}}, {"name": 1}])
def test_what_is_no_call_is_an_error_with_its_place(tmp_path: Path, call: Any) -> None:
    with pytest.raises(UserError, match=r"line 1 .*as `messages\[1\].tool_calls\[0\]`; expected a call"):
        rows_of(with_call(tool_calls=[call]), tmp_path)


@pytest.mark.parametrize("arguments", ["x = 1", "[1]", 3])
def test_arguments_that_are_no_object_drop_the_dialogue(tmp_path: Path, arguments: Any) -> None:
    with pytest.raises(UserError, match="1 × a tool call whose arguments are no JSON object"):
        rows_of(with_call(tool_calls=[{"function": {"name": "look", "arguments": arguments}}]), tmp_path)


def sharegpt(call: str, **more: Any) -> dict[str, Any]:
    turns = [("human", "Q"), ("function_call", call), ("observation", "1"), ("gpt", "A")]
    return {"conversations": [{"from": who, "value": said} for who, said in turns], **more}


def test_a_sharegpt_call_may_be_several_or_none(tmp_path: Path) -> None:
    one = {"name": "look", "arguments": {"x": 1}}
    (row,) = rows_of(sharegpt(json.dumps([one, one])), tmp_path)
    assert row["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [WANTED, WANTED]}
    (row,) = rows_of(sharegpt("look(x=1)"), tmp_path)
    assert row["messages"][1] == {"role": "assistant", "content": "look(x=1)"}


@pytest.mark.parametrize(
    "tools",
    [
        [FUNCTION],
        [{"type": "function", "function": FUNCTION}],
        json.dumps([FUNCTION]),
        json.dumps(FUNCTION),
        [json.dumps(FUNCTION)],
    ],
)
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_are_read_into_one_form(tmp_path: Path, tools: Any, key: str) -> None:
    (row,) = rows_of({**with_call(tool_calls=[WANTED]), key: tools}, tmp_path)
    assert row["tools"] == [{"type": "function", "function": FUNCTION}]


@pytest.mark.parametrize("tools", [None, [], ""])
def test_no_tools(tmp_path: Path, tools: Any) -> None:
    (row,) = rows_of({**with_call(tool_calls=[WANTED]), "tools": tools}, tmp_path)
    assert "tools" not in row


@pytest.mark.parametrize("tools", [3, "look", [3], [{"function": {}}]])
def test_what_are_no_tools_is_an_error(tmp_path: Path, tools: Any) -> None:
    with pytest.raises(UserError, match="expected a (list of tools|tool)"):
        rows_of({**with_call(tool_calls=[WANTED]), "tools": tools}, tmp_path)


def test_parts_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    picture = [{"type": "image", "url": "a.png"}]
    with pytest.raises(UserError, match=r"a part that is no text as `messages\[0\].content\[0\]`"):
        rows_of({"messages": [{"role": "user", "content": picture}, {"role": "assistant", "content": "A"}]}, tmp_path)


def test_half_a_surrogate_pair_in_a_tool_drops_the_dialogue(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="half a surrogate pair"):
        rows_of({**with_call(tool_calls=[WANTED]), "tools": [{**FUNCTION, "description": "\ud83d"}]}, tmp_path)


def test_pairs_and_prompts_with_tools_are_left_out_and_dialogues_are_not() -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    pair = {"prompt": "Rain?", "chosen": "Yes.", "rejected": "No.", "tools": tools}
    with pytest.raises(Unusable, match="tools"):
        convert(pair, "preference", "preference")
    assert convert(pair, "preference", "dialogue")[0]["tools"] == tools
    (prompt,) = convert({"prompt": "Rain?", "tools": tools}, "prompts", "prompt")
    with pytest.raises(Unusable, match="tools"):
        check_row(prompt, "prompt")


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_a_message_that_is_to_be_left_out_of_the_loss_leaves_its_row_out(mark: dict[str, Any]) -> None:
    said = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "No."} | mark]
    with pytest.raises(Unusable, match="left out of the loss"):
        convert({"messages": said}, "messages", "dialogue")
    said[1] |= {"weight": 1, "train": True}
    assert convert({"messages": said}, "messages", "dialogue")
