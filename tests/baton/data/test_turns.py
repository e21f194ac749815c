"""Messages as files write them, and the rows that are dropped because nothing can be learned from them."""

import json
from pathlib import Path

import pytest

from baton.data import load
from baton.data.turns import ROLE_CONTENT, ROLES, read_message
from baton.errors import UserError
from baton.recipe import Source

HUMAN, BOT = "\n\nHuman:", "\n\nAssistant:"


def system(content: str) -> dict:
    return {"role": "system", "content": content}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


QA = [user("Who is red?"), assistant("The fox.")]
ONE_RANKED = [{"role": "assistant", "text": "a", "rank": 0}, {"role": "assistant", "text": "b"}]
TREE = {"prompt": {"role": "prompter", "text": "Q", "replies": ONE_RANKED}}
GONE = {"prompt": {"role": "prompter", "text": "Q", "deleted": True}}


def rows_of(row: dict, folder: Path, kind: str) -> list[dict]:
    (folder / "a.jsonl").write_text(json.dumps(row) + "\n")
    return load(Source(path="a.jsonl"), folder, kind).rows


def test_tool_calls_are_kept_and_ids_are_not(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    messages = [
        {"role": "user", "content": "Look.", "id": "1"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "A fox.", "name": "look"},
        {"role": "tool", "content": "A crow.", "name": "look"},
        {"role": "assistant", "content": "A fox and a crow.", "tool_calls": None},
    ]
    (row,) = rows_of({"messages": messages}, tmp_path, "dialogue")
    assert row["messages"] == [
        user("Look."),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "A fox.", "name": "look"},
        {"role": "tool", "content": "A crow.", "name": "look"},
        assistant("A fox and a crow."),
    ]


@pytest.mark.parametrize(("role", "alias"), [(role, alias) for role, names in ROLES.items() for alias in names])
def test_role_names(role: str, alias: str) -> None:
    assert read_message({"role": alias.title(), "content": "x"}, "m", ROLE_CONTENT)["role"] == role


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("text", {"text": " \n"}, "empty text"),
        ("text", {"text": "half \ud83d a fox"}, "half a surrogate pair"),
        ("dialogue", {"messages": []}, "no assistant message"),
        ("dialogue", {"messages": QA[:1]}, "no assistant message"),
        ("dialogue", {"messages": [*QA, user("And?")]}, "ends with the user"),
        ("dialogue", {"messages": ["Hi", "Hello", "Bye"]}, "ends with the user"),
        ("dialogue", {"messages": [*QA, {"role": "tool", "content": "x"}]}, "ends with the tool"),
        ("dialogue", {"messages": [assistant("Hi"), *QA]}, "starts with the assistant"),
        ("dialogue", {"messages": [user("Hi"), *QA]}, "two user turns in a row"),
        ("dialogue", {"messages": [*QA, assistant("Yes.")]}, "two assistant turns in a row"),
        ("dialogue", {"messages": [*QA, system("S"), *QA]}, "a system message after the start"),
        ("dialogue", {"messages": [user(" "), assistant("x")]}, "empty turn"),
        ("dialogue", {"messages": [user("half \ud83d"), assistant("x")]}, "half a surrogate pair"),
        ("dialogue", {"prompt": "Q", "response": ""}, "empty turn"),
        ("prompt", {"messages": [assistant("Hi")]}, "no user turn to answer"),
        ("prompt", {"prompt": " "}, "empty turn"),
        ("prompt", {"turns": []}, "no user turn to answer"),
        ("prompt", {"prompt": QA}, "no user turn to answer"),
        ("preference", {"prompt": "Q", "chosen": "same", "rejected": "same "}, "chosen equals rejected"),
        ("preference", {"prompt": "Q", "chosen": " ", "rejected": "bad"}, "empty reply"),
        ("preference", {"prompt": "Q", "chosen": "", "rejected": ""}, "empty reply"),
        (
            "preference",
            {"prompt": "Q", "chosen": "good", "rejected": [assistant(""), user("R"), assistant("bad")]},
            "empty reply",
        ),
        ("preference", {"prompt": "", "chosen": "good", "rejected": "bad"}, "empty turn"),
        (
            "preference",
            {"prompt": "Q", "chosen": [], "rejected": "bad"},
            "a reply that is not the assistant's",
        ),
        (
            "preference",
            {"chosen": f"{HUMAN} Q{BOT} A", "rejected": f"{HUMAN} Q{BOT} A{BOT} B"},
            "prompts differ",
        ),
        ("preference", {"chosen": f"{HUMAN} Q", "rejected": f"{HUMAN} R"}, "no user turn to answer"),
        (
            "preference",
            {"prompt": "P", "chosen": [user("Q"), assistant("a")], "rejected": [user("Q"), assistant("b")]},
            "prompts differ",
        ),
        ("preference", TREE, "no replies of different ranks"),
        ("prompt", GONE, "deleted, or failed its review"),
    ],
)
def test_unusable_rows_are_dropped_with_the_reason(tmp_path: Path, kind: str, row: dict, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        rows_of(row, tmp_path, kind)
    assert f"1 × {reason}" in str(caught.value)


def test_an_empty_rejected_reply_is_a_judgement_like_any_other(tmp_path: Path) -> None:
    (row,) = rows_of({"prompt": "Q", "chosen": "good", "rejected": ""}, tmp_path, "preference")
    assert row == {"prompt": [user("Q")], "chosen": [assistant("good")], "rejected": [assistant("")]}
    transcripts = {"chosen": f"{HUMAN} Q{BOT} good", "rejected": f"{HUMAN} Q{BOT}"}
    (row,) = rows_of(transcripts, tmp_path, "preference")
    assert row["rejected"] == [assistant("")]
