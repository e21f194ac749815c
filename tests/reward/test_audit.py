"""Repeated and contradictory judgements are found, counted and settled; leaked prompts are refused or dropped."""

from typing import Any

import pytest

from baton.errors import UserError
from reward.audit import Placed, audit, check_leakage, judgements_of, pair_key


def row(prompt: str, chosen: str, rejected: str, **facts: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        **facts,
    }


def placed(*rows: dict[str, Any], file: str = "a.jsonl") -> list[Placed]:
    return [Placed(each, file, number) for number, each in enumerate(rows, 1)]


def texts(items: list[Placed]) -> list[tuple[str, str, str]]:
    return [tuple(item.row[part][0]["content"] for part in ("prompt", "chosen", "rejected")) for item in items]  # type: ignore[misc]


ONE, TWO, TIE = row("Q", "x", "y"), row("Q", "y", "x"), row("Q", "x", "y", is_tie=True)
OTHER = row("R", "x", "y")


def test_a_pair_is_the_same_in_either_order_and_for_white_space_at_the_ends_only() -> None:
    key, verdict = pair_key(ONE)
    swapped_key, swapped_verdict = pair_key(TWO)
    assert key == swapped_key and {verdict, swapped_verdict} == {"a", "b"}
    assert pair_key(TIE) == (key, "tie")
    assert pair_key(row(" Q\n", "x ", "y")) == (key, verdict)
    for other in (OTHER, row("Q", "X", "y"), row("Q", "x  z", "y"), row("Q", "x", "z")):
        assert pair_key(other)[0] != key


def test_repeats_are_counted_with_their_first_places_and_kept_once() -> None:
    judged = placed(OTHER, ONE, row("Q", "x", "y "), ONE)
    kept, found = audit(judged, "vote")
    assert kept == judged[:2] and (found.rows, found.kept, found.repeats, found.contradictions) == (4, 2, 2, 0)
    assert "2 × a pair judged again, alike (kept once), first at a.jsonl line 2 and a.jsonl line 3" in found.report(
        "train", "vote"
    )
    kept, found = audit(judged, "keep")
    assert kept == judged and found.repeats == 2
    assert "(kept)" in found.report("train", "keep")


@pytest.mark.parametrize(
    ("rows", "repeated", "expected", "counts"),  # counts: contradictions, both ways, by majority, dropped
    [
        ([ONE, TWO, ONE], "vote", [("Q", "x", "y")], (1, 1, 1, 0)),
        ([ONE, TWO, TWO], "vote", [("Q", "y", "x")], (1, 1, 1, 0)),
        ([ONE, TWO], "vote", [], (1, 1, 0, 1)),
        ([ONE, TIE], "vote", [], (1, 0, 0, 1)),
        ([ONE, TWO, TIE], "vote", [], (1, 1, 0, 1)),
        ([TIE, ONE, TIE], "vote", [("Q", "x", "y")], (1, 0, 1, 0)),
        ([ONE, ONE, TWO, TWO, TIE], "vote", [], (1, 1, 0, 1)),
        ([ONE, TWO, ONE], "drop", [], (1, 1, 0, 1)),
        ([ONE, ONE], "drop", [("Q", "x", "y")], (0, 0, 0, 0)),
        ([ONE, TWO], "keep", [("Q", "x", "y"), ("Q", "y", "x")], (1, 1, 0, 0)),
    ],
)
def test_contradictions(
    rows: list[dict], repeated: Any, expected: list[tuple[str, str, str]], counts: tuple[int, ...]
) -> None:
    kept, found = audit(placed(OTHER, *rows), repeated)
    assert texts(kept) == [("R", "x", "y"), *expected]
    assert (found.contradictions, found.both_ways, found.voted, found.dropped) == counts
    assert found.kept == 1 + len(expected)
    report = found.report("train", repeated)
    if counts[0]:
        different = next(at for at, each in enumerate(rows) if each is not rows[0])
        assert f"first at a.jsonl line 2 and a.jsonl line {2 + different}" in report
        assert f"{counts[0]} × a pair judged differently, {counts[1]} of them both ways" in report
    else:
        assert "differently" not in report


