"""Every format: rows as published, and exactly what becomes of them for each kind of stage."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from baton.data import FORMATS, load
from baton.data.formats import SERVES, detect
from baton.errors import UserError
from baton.recipe import Source

HUMAN, BOT = "\n\nHuman:", "\n\nAssistant:"


def system(content: str) -> dict:
    return {"role": "system", "content": content}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def rows_of(row: dict, folder: Path, kind: str, fmt: str | None = None) -> list[dict]:
    (folder / "a.jsonl").write_text(json.dumps(row) + "\n")
    return load(Source(path="a.jsonl", format=fmt), folder, kind).rows


def refusal(row: dict, folder: Path, kind: str, fmt: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(row, folder, kind, fmt)
    return str(caught.value)


TEMPLATE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName it.\n\n### Input:\nA red animal.\n\n### Response:\n"
)
SHORT_TEMPLATE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a bird.\n\n### Response:\n"
)
QA = [user("Who is red?"), assistant("The fox.")]

# (row as published, detected format, messages)
DIALOGUES: list[tuple[dict, str, list[dict]]] = [
    ({"id": 7, "messages": QA}, "messages", QA),
    ({"messages": [system("Be brief."), *QA]}, "messages", [system("Be brief."), *QA]),
    (
        {"topic": "狐", "messages": ["見た？", "見た。", "何色？", "赤。"]},
        "messages",
        [user("見た？"), assistant("見た。"), user("何色？"), assistant("赤。")],
    ),
    (
        {"utterances": [{"name": "user", "text": "何色？"}, {"name": "agent", "text": "赤。"}], "meta": {}},
        "messages",
        [user("何色？"), assistant("赤。")],
    ),
    ({"conversations": QA}, "messages", QA),
    ({"prompt": "Who is red?", "response": "The fox."}, "prompt_completion", QA),
    ({"prompt": "Who is red?", "completion": "The fox."}, "prompt_completion", QA),
    ({"prompt": QA[:1], "completion": QA[1:]}, "prompt_completion", QA),
    (
        {"prompt": SHORT_TEMPLATE, "response": "A crow."},
        "prompt_completion",
        [user("Name a bird."), assistant("A crow.")],
    ),
    (
        {"prompt": TEMPLATE, "response": "A fox."},
        "prompt_completion",
        [user("Name it.\n\nA red animal."), assistant("A fox.")],
    ),
    ({"instruction": "Who is red?", "input": "", "output": "The fox."}, "alpaca", QA),
    (
        {"instruction": "Who is red?", "input": "A fox, a crow.", "output": "The fox."},
        "alpaca",
        [user("Who is red?\n\nA fox, a crow."), assistant("The fox.")],
    ),
    (
        {
            "instruction": "Why?",
            "input": None,
            "output": "Rust.",
            "history": [["Who is red?", "The fox."]],
            "system": "S",
        },
        "alpaca",
        [system("S"), *QA, user("Why?"), assistant("Rust.")],
    ),
    (
        {"instruction": "Who?", "context": "A fox.", "response": "It."},
        "alpaca",
        [user("Who?\n\nA fox."), assistant("It.")],
    ),
    (
        {"conversations": [{"from": "human", "value": "Who is red?"}, {"from": "gpt", "value": "The fox."}]},
        "sharegpt",
        QA,
    ),
    (
        {"chosen": f"{HUMAN} Who is red?{BOT} The fox.", "rejected": f"{HUMAN} Who is red?{BOT} No idea."},
        "hh",
        QA,
    ),
    ({"prompt": "Who is red?", "chosen": "The fox.", "rejected": "No idea."}, "preference", QA),
]


@pytest.mark.parametrize(("row", "fmt", "messages"), DIALOGUES)
def test_dialogues(tmp_path: Path, row: dict, fmt: str, messages: list[dict]) -> None:
    assert detect(row) == fmt
    assert rows_of(row, tmp_path, "dialogue") == [{"messages": messages}]
    assert rows_of(row, tmp_path, "dialogue", fmt) == [{"messages": messages}]
    assert rows_of(row, tmp_path, "prompt")[0]["prompt"] == messages[:-1]


# (row as published, detected format, prompt, chosen, rejected)
PREFERENCES: list[tuple[dict, str, list[dict], str, str]] = [
    (
        {
            "chosen": f"{HUMAN} Hi{BOT} Hello.{HUMAN} Human: who?\nHumans: what?{BOT} The fox.",
            "rejected": f"{HUMAN} Hi{BOT} Hello.{HUMAN} Human: who?\nHumans: what?{BOT} You.\n\nSincerely",
        },
        "hh",
        [user("Hi"), assistant("Hello."), user("Human: who?\nHumans: what?")],
        "The fox.",
        "You.\n\nSincerely",
    ),
    (
        {
            "conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        "preference",
        [system("S"), user("Q")],
        "good",
        "bad",
    ),
    (
        {"instruction": "I", "input": "X", "output": "O", "rejected": "bad", "chosen": "good"},
        "preference",
        [user("I\n\nX")],
        "good",
        "bad",
    ),
    ({"prompt": "Q", "chosen": "good", "rejected": "bad"}, "preference", [user("Q")], "good", "bad"),
    (
        {"prompt": [system("S"), user("Q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        "preference",
        [system("S"), user("Q")],
        "good",
        "bad",
    ),
    (
        {"chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]},
        "preference",
        [user("Q")],
        "good",
        "bad",
    ),
    (
        {"prompt": "Q", "chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]},
        "preference",
        [user("Q")],
        "good",
        "bad",
    ),
    (
        {"system": "S", "question": "Q", "chosen": "good", "rejected": "bad"},
        "preference",
        [system("S"), user("Q")],
        "good",
        "bad",
    ),
    (
        {"prompt": f"{HUMAN} Q{BOT} A{HUMAN} And?{BOT}", "chosen": " good", "rejected": " bad"},
        "preference",
        [user("Q"), assistant("A"), user("And?")],
        " good",
        " bad",
    ),
]


@pytest.mark.parametrize(("row", "fmt", "prompt", "chosen", "rejected"), PREFERENCES)
def test_preferences(tmp_path: Path, row: dict, fmt: str, prompt: list[dict], chosen: str, rejected: str) -> None:
    assert detect(row) == fmt
    expected = [{"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}]
    assert rows_of(row, tmp_path, "preference") == expected
    assert rows_of(row, tmp_path, "preference", fmt) == expected
    assert rows_of(row, tmp_path, "prompt")[0]["prompt"] == prompt
    assert rows_of(row, tmp_path, "dialogue") == [{"messages": [*prompt, assistant(chosen)]}]


# (row as published, declared format or None, prompt, columns)
PROMPTS: list[tuple[dict, str | None, list[dict], dict[str, Any]]] = [
    ({"prompt": "Q", "level": 2}, None, [user("Q")], {"level": 2}),
    ({"prompt": [system("S"), user("Q")], "answer": "3"}, None, [system("S"), user("Q")], {"answer": "3"}),
    ({"prompt": SHORT_TEMPLATE}, None, [user("Name a bird.")], {}),
    (
        {"question_id": 81, "turns": ["First?", "Then?"]},
        None,
        [user("First?")],
        {"question_id": 81, "turns": ["First?", "Then?"]},
    ),
    ({"question": "2+1?", "answer": "#### 3"}, None, [user("2+1?")], {"answer": "#### 3"}),
    (
        {"choices": ["a", "b"], "query": "Which?", "gold": 1},
        None,
        [user("Which?")],
        {"choices": ["a", "b"], "gold": 1},
    ),
    ({"text": "Q", "id": 3}, "prompts", [user("Q")], {"id": 3}),
    ({"prompt": "Q", "response": "A", "id": 3}, None, [user("Q")], {"response": "A", "id": 3}),
    ({"instruction": "I", "input": "X", "output": "O"}, None, [user("I\n\nX")], {"output": "O"}),
    ({"messages": [*QA, user("And?")], "id": 3}, None, [*QA, user("And?")], {"id": 3}),
    ({"messages": QA[:1]}, None, QA[:1], {}),
    ({"instruction": "I", "output": "O", "chosen": "g", "rejected": "g"}, None, [user("I")], {"output": "O"}),
]


@pytest.mark.parametrize(("row", "fmt", "prompt", "columns"), PROMPTS)
def test_prompts(tmp_path: Path, row: dict, fmt: str | None, prompt: list[dict], columns: dict) -> None:
    assert rows_of(row, tmp_path, "prompt", fmt) == [{"prompt": prompt, "columns": columns}]


def test_question_and_answer_are_a_dialogue_if_declared(tmp_path: Path) -> None:
    row = {"question": "Who is red?", "answer": "The fox."}
    assert rows_of(row, tmp_path, "dialogue", "prompt_completion") == [{"messages": QA}]


def test_text_keeps_its_white_space_and_leaves_the_other_fields(tmp_path: Path) -> None:
    row = {"title": "T", "author": "A", "text": " 　A fox.\n"}
    assert rows_of(row, tmp_path, "text") == [{"text": " 　A fox.\n"}]


def node(text: str, *replies: dict, rank: int | None = None, **facts: bool) -> dict:
    """A tree's node whose role is set by `tree`."""
    return {"text": text, "rank": rank, "replies": list(replies), **facts}


