"""Pairs to judge, read from every kind of file that holds such."""

import json
from pathlib import Path
from typing import Any

import pytest

from baton.errors import UserError
from reward.labelling.questions import Asked, Question, read_questions
from tests.reward.labelling.conftest import say


def read(folder: Path, *rows: Any, file_format: str | None = None, name: str = "pairs.jsonl") -> Asked:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_questions(str(path), file_format)


def texts(question: Question) -> tuple[str, str]:
    return question.a.messages[0]["content"], question.b.messages[0]["content"]


def replies(*texts: str, **more: Any) -> list[dict[str, Any]]:
    return [{"model": f"team/m:{n}", "digest": f"sha256:{n}", "text": text, **more} for n, text in enumerate(texts, 1)]


PROMPT = [say("be brief", "system"), say("one?", "user"), say("1"), say("two?", "user")]


def test_rollouts(tmp_path: Path) -> None:
    row = {"pair": "x-1", "prompt": PROMPT, "replies": replies("2", "II", ended=True)}
    cut = {"pair": "x-2", "prompt": [say("three?", "user")], "replies": replies("3", "three", ended=False)}
    asked = read(tmp_path, row, cut)
    first, second = asked.questions
    assert (first.id, first.prompt, texts(first)) == ("x-1", PROMPT, ("2", "II"))
    assert (first.a.model, first.b.model, first.b.digest) == ("team/m:1", "team/m:2", "sha256:2")
    assert not first.a.is_cut_off and second.a.is_cut_off
    assert asked.left_out == {}


def test_of_more_than_two_replies_each_two(tmp_path: Path) -> None:
    asked = read(tmp_path, {"pair": "x", "prompt": "one?", "replies": replies("1", "I", "1", "uno")})
    assert {question.id: texts(question) for question in asked.questions} == {
        "x/0-1": ("1", "I"),
        "x/0-3": ("1", "uno"),
        "x/1-2": ("I", "1"),
        "x/1-3": ("I", "uno"),
        "x/2-3": ("1", "uno"),
    }
    assert asked.left_out == {"both replies are the same": 1}


def test_two_responses(tmp_path: Path) -> None:
    asked = read(tmp_path, {"prompt": "one?", "response_a": "1", "response_b": "I", "winner": "model_a"})
    (found,) = asked.questions
    assert (found.prompt, texts(found), found.a.model) == ([say("one?", "user")], ("1", "I"), None)
    assert len(found.id) == 16


def test_preferences_do_not_give_away_what_was_chosen(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "chosen": "good", "rejected": "bad"} for n in range(3)]
    rows.append({"prompt": "4?", "chosen": "bad", "rejected": "good"})
    assert {texts(question) for question in read(tmp_path, *rows).questions} == {("bad", "good")}
    both_ways = read(tmp_path, rows[0], {**rows[0], "chosen": "bad", "rejected": "good"})
    assert len(both_ways.questions) == 1 and both_ways.left_out == {"the same pair again": 1}
    transcript = "\n\nHuman: one?\n\nAssistant: "
    (found,) = read(tmp_path, {"chosen": transcript + "1", "rejected": transcript + "I"}).questions
    assert (found.prompt, texts(found)) == ([say("one?", "user")], ("1", "I"))


def test_what_nobody_can_judge_is_left_out_and_counted(tmp_path: Path) -> None:
    asked = read(
        tmp_path,
        {"pair": "1", "prompt": "?", "replies": replies("a", "")},  # an empty reply can be judged
        {"pair": "2", "prompt": "?", "replies": replies("a", "a ")},
        {"pair": "3", "prompt": "?", "replies": replies(" ", "")},
        {"pair": "4", "prompt": "?", "replies": replies("a", "b\ud800")},
        {"pair": "5", "prompt": "?", "replies": replies("a")},
        {"pair": "6", "prompt": " ", "replies": replies("a", "b")},
        {"pair": "1", "prompt": "?", "replies": replies("a", "")},
    )
    assert [question.id for question in asked.questions] == ["1"]
    assert asked.left_out == {
        "both replies are the same": 2,
        "half a surrogate pair, which no tokenizer reads": 1,
        "1 replies, and two are needed": 1,
        "empty turn": 1,
        "the same pair again": 1,
    }


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "is empty"),
        ([{"pair": 1.5, "prompt": "?", "replies": replies("a", "b")}], "line 1 has a number as `pair`"),
        ([{"pair": "1", "prompt": "?", "replies": [1, 2]}], r"has a number as `replies\[0\]`"),
        ([{"pair": "1", "prompt": "?", "replies": [{"text": "a", "model": 1}]}], r"`replies\[0\].model`"),
        ([{"pair": "1", "replies": replies("a", "b")}], "has none of `prompt`"),
        ([{"prompt": "?", "response_a": "a"}], "has null as `response_b`"),
        ([{"pair": "1", "prompt": "?", "replies": replies("a", "a")}], "no pair that can be judged"),
        ([{"replies": replies("a", "b"), "prompt": "?"}, [1]], "line 2 is a list"),
        ([{"prompt": "?"}], "cannot give preference rows"),
        (
            [{"pair": "1", "prompt": "?", "replies": replies("a", other)} for other in "bc"],
            "two different pairs 1",
        ),
    ],
)
def test_a_wrong_file_is_a_message(tmp_path: Path, rows: list[Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(tmp_path, *rows)


def test_no_file_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("absent.jsonl", "org/name"):
        with pytest.raises(UserError, match="absent|is no file here"):
            read_questions(path, None)