def test_the_majority_of_ties_is_a_tie_and_margins_are_averaged() -> None:
    (kept,), _ = audit(placed(TIE, ONE, TIE), "vote")
    assert kept.row["is_tie"] is True
    judged = [
        row("Q", "x", "y", margin=1.0, annotator="ann"),
        row("Q", "y", "x", margin=9.0, annotator="bob"),
        row("Q", "x", "y", margin=2.0, annotator="cid"),
        row("Q", "x", "y", annotator="dee"),
    ]
    (kept,), found = audit(placed(*judged), "vote")
    assert kept.row == row("Q", "x", "y", margin=1.5) and kept.number == 1
    assert found.margins == 1


def test_an_annotators_last_word_on_a_named_pair_counts() -> None:
    first = {**ONE, "annotator": "ann", "pair": "p1"}
    second = {**TWO, "annotator": "ann", "pair": "p1"}
    kept, found = audit(placed(first, second), "vote")
    assert [item.row for item in kept] == [second] and (found.revised, found.contradictions) == (1, 0)
    # another annotator, another pair by that name, or no name at all: judgements of their own
    for other in ({**second, "annotator": "bob"}, {**OTHER, "annotator": "ann", "pair": "p1"}, TWO):
        assert audit(placed(first, other), "keep")[1].revised == 0


def test_agreement_is_among_annotators_of_the_same_pair_in_either_order() -> None:
    said = {"ann": "aabbaabbab", "bob": "aabbaabbba"}
    rows = [
        row(str(at), *("xy" if side == "a" else "yx"), annotator=who)
        for who, sides in said.items()
        for at, side in enumerate(sides)
    ]
    _, found = audit(placed(*rows, OTHER), "vote")
    assert found.agreement is not None and found.agreement.pairs == 10
    assert found.agreement.same == pytest.approx(0.8)
    # by hand, for whichever reply is a: chance agreement lies near a half, and alpha near 0.6
    assert found.agreement.alpha == pytest.approx(0.6, abs=0.05)
    facts = found.facts("eval")
    assert facts["data/eval/krippendorff_alpha"] == found.agreement.alpha
    assert facts["data/eval/contradictions"] == 2 and facts["data/eval/annotators"] == 2
    assert "2 annotators on 10 pairs that two or more judged: 80.0% the same" in found.report("eval", "vote")
    assert len(judgements_of(rows)) == 20


def test_leaked_prompts_are_refused_by_number_name_and_place() -> None:
    train = placed(OTHER, row("What  is\nＲＥＤ?", "x", "y"), row("what is red?", "p", "q"), ONE)
    held_out = placed(row("A", "x", "y"), row("What is red?", "v", "w"), row("what is red?", "t", "u"), file="b.json")
    with pytest.raises(UserError) as caught:
        check_leakage(train, held_out, "refuse")
    message = str(caught.value)
    assert "1 of the 2 held-out prompts is trained on too, in 2 of 4 pairs" in message
    assert 'the first is "What is ＲＥＤ?" (a.jsonl line 2 and b.json row 2)' in message
    assert "data.leakage: drop" in message
    assert check_leakage(train, held_out, "drop") == [train[0], train[3]]
    assert check_leakage(train, held_out[:1], "refuse") == train
    with pytest.raises(UserError, match="Without them no pair is left"):
        check_leakage(train[1:3], held_out, "drop")


def test_the_same_question_after_another_beginning_is_another_prompt() -> None:
    later = row("And?", "x", "y")
    later["prompt"] = [*row("Q", "x", "y")["prompt"], *row("Q", "z", "y")["chosen"], *later["prompt"]]
    assert check_leakage(placed(later), placed(row("And?", "x", "y")), "refuse") == placed(later)
