"""Formats: what a raw row's fields mean, detected where that is plain, and how they become our rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations
from typing import Any

from baton.data.faults import TOOLS, BadRow, Unusable
from baton.data.files import describe
from baton.data.judgement import by_winner, check_judged, judgement_of, part_ways
from baton.data.tools import read_tools
from baton.data.turns import (
    FROM_VALUE,
    NAME_TEXT,
    ROLE_CONTENT,
    Messages,
    is_transcript,
    optional_text,
    read_message,
    read_messages,
    read_speakers,
    read_transcript,
    say,
    text_field,
)

KINDS = ("text", "dialogue", "preference", "prompt")
# which kinds of rows a format can give; preferences serve dialogues by their chosen side
SERVES = {
    "text": ("text",),
    "lines": ("text", "prompt"),
    "messages": ("dialogue", "prompt"),
    "prompt_completion": ("dialogue", "prompt"),
    "alpaca": ("dialogue", "prompt"),
    "sharegpt": ("dialogue", "prompt"),
    "oasst": ("dialogue", "preference", "prompt"),
    "hh": ("dialogue", "preference", "prompt"),
    "preference": ("dialogue", "preference", "prompt"),
    "arena": ("dialogue", "preference", "prompt"),
    "prompts": ("prompt",),
}
FORMATS = tuple(SERVES)

# of more ranked replies to one prompt, so many, spread over the ranks, are paired: nine make 36 pairs, the most that
# the labellers of InstructGPT ranked (Ouyang et al. 2022, section 3.5); all of thirty would drown the other prompts
MAX_RANKED = 9

# Stanford Alpaca's two prompt templates, as datasets ship them inside the prompt
_ALPACA_TEMPLATE = re.compile(
    r"Below is an instruction that describes a task"
    r"(?:, paired with an input that provides further context)?\. "
    r"Write a response that appropriately completes the request\.\n\n"
    r"### Instruction:\n(?P<instruction>.*?)(?:\n\n### Input:\n(?P<input>.*?))?\n\n### Response:\n?",
    re.DOTALL,
)


def detect(row: dict) -> str | None:
    """The format that the row's fields make plain, or None."""
    fields = {name for name, value in row.items() if value is not None}
    if {"conversation_a", "conversation_b"} <= fields or {"response_a", "response_b"} <= fields:
        return "arena"
    if row.get("skipped") is True:
        return "preference"  # a file of the labelling page may well begin with such a line
    if {"chosen", "rejected"} <= fields:
        if isinstance(row["chosen"], str) and not fields & {
            "prompt",
            "question",
            "instruction",
            "conversations",
        }:
            return "hh" if is_transcript(row["chosen"]) else None
        return "preference"
    for name, otherwise in (
        ("messages", "messages"),
        ("conversations", "sharegpt"),
        ("utterances", "messages"),
    ):
        if isinstance(row.get(name), list):
            first = row[name][0] if row[name] else None
            if not isinstance(first, dict):
                return otherwise
            return "sharegpt" if set(FROM_VALUE) <= first.keys() else "messages"
    if isinstance(row.get("prompt"), dict):
        return "oasst"
    if "instruction" in fields and fields & {"output", "response"}:
        return "alpaca"
    if fields & {"prompt", "query"} and fields & {"response", "completion"}:
        return "prompt_completion"
    if fields & {"prompt", "turns", "question"} or {"query", "choices"} <= fields:
        return "prompts"
    return "text" if "text" in fields else None


def convert(row: dict, fmt: str, kind: str) -> list[dict]:
    """The normalised rows of `kind` in one raw row; only an OASST tree gives several.

    Raises BadRow where the row is not of the format, and Unusable where no row can be made of it. The rows
    are still to be checked by `turns.check_row`.
    """
    return _CONVERTERS[fmt](row, kind)


def _text(row: dict, kind: str) -> list[dict]:
    text = text_field(row, "text")
    if kind == "prompt":
        return [{"prompt": [say("user", text)], "columns": _others(row, "text")}]
    return [{"text": text}]


def _messages(row: dict, kind: str) -> list[dict]:
    name = next(
        (name for name in ("messages", "conversations", "utterances") if row.get(name) is not None),
        "messages",
    )
    value = row.get(name)
    if name not in row:
        raise BadRow(f"has no `messages`; its fields are {', '.join(row) or 'none'}")
    if name == "messages" and isinstance(value, list) and value and isinstance(value[0], str):
        return _of_dialogue(read_speakers(value, name), row, kind, name)
    pair = NAME_TEXT if name == "utterances" else ROLE_CONTENT
    return _of_dialogue(read_messages(value, name, pair), row, kind, name)


