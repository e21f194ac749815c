"""What a preference row tells beside its replies: ties, margins, annotators; rows with a winner; ranks as margins."""

import json
from pathlib import Path
from typing import Any

import pytest

from baton.data import load
from baton.data.formats import detect
from baton.errors import UserError
from baton.recipe import Source


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


PAIR = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
SIDES = {"prompt": [user("Q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
ARENA = {"prompt": "Q", "response_a": "good", "response_b": "bad"}
SWAPPED = {**SIDES, "chosen": SIDES["rejected"], "rejected": SIDES["chosen"]}


def rows_of(folder: Path, *rows: dict, kind: str = "preference") -> list[dict]:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load(Source(path="a.jsonl"), folder, kind).rows


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"is_tie": True}, {"is_tie": True}),
        ({"is_tie": False, "tie": None}, {}),
        ({"tie": True}, {"is_tie": True}),
        ({"label": "tie"}, {"is_tie": True}),
        ({"label": 0.5}, {"is_tie": True}),
        ({"label": 1}, {}),
        ({"label": "sports"}, {}),
        ({"winner": "Tie"}, {"is_tie": True}),
        ({"is_tie": True, "both_bad": True}, {"is_tie": True}),
        ({"margin": 0}, {"margin": 0.0}),
        ({"margin": 1.5}, {"margin": 1.5}),
        ({"margin": 1.5, "is_tie": True}, {"is_tie": True}),
        ({"score_chosen": 8.5, "score_rejected": 6.0}, {"margin": 2.5}),
        ({"chosen_rating": 4, "rejected_rating": 1}, {"margin": 3.0}),
        ({"score_chosen": 8.5}, {}),
        ({"annotator": "ann", "pair": "p1"}, {"annotator": "ann", "pair": "p1"}),
        ({"annotator_id": 7}, {"annotator": "7"}),
        ({"judge": "expert_1", "pair_id": 3}, {"annotator": "expert_1", "pair": "3"}),
    ],
)
def test_what_a_row_tells_beside_its_replies(tmp_path: Path, fields: dict, expected: dict) -> None:
    assert rows_of(tmp_path, PAIR | fields) == [SIDES | expected]


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"margin": "2"}, "line 1 has a string as `margin`; expected a number"),
        ({"margin": True}, "line 1 has true as `margin`"),
        ({"margin": float("nan")}, "has nan as `margin`; expected a finite number"),
        ({"score_chosen": 2, "score_rejected": "1"}, "has a string as `score_rejected`"),
        ({"is_tie": "yes"}, "has a string as `is_tie`; expected true or false"),
        ({"annotator": ["ann"]}, "has a list as `annotator`; expected a string"),
        ({"margin": -0.5}, "1 × scores contradict the choice"),
        ({"score_chosen": 1, "score_rejected": 2}, "1 × scores contradict the choice"),
        ({"skipped": True}, "1 × skipped by the annotator"),
    ],
)
def test_judgements_that_cannot_be_used(tmp_path: Path, fields: dict, fault: str) -> None:
    with pytest.raises(UserError) as caught:
        rows_of(tmp_path, PAIR | fields)
    assert fault in str(caught.value)


