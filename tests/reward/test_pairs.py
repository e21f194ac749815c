"""Preference pairs: read with their audit, mixed by weight, encoded with what both sides share."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from baton import chat
from baton.errors import UserError
from baton.recipe import PairData
from baton.rendering import Unrenderable
from reward.pairs import encode_pairs, read_all_pairs, shared_tokens, turn_by_turn


def row(prompt: str, chosen: str, rejected: str, **facts: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **facts}


def messages(row: dict[str, Any]) -> dict[str, Any]:
    """The row as a loader normalises it."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {**row, **{part: [{"role": role, "content": row[part]}] for part, role in roles.items()}}


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """What reading needs of a run, with its say() collected; `run.data` sets the recipe's data."""

    def data(**settings: Any) -> Any:
        for use in ("train", "eval"):
            for at, rows in enumerate(settings.get(use, [])):
                (tmp_path / f"{use}{at}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows["rows"]))
                rows.pop("rows")
                rows["path"] = f"{use}{at}.jsonl"
        given.recipe.data = PairData(**settings)
        return given

    said: list[str] = []
    recipe = SimpleNamespace(folder=tmp_path, data=None, train=SimpleNamespace(seed=3, max_length=40))
    given = SimpleNamespace(recipe=recipe, say=said.append, said=said, data=data)
    return given


A, B, C = row("one", "x", "y"), row("two", "x", "y"), row("three", "x", "y")


def prompts(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(each["prompt"][0]["content"] for each in rows)


def test_rows_of_all_sources_are_audited_together_and_then_weighted(run: Any) -> None:
    run.data(train=[{"rows": [A, B]}, {"rows": [A, C], "weight": 2}], eval=[{"rows": [row("four", "x", "y")]}])
    read = read_all_pairs(run)
    # A of the second source repeats that of the first, which alone counts: once, C twice
    assert prompts(read.train) == ["one", "three", "three", "two"]
    assert {each["prompt"][0]["content"]: each["source"] for each in read.train} == {
        "one": "train0.jsonl",
        "two": "train0.jsonl",
        "three": "train1.jsonl",
    }
    assert prompts(read.eval) == ["four"]
    assert read.facts["data/train/repeats"] == 1 and read.facts["data/train/kept"] == 3
    assert any("train: 3 pairs of 4 judgements" in line for line in run.said)


def test_every_repeated_row_can_be_kept(run: Any) -> None:
    run.data(train=[{"rows": [A, row("one", "y", "x")]}], repeated="keep")
    read = read_all_pairs(run)
    assert prompts(read.train) == ["one", "one"] and read.eval == []
    assert read.facts["data/train/both_ways"] == 1 and "data/eval/kept" not in read.facts


def test_leakage_is_refused_by_default_and_dropped_on_demand(run: Any) -> None:
    sources: dict[str, Any] = {"train": [{"rows": [A, B]}], "eval": [{"rows": [row(" ONE ", "p", "q")]}]}
    run.data(**sources)
    with pytest.raises(UserError, match="1 of the 1 held-out prompts is trained on too, in 1 of 2 pairs"):
        read_all_pairs(run)
    run.recipe.data = run.recipe.data.model_copy(update={"leakage": "drop"})
    read = read_all_pairs(run)
    assert prompts(read.train) == ["two"] and read.facts["data/train/leaked"] == 1
    assert run.said[-1] == "train: 1 of 2 pairs left out: their prompts are held out"


def test_dropping_leaked_prompts_without_held_out_ones_would_be_ignored() -> None:
    with pytest.raises(ValueError, match="leakage: drop needs data.eval"):
        PairData(train=[{"path": "a.jsonl"}], leakage="drop")  # type: ignore[list-item]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


LONG = {
    "prompt": [user("Q")],
    "chosen": [assistant("a1"), user("And?"), assistant("a2"), user("So?"), assistant("a3")],
    "rejected": [assistant("b1"), user("And?"), assistant("b2"), user("No?"), assistant("b3")],
    "margin": 2.0,
}


def test_replies_of_several_turns_are_compared_after_each_turn() -> None:
    chosen, rejected = LONG["chosen"], LONG["rejected"]
    cut = [(1, 1), (3, 3), (5, 5)]
    assert turn_by_turn(LONG) == [{**LONG, "chosen": chosen[:a], "rejected": rejected[:b]} for a, b in cut]
    # not where both say the same, nor after the user says different things, nor beyond the shorter one
    alike = {**LONG, "rejected": [chosen[0], user("And?"), assistant("b2")]}
    assert [len(each["rejected"]) for each in turn_by_turn(alike)] == [3, 3]
    asked = {**LONG, "rejected": [assistant("b1"), user("Eh?"), assistant("b2")]}
    assert [(len(e["chosen"]), len(e["rejected"])) for e in turn_by_turn(asked)] == [(1, 1), (5, 3)]


def test_every_turn_makes_more_pairs_and_is_refused_where_it_cannot(run: Any) -> None:
    dialogue = {"prompt": "Q", "chosen": LONG["chosen"][:3], "rejected": LONG["rejected"][:3]}
    run.data(train=[{"rows": [dict(dialogue)]}], every_turn=True)
    assert sorted(len(each["chosen"]) for each in read_all_pairs(run).train) == [1, 3]
    run.data(train=[{"rows": [dict(dialogue)]}])
    assert len(read_all_pairs(run).train) == 1
    run.data(train=[{"rows": [A]}], every_turn=True)
    with pytest.raises(UserError, match="data.every_turn would be ignored"):
        read_all_pairs(run)


class Letters:
    """Single characters; every message ends with the stop token 0."""

    all_special_tokens = ("<stop>",)


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tokenizer by which `encode_scored` gives the letters' codes; it does not render "!"."""

    def encode(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
        assert isinstance(tokenizer, Letters)
        if any("!" in m["content"] for m in messages):
            raise chat.CannotRenderError(messages, Unrenderable("the template refuses it"))
        return [code for m in messages for code in [*map(ord, m["content"]), 0]]

    monkeypatch.setattr(chat, "encode_scored", encode)
    return Letters()


def test_pairs_that_the_template_refuses_are_counted(run: Any, letters: Any) -> None:
    rows = [messages(row("Q", "yes", "no")), messages(row("R", "oh!", "y"))]
    assert [pair.prompt for pair in encode_pairs(run, letters, rows, "train")] == [[user("Q")]]
    assert "train: 1 pairs dropped because the template refuses it" in run.said


def test_pairs_are_encoded_with_what_both_sides_begin_with(run: Any, letters: Any) -> None:
    rows = [messages(row("Q", "say it", "say no", margin=0.5)), messages(row("R", "x", "y", is_tie=True))]
    rows[0]["source"] = "train0.jsonl"
    rows[1]["prompt"] = [user("P"), assistant("p"), user("R")]
    first, second = encode_pairs(run, letters, rows, "train")
    assert first.chosen_ids == [ord("Q"), 0, *map(ord, "say it"), 0]
    # "Q", its stop and "say " begin both
    assert (first.shared, first.turns, first.margin, first.is_tie, first.source) == (6, 1, 0.5, False, "train0.jsonl")
    assert (second.shared, second.turns, second.margin, second.is_tie) == (6, 2, None, True)
    assert first.chosen == [assistant("say it")] and second.prompt == rows[1]["prompt"]


def test_each_side_keeps_a_token_of_its_own() -> None:
    assert shared_tokens([1, 2, 3], [1, 2, 4, 5]) == 2
    assert shared_tokens([1, 2, 3], [1, 2, 3, 4]) == 2
    assert shared_tokens([1], [1]) == shared_tokens([1], [2]) == 0


def test_long_pairs_and_those_with_control_text_are_dropped_whole_and_counted(run: Any, letters: Any) -> None:
    rows = [messages(row("Q", "b", "c")), messages(row("Q", "b", "c" * 50)), messages(row("Q", "b", "<stop>"))]
    assert len(encode_pairs(run, letters, rows, "train")) == 1
    assert run.said == ["train: 1 pairs; 1 longer than 40 tokens dropped, 1 that spell out a special token dropped"]
    with pytest.raises(UserError, match="none of 1 pairs is left.*train.max_length = 40"):
        encode_pairs(run, letters, rows[1:2], "train")