def _sharegpt(row: dict, kind: str) -> list[dict]:
    if row.get("conversations") is None:
        raise BadRow(f"has no `conversations`; its fields are {', '.join(row) or 'none'}")
    messages = _with_system(row, read_messages(row["conversations"], "conversations", FROM_VALUE))
    return _of_dialogue(messages, row, kind, "conversations", "system")


def _prompt_completion(row: dict, kind: str) -> list[dict]:
    name = next((name for name in ("prompt", "question", "query") if row.get(name) is not None), "prompt")
    prompt = _prompt(row, name)
    reply = next((name for name in ("response", "completion", "answer") if row.get(name) is not None), "completion")
    completion = _reply(row, reply)
    if kind == "prompt":
        return [{"prompt": prompt, "columns": _others(row, name, "system")}]
    return [_dialogue(prompt + completion, row)]


def _alpaca(row: dict, kind: str) -> list[dict]:
    prompt = _alpaca_prompt(row)
    output = text_field(row, "output", "response")
    if kind == "prompt":
        return [
            {
                "prompt": prompt,
                "columns": _others(row, "instruction", "input", "context", "history", "system"),
            }
        ]
    return [{"messages": [*prompt, say("assistant", output)]}]


def _hh(row: dict, kind: str) -> list[dict]:
    chosen, rejected = read_transcript(row, "chosen"), read_transcript(row, "rejected")
    if kind == "dialogue":
        return [{"messages": chosen}]
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("prompts differ")
    return _of_pair(chosen[:-1], chosen[-1:], rejected[-1:], kind, row, "chosen", "rejected")


def _preference(row: dict, kind: str) -> list[dict]:
    check_judged(row)
    chosen, rejected = _reply(row, "chosen"), _reply(row, "rejected")
    if row.get("conversations") is not None:
        pairs = (FROM_VALUE, ROLE_CONTENT)
        prompt = _with_system(row, read_messages(row["conversations"], "conversations", *pairs))
    elif row.get("instruction") is not None:
        prompt = _alpaca_prompt(row)
    elif any(row.get(name) is not None for name in ("prompt", "question")):
        prompt = _prompt(row, "prompt" if row.get("prompt") is not None else "question")
    elif isinstance(row["chosen"], list) and isinstance(row["rejected"], list):
        prompt = []
    else:
        raise BadRow(f"has no `prompt`; its fields are {', '.join(row)}")
    if any(side and side[0]["role"] != "assistant" for side in (chosen, rejected)):
        # whole dialogues on both sides (TRL's implicit prompt); a prompt field then repeats their beginning
        given = prompt
        prompt, chosen, rejected = part_ways(chosen, rejected)
        if given and not any(prompt[at : at + len(given)] == given for at in range(len(prompt))):
            raise Unusable("prompts differ")
    used = ("chosen", "rejected", "conversations", "instruction", "input", "context", "history", "prompt", "system")
    return _of_pair(prompt, chosen, rejected, kind, row, *used)


def _arena(row: dict, kind: str) -> list[dict]:
    """Two replies, or two whole dialogues in which the user says the same, and which of them won."""
    check_judged(row)
    whole = row.get("conversation_a") is not None
    sides = ("conversation_a", "conversation_b") if whole else ("response_a", "response_b")
    for side in sides:
        if row.get(side) is None:
            raise BadRow(f"has no `{side}`; its fields are {', '.join(row) or 'none'}")
    if whole:
        dialogues = [read_messages(row[side], side, ROLE_CONTENT, FROM_VALUE) for side in sides]
        prompt, *replies = part_ways(*(_first_turns(row, dialogue) for dialogue in dialogues))
        prompt = _with_system(row, prompt)
    else:
        name = next((name for name in ("prompt", "question", "query") if row.get(name) is not None), None)
        prompt = _alpaca_prompt(row) if name is None and row.get("instruction") else _prompt(row, name or "prompt")
        replies = [_reply(row, side) for side in sides]
    chosen, rejected = by_winner(row, *replies) if kind != "prompt" else replies
    return _of_pair(prompt, chosen, rejected, kind, row, *sides, "prompt", "question", "query", "system")