def tree(root: dict) -> dict:
    def give_roles(item: dict, role: str) -> dict:
        other = "assistant" if role == "prompter" else "prompter"
        return {**item, "role": role, "replies": [give_roles(reply, other) for reply in item["replies"]]}

    return {"message_tree_id": "t1", "prompt": give_roles(root, "prompter")}


TREE = tree(
    node(
        "Q",
        node("worst", rank=2),
        node(
            "best",
            node("short", node("end")),
            node("long", node("second", rank=1), node("first", node("thanks"), rank=0), node("unranked")),
            rank=0,
        ),
        node("middle", node("other", node("o1", rank=1), node("o0", rank=0), node("o1b", rank=1)), rank=1),
        node("spam", rank=3, review_result=False),
        node("gone", rank=-1, deleted=True),
    )
)


def test_oasst_dialogue_is_the_best_ranked_path_up_to_its_last_reply(tmp_path: Path) -> None:
    path = [user("Q"), assistant("best"), user("long"), assistant("first")]
    assert rows_of(TREE, tmp_path, "dialogue") == [{"messages": path}]


def test_oasst_preferences_are_the_pairs_of_siblings_with_different_ranks(tmp_path: Path) -> None:
    rows = rows_of(TREE, tmp_path, "preference", "oasst")
    pairs = [(len(row["prompt"]), row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]
    assert sorted(pairs) == [
        (1, "best", "middle"),
        (1, "best", "worst"),
        (1, "middle", "worst"),
        (3, "first", "second"),
        (3, "o0", "o1"),
        (3, "o0", "o1b"),
    ]
    (other,) = (row for row in rows if row["rejected"][0]["content"] == "o1b")
    assert other["prompt"] == [user("Q"), assistant("middle"), user("other")]


def test_oasst_prompt_is_the_root(tmp_path: Path) -> None:
    assert rows_of(TREE, tmp_path, "prompt") == [{"prompt": [user("Q")], "columns": {"message_tree_id": "t1"}}]


def test_oasst_rows_without_a_tree(tmp_path: Path) -> None:
    flat = {"message_id": "m", "parent_id": None, "text": "Q", "role": "prompter"}
    message = refusal(flat, tmp_path, "prompt", "oasst")
    assert "a file in another format" in message and "published trees" in message
    assert "has a string as `prompt.rank`" in refusal(
        {"prompt": {"text": "Q", "role": "prompter", "rank": "0"}}, tmp_path, "dialogue"
    )


@pytest.mark.parametrize(
    ("kind", "fmt", "row", "fault"),
    [
        ("text", "text", {"text": 3}, "has a number as `text`"),
        ("text", "text", {"text": None}, "has no `text`"),
        ("dialogue", "messages", {"messages": "Hi"}, "has a string as `messages`"),
        ("dialogue", "messages", {"messages": None}, "has null as `messages`"),
        ("dialogue", "messages", {"messages": ["Hi", 3]}, "has a number as `messages[1]`"),
        ("dialogue", "messages", {"messages": [user("Hi"), "Hello"]}, "has a string as `messages[1]`"),
        ("dialogue", "messages", {"messages": [{"role": "user"}]}, "has the keys role in `messages[0]`"),
        (
            "dialogue",
            "messages",
            {"messages": [{"role": "user", "content": 3}]},
            "a number as `messages[0].content`",
        ),
        (
            "dialogue",
            "messages",
            {"messages": [{"role": "wizard", "content": ""}]},
            "'wizard' as `messages[0].role`",
        ),
        (
            "dialogue",
            "sharegpt",
            {"conversations": [{"from": 3, "value": ""}]},
            "3 as `conversations[0].from`",
        ),
        ("dialogue", "sharegpt", {"chat": []}, "has no `conversations`"),
        ("dialogue", "prompt_completion", {"prompt": "Q"}, "has no `completion`"),
        ("dialogue", "prompt_completion", {"prompt": 3, "completion": "x"}, "has a number as `prompt`"),
        ("dialogue", "alpaca", {"instruction": "I"}, "has no `output` or `response`"),
        (
            "dialogue",
            "alpaca",
            {"instruction": "I", "output": "O", "history": [["Q"]]},
            "a list as `history[0]`",
        ),
        ("preference", "hh", {"chosen": f"{HUMAN} Q{BOT} A"}, "has no `rejected`"),
        ("preference", "hh", {"chosen": "Q", "rejected": "R"}, "does not begin with 'Human:'"),
        ("preference", "preference", {"prompt": "Q", "chosen": "A"}, "has no `rejected`"),
        ("preference", "preference", {"chosen": "A", "rejected": "B"}, "has no `prompt`"),
        ("dialogue", "oasst", {"prompt": "Q"}, "has a string as `prompt`"),
        ("prompt", "prompts", {"turns": "Q"}, "no list of strings"),
        ("prompt", "prompts", {"id": 3}, "has none of `prompt`"),
    ],
)
def test_a_row_that_is_not_of_its_format(tmp_path: Path, kind: str, fmt: str, row: dict, fault: str) -> None:
    good = next(
        good
        for good in [{"text": "x"}, *(row for row, *_ in DIALOGUES + PREFERENCES + PROMPTS), TREE]
        if detect(good) == fmt
    )
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(good)}\n\n{json.dumps(row)}\n")
    with pytest.raises(UserError) as caught:
        load(Source(path="a.jsonl", format=fmt), tmp_path, kind)
    assert "a.jsonl line 3 " in str(caught.value) and fault in str(caught.value)


def test_flat_open_assistant_rows_are_explained(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(TREE) + "\n" + json.dumps({"text": "Q", "parent_id": "m"}) + "\n")
    with pytest.raises(UserError, match="take the published trees"):
        load(Source(path="a.jsonl", format="oasst"), tmp_path, "dialogue")


def test_every_format_gives_some_kind_and_recipes_know_no_others() -> None:
    assert all(SERVES[fmt] for fmt in FORMATS)
    declared = {name for part in get_args(Source.model_fields["format"].annotation) for name in get_args(part)}
    assert declared <= set(FORMATS)