def test_a_file_of_the_labelling_page_is_read_and_skips_are_counted(tmp_path: Path) -> None:
    said = {"prompt": [user("Q")], "annotator": "ann", "time": "2026-01-01T00:00:00Z", "shown": "ba"}
    good, bad = [assistant("good")], [assistant("bad")]
    lines = [
        {**said, "pair": "p0", "skipped": True},
        {**said, "pair": "p1", "chosen": bad, "rejected": good},
        {**said, "pair": "p2", "chosen": good, "rejected": bad, "is_tie": True, "both_bad": True},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loaded = load(Source(path="a.jsonl"), tmp_path, "preference")
    assert loaded.rows == [
        {**SWAPPED, "annotator": "ann", "pair": "p1"},
        {**SIDES, "is_tie": True, "annotator": "ann", "pair": "p2"},
    ]
    assert [place[1] for place in loaded.places] == [2, 3]
    assert [(drop.reason, drop.count, drop.first_line) for drop in loaded.dropped] == [
        ("skipped by the annotator", 1, 1)
    ]


@pytest.mark.parametrize(
    ("winner", "expected"),
    [
        ("model_a", SIDES),
        ("model_b", SWAPPED),
        ("B", SWAPPED),
        ("tie", {**SIDES, "is_tie": True}),
        ("tie (bothbad)", {**SIDES, "is_tie": True}),
    ],
)
def test_the_winner_is_the_chosen_reply(tmp_path: Path, winner: str, expected: dict) -> None:
    row = {**ARENA, "winner": winner}
    assert detect(row) == "arena"
    assert rows_of(tmp_path, row) == [expected]
    assert rows_of(tmp_path, row, kind="prompt")[0]["prompt"] == [user("Q")]


def test_ties_have_no_reply_to_imitate(tmp_path: Path) -> None:
    rows = [{**ARENA, "winner": "model_b"}, {**ARENA, "winner": "tie"}]
    assert rows_of(tmp_path, *rows, kind="dialogue") == [{"messages": [user("Q"), assistant("bad")]}]
    with pytest.raises(UserError, match="1 × a tie: neither reply was chosen"):
        rows_of(tmp_path, rows[1], kind="dialogue")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({**ARENA, "winner": "model_c"}, "has 'model_c' as `winner`; expected model_a, model_b, tie"),
        (ARENA, "has null as `winner`"),
        ({"response_a": "x", "response_b": "y", "winner": "a"}, "has no `prompt`"),
        (
            {**ARENA, "conversation_a": [user("Q")], "conversation_b": "Q", "winner": "a"},
            "a string as `conversation_b`",
        ),
        ({"conversation_a": [], "conversation_b": [], "winner": "a", "turn": 0}, "has 0 as `turn`"),
    ],
)
def test_arena_rows_that_are_none(tmp_path: Path, row: dict, fault: str) -> None:
    with pytest.raises(UserError) as caught:
        rows_of(tmp_path, row)
    assert fault in str(caught.value)


A = [user("Q"), assistant("a1"), user("And?"), assistant("a2")]
B = [user("Q"), assistant("b1"), user("And?"), assistant("b2")]


def test_whole_dialogues_part_at_the_first_difference(tmp_path: Path) -> None:
    row = {"conversation_a": A, "conversation_b": B, "winner": "model_b", "judge": "j1"}
    expected = {"prompt": A[:1], "chosen": B[1:], "rejected": A[1:], "annotator": "j1"}
    assert rows_of(tmp_path, row) == rows_of(tmp_path, {**row, "turn": 2}) == [expected]
    first = {**expected, "chosen": B[1:2], "rejected": A[1:2]}
    assert rows_of(tmp_path, {**row, "turn": 1}) == [first]
    late = {**row, "conversation_b": [*A[:3], B[3]]}
    assert rows_of(tmp_path, late) == [{**expected, "prompt": A[:3], "chosen": B[3:], "rejected": A[3:]}]
    # TRL's implicit prompt gives the same
    implicit = {"chosen": B, "rejected": A, "annotator": "j1"}
    assert rows_of(tmp_path, implicit, {**implicit, "prompt": "Q"}) == [expected] * 2


def test_dialogues_in_which_the_user_says_different_things_are_no_pair(tmp_path: Path) -> None:
    other = [*B[:2], user("Why?"), B[3]]
    for row in (
        {"conversation_a": A, "conversation_b": other, "winner": "model_a"},
        {"conversation_a": A, "conversation_b": B[:2], "winner": "model_a"},
        {"chosen": A, "rejected": other},
    ):
        with pytest.raises(UserError, match="1 × prompts differ"):
            rows_of(tmp_path, row)


def oasst(ranks: list[int]) -> dict[str, Any]:
    replies = [{"text": f"r{rank}", "role": "assistant", "rank": rank, "replies": []} for rank in ranks]
    return {"message_tree_id": "t", "prompt": {"text": "Q", "role": "prompter", "replies": replies}}


def test_the_margin_of_ranks_is_their_distance_in_parts_of_the_largest(tmp_path: Path) -> None:
    pairs = {
        (row["chosen"][0]["content"], row["rejected"][0]["content"]): row["margin"]
        for row in rows_of(tmp_path, oasst([2, 0, 5, 1]))
    }
    expected = {("r0", "r1"): 0.2, ("r0", "r2"): 0.4, ("r0", "r5"): 1.0}
    assert pairs == expected | {("r1", "r2"): 0.2, ("r1", "r5"): 0.8, ("r2", "r5"): 0.6}


def test_of_very_many_ranked_replies_nine_are_paired(tmp_path: Path) -> None:
    assert len(rows_of(tmp_path, oasst(list(range(9))))) == 36
    rows = rows_of(tmp_path, oasst(list(range(33))))
    names = {row[side][0]["content"] for row in rows for side in ("chosen", "rejected")}
    assert len(rows) == 36 and names == {f"r{rank}" for rank in range(0, 33, 4)}
