"""Turns: a dialogue's messages, read however a file writes them, and what makes a row unusable."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from baton.data.faults import TOOLS, BadRow, Unusable
from baton.data.files import describe
from baton.data.tools import read_calls

Messages = list[dict[str, Any]]

ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "agent", "bot", "model", "chatgpt", "function_call"),
    "tool": ("tool", "observation", "function_response", "function"),
}
_ROLE_OF = {alias: role for role, aliases in ROLES.items() for alias in aliases}
# what chat templates read beside role and content; anything else (ids, ratings) would only widen the rows
_KEPT = ("name", "tool_call_id", "reasoning_content")
ROLE_CONTENT, FROM_VALUE, NAME_TEXT = ("role", "content"), ("from", "value"), ("name", "text")
# the marker starts a paragraph: "Human:" in the middle of a line is text
_MARKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_SURROGATE = re.compile("[\ud800-\udfff]")


def text_field(row: dict, *names: str) -> str:
    """The first of the fields `names` that the row has. Raises BadRow if it has none, or no string there."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise BadRow(f"has no {' or '.join(f'`{name}`' for name in names)}; its fields are {', '.join(row) or 'none'}")
    if not isinstance(row[name], str):
        raise BadRow(f"has {describe(row[name])} as `{name}`; expected a string")
    return row[name]


def optional_text(row: dict, *names: str) -> str:
    """As `text_field`, but the empty string where the row has none of the fields."""
    return text_field(row, *names) if any(row.get(name) is not None for name in names) else ""


def say(role: str, content: str) -> dict[str, Any]:
    """One message."""
    return {"role": role, "content": content}


def read_messages(value: Any, name: str, *pairs: tuple[str, str]) -> Messages:
    """A list of messages, each an object with one of the key `pairs`. Raises BadRow with `name` and index."""
    if not isinstance(value, list):
        raise BadRow(f"has {describe(value)} as `{name}`; expected a list of messages")
    return [read_message(message, f"{name}[{index}]", *pairs) for index, message in enumerate(value)]


def read_message(message: Any, name: str, *pairs: tuple[str, str]) -> dict[str, Any]:
    """One message in our keys; unknown roles and contents that are no strings raise BadRow."""
    expected = " or ".join(f"{{{', '.join(pair)}}}" for pair in pairs)
    if not isinstance(message, dict):
        raise BadRow(f"has {describe(message)} as `{name}`; expected an object {expected}")
    pair = next((pair for pair in pairs if pair[0] in message and pair[1] in message), None)
    if pair is None:
        raise BadRow(f"has the keys {', '.join(message) or 'none'} in `{name}`; expected {expected}")
    role, content = message[pair[0]], message[pair[1]]
    if not isinstance(role, str) or role.lower() not in _ROLE_OF:
        raise BadRow(f"has {role!r} as `{name}.{pair[0]}`; known are {', '.join(_ROLE_OF)}")
    if message.get("train") is False or message.get("weight") == 0:
        raise Unusable("a message that is marked to be left out of the loss; every assistant turn is trained here")
    extras = {key: message[key] for key in _KEPT if key not in pair and message.get(key) is not None}
    if calls := read_calls(message, role.lower(), content, name):
        extras["tool_calls"] = calls
        if content is None or role.lower() == "function_call":
            content = ""
    if isinstance(content, list):
        content = _joined_parts(content, f"{name}.{pair[1]}")
    if not isinstance(content, str):
        raise BadRow(f"has {describe(content)} as `{name}.{pair[1]}`; expected a string")
    return {**say(_ROLE_OF[role.lower()], content), **extras}


def _joined_parts(parts: list, name: str) -> str:
    """Content that is written as a list of text parts."""
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise BadRow(f"has a part that is no text as `{name}[{index}]`; expected {{type: text, text}}")
    return "".join(text for text in texts if text is not None)