def _first_turns(row: dict, dialogue: Messages) -> Messages:
    """The dialogue up to the turn of the user's that the row's `turn` counts to: what came later was not judged."""
    turn = row.get("turn")
    if turn is None:
        return dialogue
    if isinstance(turn, bool) or not isinstance(turn, int) or turn < 1:
        raise BadRow(f"has {turn!r} as `turn`; expected how many of the user's turns were judged, 1 or more")
    asked = [at for at, message in enumerate(dialogue) if message["role"] == "user"]
    return dialogue[: asked[turn]] if turn < len(asked) else dialogue


def _oasst(row: dict, kind: str) -> list[dict]:
    """A message tree.

    Dialogue: one path, so that no turn is trained on twice: after a prompter the best-ranked reply, after an
    assistant the branch that goes on longest, cut after its last reply. Preference: at every prompter of the
    tree, each pair of replies with different ranks (of more than MAX_RANKED, of as many spread over the ranks), after
    the path that leads there; its `margin` is the distance of the two ranks in parts of the largest one there. Prompt:
    the root alone.
    Messages that were deleted or failed their review are left out, with what follows them.
    """
    root = row.get("prompt")
    if not isinstance(root, dict):
        flat = " Rows of single messages (`parent_id`) are not read: take the published trees." * ("parent_id" in row)
        raise BadRow(f"has {describe(root)} as `prompt`; expected a message tree {{text, role, replies}}.{flat}")
    tree = _node(root, "prompt")
    if not tree["usable"]:
        raise Unusable("deleted, or failed its review")
    if kind == "prompt":
        return [{"prompt": [tree["message"]], "columns": _others(row, "prompt")}]
    if kind == "dialogue":
        path = _best_path(tree)
        return [{"messages": path if path[-1]["role"] == "assistant" else path[:-1]}]
    pairs = _ranked_pairs(tree, [])
    if not pairs:
        raise Unusable("no replies of different ranks")
    return pairs


def _prompts(row: dict, kind: str) -> list[dict]:
    fields = ("prompt", "turns", "question", "query", "text")
    name = next((name for name in fields if row.get(name) is not None), None)
    if name is None:
        raise BadRow(f"has none of {', '.join(f'`{name}`' for name in fields)}; its fields are {', '.join(row)}")
    if name != "turns":
        return [{"prompt": _prompt(row, name), "columns": _others(row, name, "system")}]
    if not isinstance(row[name], list) or not all(isinstance(turn, str) for turn in row[name]):
        raise BadRow("has a `turns` that is no list of strings")
    # all turns stay in the columns: the later ones are asked after the first was answered
    return [
        {
            "prompt": _with_system(row, [say("user", turn) for turn in row[name][:1]]),
            "columns": _others(row, "system"),
        }
    ]


def _prompt(row: dict, name: str) -> Messages:
    """A prompt that is messages, an HH transcript, or any other string: one user turn."""
    if isinstance(row.get(name), list):
        return _with_system(row, read_messages(row[name], name, ROLE_CONTENT))
    text = text_field(row, name)
    if is_transcript(text):
        messages = read_transcript(row, name)
        # it ends with the marker of the turn to come
        return _with_system(row, messages if messages[-1]["content"] else messages[:-1])
    # left in, the template would sit inside the chat template's user turn, as if it were part of the question
    match = _ALPACA_TEMPLATE.fullmatch(text)
    return _with_system(row, [say("user", _joined(match["instruction"], match["input"] or "") if match else text)])


def _reply(row: dict, name: str) -> Messages:
    """A reply that is a string, a message, or messages."""
    if isinstance(row.get(name), list):
        return read_messages(row[name], name, ROLE_CONTENT, FROM_VALUE)
    if isinstance(row.get(name), dict):
        return [read_message(row[name], name, ROLE_CONTENT, FROM_VALUE)]
    return [say("assistant", text_field(row, name))]


def _alpaca_prompt(row: dict) -> Messages:
    history = row.get("history") or []
    messages: Messages = []
    for index, turn in enumerate(history if isinstance(history, list) else [history]):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise BadRow(f"has {describe(turn)} as `history[{index}]`; expected [question, answer]")
        messages += [say("user", turn[0]), say("assistant", turn[1])]
    content = _joined(text_field(row, "instruction"), optional_text(row, "input", "context"))
    return _with_system(row, [*messages, say("user", content)])


