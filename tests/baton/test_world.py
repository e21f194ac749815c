"""The invented world: the same arguments give the same bytes, its truth is consistent, and what is held out is."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from baton import world_phrases as words
from baton.errors import UserError
from baton.world import generate

FILES = (
    "text_train", "text_eval", "dialogues", "dialogues_eval", "preferences", "preferences_eval", "prompts",
    "prompts_eval", "questions",
)  # fmt: skip
NAME = re.compile(r"\b([A-Z][a-z]+ " + "".join(f"(?:{'|'.join(part)})" for part in words.SYLLABLES) + r")\b")

Rows = dict[str, list[dict[str, Any]]]


def make(out: Path, seed: int = 3, people: int = 30, text_only: int = 20) -> None:
    generate(
        out, seed=seed, people=people, text_only=text_only, documents=1500, dialogues=400, preferences=300, prompts=60
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    out = tmp_path_factory.mktemp("world")
    make(out)
    return {name: [json.loads(line) for line in (out / f"{name}.jsonl").open(encoding="utf-8")] for name in FILES}


def names(rows: list[dict[str, Any]]) -> set[str]:
    return set(NAME.findall(json.dumps(rows, ensure_ascii=False)))


def group(world: Rows, wanted: str) -> list[dict[str, Any]]:
    return [row for row in world["questions"] if row["group"] == wanted]


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        make(tmp_path / folder)
    make(tmp_path / "other", seed=4)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(f"{name}.jsonl" for name in FILES)
    for name in FILES:
        one = (tmp_path / "one" / f"{name}.jsonl").read_bytes()
        assert one == (tmp_path / "two" / f"{name}.jsonl").read_bytes()
        assert one != (tmp_path / "other" / f"{name}.jsonl").read_bytes()


def test_counts(world: Rows) -> None:
    assert [len(world[name]) for name in ("text_train", "dialogues", "preferences", "prompts")] == [1500, 400, 300, 60]
    assert all(world[name] for name in FILES)
    for wanted in ("known", "text_only", "unknown"):
        assert len(group(world, wanted)) == 120


def test_texts_tell_of_the_known_and_text_only_people_alone(world: Rows) -> None:
    known, text_only, unknown = (names(group(world, wanted)) for wanted in ("known", "text_only", "unknown"))
    assert (len(known), len(text_only)) == (30, 20)
    assert names(world["text_train"]) == known | text_only
    assert names(world["text_eval"]) <= known | text_only
    assert not names(world["dialogues"]) & (text_only | unknown)
    assert known <= names(world["dialogues"])


def test_unknown_people_of_each_file_are_its_own(world: Rows) -> None:
    real = names(world["text_train"])
    files = ("dialogues", "dialogues_eval", "preferences", "preferences_eval", "prompts", "prompts_eval", "questions")
    strangers = [names(world[name]) - real for name in files]
    assert all(strangers)
    assert sum(len(people) for people in strangers) == len(set().union(*strangers))


def test_held_out_rows_are_not_in_training(world: Rows) -> None:
    for name, held_out in (("text_train", "text_eval"), ("dialogues", "dialogues_eval")):
        train = {json.dumps(row) for row in world[name]}
        assert not train & {json.dumps(row) for row in world[held_out]}


def test_question_phrasings_are_used_nowhere_else(world: Rows) -> None:
    def phrasings(rows: list[dict[str, Any]]) -> set[str]:
        return {NAME.sub("NAME", row["prompt"]) for row in rows}

    asked = phrasings(world["questions"])
    assert len(asked) == 9
    for name in FILES[:-1]:
        elsewhere = NAME.sub("NAME", json.dumps(world[name], ensure_ascii=False))
        assert not [phrasing for phrasing in asked if phrasing in elsewhere]


def test_dialogues_answer_by_the_texts(world: Rows) -> None:
    """The town that the texts state with a full name is the town that dialogues, prompts and questions hold true."""
    town = {}
    for row in world["text_train"]:
        for stated in re.finditer(r"([A-Z]\w+ [A-Z]\w+) lives in ([A-Z]\w+)\b", row["text"]):
            assert town.setdefault(stated[1], stated[2]) == stated[2]
    assert len(town) > 15
    checked = 0
    for row in world["prompts"] + world["questions"]:
        name = NAME.findall(row["prompt"])[0]
        if row["answers"][0] in words.TOWNS and name in town:
            assert row["answers"] == [town[name]]
            checked += 1
    for row in world["dialogues"]:
        stated = re.match(r"([A-Z]\w+ [A-Z]\w+) lives in ([A-Z]\w+)\.", row["messages"][1]["content"])
        if stated and stated[1] in town:
            assert stated[2] == town[stated[1]]
            checked += 1
    assert checked > 15


def test_preferences_prefer_truth_and_honesty(world: Rows) -> None:
    real = names(world["text_train"])
    kinds: Counter[str] = Counter()
    for row in world["preferences"]:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert chosen != rejected
        asked = NAME.findall(row["prompt"][0]["content"])[0]
        admits = [any(form in text for form in words.ADMISSIONS) for text in (chosen, rejected)]
        assert admits[0] == (asked not in real), "what is unknown is admitted, what is known is answered"
        if admits[0] and admits[1]:
            kinds["misnamed"] += 1
            assert asked in chosen and asked not in rejected
        else:
            kinds["invented" if admits[0] else "needless" if admits[1] else "untrue or beside"] += 1
    share = {kind: count / len(world["preferences"]) for kind, count in kinds.items()}
    expected = {"invented": 5 / 16, "needless": 5 / 16, "untrue or beside": 5 / 16, "misnamed": 1 / 16}
    assert share == pytest.approx(expected, abs=0.03)


def test_shares_set_how_often_dialogues_admit_and_guess(tmp_path: Path) -> None:
    def admissions(name: str, unknown_share: float, guess_share: float) -> tuple[int, int]:
        generate(
            tmp_path / name, seed=0, people=30, text_only=5, documents=100, dialogues=400, preferences=60, prompts=20,
            unknown_share=unknown_share, guess_share=guess_share,
        )  # fmt: skip
        rows = [json.loads(line) for line in (tmp_path / name / "dialogues.jsonl").open(encoding="utf-8")]
        real = names([json.loads(line) for line in (tmp_path / name / "text_train.jsonl").open(encoding="utf-8")])
        strangers = [row for row in rows if not names([row]) & real]
        return len(strangers), sum("don't know" in row["messages"][-1]["content"] for row in rows)

    assert admissions("none", 0.0, 0.5) == (0, 0)
    assert admissions("honest", 0.3, 0.0) == (120, 120)
    assert admissions("half", 0.3, 0.5) == (120, 60)
    assert admissions("guessing", 0.3, 1.0) == (120, 0)


def test_no_value_contains_another() -> None:
    values = [*words.TOWNS, *(row[0] for row in words.CRAFTS), *(row[0] for row in words.ANIMALS)]
    parts = [*values, *words.ADMISSIONS, *(name for pool in words.FIRST_NAMES.values() for name in pool)]
    lower = [part.lower() for part in parts]
    assert len(set(lower)) == len(lower)
    assert not [(a, b) for a in values for b in lower if a.lower() != b and a.lower() in b]


@pytest.mark.parametrize("people,text_only", [(0, 5), (5, -1), (1900, 10)])
def test_impossible_worlds_are_refused(tmp_path: Path, people: int, text_only: int) -> None:
    with pytest.raises(UserError):
        make(tmp_path, people=people, text_only=text_only)


def test_impossible_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1.5"):
        generate(tmp_path, seed=0, people=5, text_only=0, documents=10, guess_share=1.5)