def read_speakers(value: list, name: str) -> Messages:
    """A list of strings, spoken in turn: the user begins."""
    for index, content in enumerate(value):
        if not isinstance(content, str):
            raise BadRow(f"has {describe(content)} as `{name}[{index}]`; expected a string, as in `{name}[0]`")
    return [say("assistant" if index % 2 else "user", content) for index, content in enumerate(value)]


def is_transcript(text: object) -> bool:
    """Whether a text begins as an HH transcript does."""
    return isinstance(text, str) and _MARKER.match(text) is not None


def read_transcript(row: dict, name: str) -> Messages:
    """An HH transcript's turns. The white space around them is the markers'. Raises BadRow if it is none."""
    text = text_field(row, name)
    if not is_transcript(text):
        raise BadRow(f"has a `{name}` that does not begin with 'Human:'; expected an HH transcript")
    parts = _MARKER.split(text)[1:]
    return [say(_ROLE_OF[who.lower()], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]


def check_row(row: dict, kind: str) -> None:
    """Raises Unusable, with the reason, for a normalised row of `kind` that a stage could not train on."""
    sides = ("messages", "prompt", "chosen", "rejected")
    texts = [text for side in sides for message in row.get(side, ()) for text in _texts(message)]
    if any(_SURROGATE.search(text) for text in [*texts, *_texts(row.get("tools")), row.get("text", "")]):
        raise Unusable("half a surrogate pair, which no tokenizer reads")
    if kind == "text":
        if not row["text"].strip():
            raise Unusable("empty text")
    elif kind == "dialogue":
        _check_dialogue(row["messages"])
    else:
        _check_prompt(row["prompt"])
        if row.get("columns", {}).get("tools"):
            raise Unusable(TOOLS)
        if kind == "preference":
            _check_replies(row)


def _check_dialogue(messages: Messages) -> None:
    if not any(message["role"] == "assistant" for message in messages):
        raise Unusable("no assistant message")
    if messages[-1]["role"] != "assistant":
        raise Unusable(f"ends with the {messages[-1]['role']}")
    _check_turns(messages)


def _check_prompt(prompt: Messages) -> None:
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise Unusable("no user turn to answer")
    _check_turns(prompt)


def _check_replies(row: dict) -> None:
    for side in ("chosen", "rejected"):
        reply = row[side]
        if not reply or {reply[0]["role"], reply[-1]["role"]} != {"assistant"}:
            raise Unusable("a reply that is not the assistant's")
        if side == "rejected" and len(reply) == 1 and _is_empty(reply[0]):
            continue  # that no answer is worse than the chosen one is a judgement like any other
        if any(_is_empty(message) for message in reply):
            raise Unusable("empty reply")
        _check_turns(row["prompt"] + reply)
    if [_stripped(message) for message in row["chosen"]] == [_stripped(message) for message in row["rejected"]]:
        raise Unusable("chosen equals rejected")


def _check_turns(messages: Messages) -> None:
    """What common chat templates refuse or render as something that was never said."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if turns[0]["role"] != "user":
        raise Unusable(f"starts with the {turns[0]['role']}")
    if any(message["role"] == "system" for message in turns):
        raise Unusable("a system message after the start")
    for message, following in pairwise(turns):
        if message["role"] == following["role"] != "tool":
            raise Unusable(f"two {message['role']} turns in a row")
    if any(_is_empty(message) for message in messages):
        raise Unusable("empty turn")


def _texts(value: Any) -> list[str]:
    """All strings in a message or another value of nested lists and objects, names included."""
    if isinstance(value, dict):
        return [text for part in [*value, *value.values()] for text in _texts(part)]
    if isinstance(value, list):
        return [text for part in value for text in _texts(part)]
    return [value] if isinstance(value, str) else []


def _is_empty(message: dict) -> bool:
    return not message["content"].strip() and not message.get("tool_calls")


def _stripped(message: dict) -> dict:
    return {**message, "content": message["content"].strip()}