def _joined(instruction: str, given: str) -> str:
    return "\n\n".join(part for part in (instruction, given) if part.strip())


def _with_system(row: dict, messages: Messages) -> Messages:
    """Puts the row's `system` field, if it has one, in front of messages that bring no system message."""
    system = optional_text(row, "system")
    if not system.strip() or messages and messages[0]["role"] == "system":
        return messages
    return [say("system", system), *messages]


def _others(row: dict, *used: str) -> dict:
    return {name: value for name, value in row.items() if name not in used}


def _dialogue(messages: Messages, row: dict) -> dict:
    """A normalised dialogue, with the tools that it was held with where the row has them."""
    tools = read_tools(row)
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def _of_dialogue(messages: Messages, row: dict, kind: str, *used: str) -> list[dict]:
    if kind == "dialogue":
        return [_dialogue(messages, row)]
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    return [{"prompt": messages[:-1] if answered else messages, "columns": _others(row, *used)}]


def _of_pair(prompt: Messages, chosen: Messages, rejected: Messages, kind: str, row: dict, *used: str) -> list[dict]:
    if kind == "prompt":
        return [{"prompt": prompt, "columns": _others(row, *used)}]
    facts = judgement_of(row)
    if kind == "preference":
        if read_tools(row):
            raise Unusable(TOOLS)
        return [{"prompt": prompt, "chosen": chosen, "rejected": rejected, **facts}]
    if facts.get("is_tie"):
        raise Unusable("a tie: neither reply was chosen")
    return [_dialogue(prompt + chosen, row)]


def _node(node: Any, name: str) -> dict:
    """A node of a tree: its message, its rank, whether it is usable, and its usable replies."""
    message = read_message(node, name, ("role", "text"))
    rank, replies = node.get("rank"), node.get("replies", [])
    if rank is not None and not isinstance(rank, int):
        raise BadRow(f"has {describe(rank)} as `{name}.rank`; expected a whole number")
    if not isinstance(replies, list):
        raise BadRow(f"has {describe(replies)} as `{name}.replies`; expected a list")
    usable = not node.get("deleted") and node.get("review_result") is not False
    nodes = [_node(reply, f"{name}.replies[{index}]") for index, reply in enumerate(replies)]
    return {"message": message, "rank": rank, "usable": usable, "replies": [n for n in nodes if n["usable"]]}


def _best_path(node: dict) -> Messages:
    if not node["replies"]:
        return [node["message"]]
    if node["message"]["role"] == "user":
        # unranked replies come after ranked ones; among equals the first published
        best = min(node["replies"], key=lambda reply: float("inf") if reply["rank"] is None else reply["rank"])
        return [node["message"], *_best_path(best)]
    return [node["message"], *max((_best_path(reply) for reply in node["replies"]), key=len)]


def _ranked_pairs(node: dict, before: Messages) -> list[dict]:
    path = [*before, node["message"]]
    pairs: list[dict] = []
    if node["message"]["role"] == "user":
        ranked = sorted((reply for reply in node["replies"] if reply["rank"] is not None), key=lambda r: r["rank"])
        ranked = _spread(ranked)
        for better, worse in combinations(ranked, 2):
            if worse["rank"] != better["rank"]:
                # ranks are an order and no scores: the gap counts only beside the other gaps at this prompt
                margin = (worse["rank"] - better["rank"]) / (ranked[-1]["rank"] - ranked[0]["rank"])
                sides = {"chosen": [better["message"]], "rejected": [worse["message"]]}
                pairs.append({"prompt": path, **sides, "margin": margin})
    return pairs + [pair for reply in node["replies"] for pair in _ranked_pairs(reply, path)]


def _spread(ranked: list[dict]) -> list[dict]:
    """At most MAX_RANKED of the sorted replies: the best, the worst, and the others at even distances between."""
    last = len(ranked) - 1
    if last < MAX_RANKED:
        return ranked
    return [ranked[round(step * last / (MAX_RANKED - 1))] for step in range(MAX_RANKED)]


_CONVERTERS: dict[str, Callable[[dict, str], list[dict]]] = {
    "text": _text,
    "lines": _text,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "oasst": _oasst,
    "hh": _hh,
    "preference": _preference,
    "arena": _arena,
    "prompts": _prompts,
}
