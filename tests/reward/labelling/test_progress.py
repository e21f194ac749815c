"""Progress and agreement: worked by hand, and silent about single pairs."""

from typing import Any

from pytest import approx

from reward.labelling.judgements import Judgement
from reward.labelling.progress import accords, standings
from tests.reward.labelling.conftest import question


def said(annotator: str, outcomes: str) -> list[Judgement]:
    """One judgement a letter, of the pairs p0, p1 …: a, b, t(ie), x (both bad), s(kip); a dot for none."""
    meaning: dict[str, Any] = {"a": "a", "b": "b", "t": "tie", "x": "bad", "s": "skip"}
    return [
        Judgement(f"{annotator}{n}", f"p{n}", annotator, "skip" if o == "s" else "first", meaning[o], "")
        for n, o in enumerate(outcomes)
        if o != "."
    ]


def test_progress_counts_only_what_is_asked_now() -> None:
    judgements = said("Bo", "ab.s") + said("ann", "....aa")
    found = {each.annotator: each for each in standings(judgements, [question(number) for number in range(5)])}
    assert list(found) == ["ann", "Bo"]
    assert (found["Bo"].done, found["Bo"].skipped, found["Bo"].total) == (3, 1, 5)
    assert found["ann"].done == 1


def test_agreement_by_hand() -> None:
    # ten pairs, eight alike; ann says a 5 times, b 3, neither 2; bo a 6 and b 4: by chance (5·6 + 3·4) / 100 = 0.42
    (found,) = accords(said("ann", "aaaaabbbtx") + said("bo", "aaaaabbbba"))
    assert (found.first, found.second, found.common, found.agreement) == ("ann", "bo", 10, 0.8)
    assert found.kappa == approx((0.8 - 0.42) / (1 - 0.42))


def test_a_tie_and_two_bad_ones_are_alike_and_skipped_pairs_do_not_count() -> None:
    (found,) = accords(said("ann", "taaaaaaaaasa") + said("bo", "xaaaaaaaaaas"))
    assert (found.common, found.agreement) == (10, 1.0)
    assert accords(said("ann", "taaaaaaaasa") + said("bo", "xaaaaaaaaas")) == []


def test_the_figure_moves_in_tens_only() -> None:
    # otherwise the eleventh judgement would tell what the other one said
    base = said("ann", "aaaaaaaaab"), said("bo", "aaaaaaaaaa")
    ten = accords(base[0] + base[1])
    more = [*base[0], *base[1], *said("bo", "." * 10 + "bbbbbbbbb")]
    for outcome in "ab":
        eleven = accords(more + said("ann", "." * 10 + outcome))
        assert (
            [(each.common, each.agreement) for each in eleven]
            == [(10, 0.9)]
            == [(each.common, each.agreement) for each in ten]
        )


def test_always_the_same_answer_has_no_kappa() -> None:
    (found,) = accords(said("ann", "a" * 10) + said("bo", "a" * 10))
    assert (found.agreement, found.kappa) == (1.0, None)


def test_three_people_make_three_pairs_of_people() -> None:
    found = accords(said("ann", "a" * 10) + said("Bo", "b" * 10) + said("cy", "a" * 25))
    assert [(each.first, each.second, each.agreement) for each in found] == [
        ("ann", "Bo", 0.0),
        ("ann", "cy", 1.0),
        ("Bo", "cy", 0.0),
    ]
