"""Coefficients of agreement on the tables of textbooks."""

import pytest

from reward.agreement import Judgement, agreement, in_words


def two_by_two(both: int, first: int, second: int, neither: int) -> list[Judgement]:
    """Two annotators who say a/a, a/b, b/a and b/b so often."""
    said = [("a", "a")] * both + [("a", "b")] * first + [("b", "a")] * second + [("b", "b")] * neither
    return [Judgement(who, str(pair), v) for pair, sides in enumerate(said) for who, v in zip("xy", sides, strict=True)]


# po and pe by hand: 0.7 and 0.5; 0.6 and 0.54; 0.6 and 0.46
@pytest.mark.parametrize(
    ("table", "kappa"), [((20, 5, 10, 15), 0.2 / 0.5), ((45, 15, 25, 15), 0.06 / 0.46), ((25, 35, 5, 35), 0.14 / 0.54)]
)
def test_cohens_kappa(table: tuple[int, int, int, int], kappa: float) -> None:
    found = agreement(two_by_two(*table))
    assert found is not None and found.couples == 1
    assert found.cohen == pytest.approx(kappa)
    assert found.same == pytest.approx((table[0] + table[3]) / sum(table))


def test_cohens_kappa_is_averaged_over_couples_with_enough_in_common() -> None:
    one = two_by_two(20, 5, 10, 15)  # x and y: 0.4
    other = [
        Judgement({"x": "v", "y": "w"}[j.annotator], f"w{j.pair}", j.verdict) for j in two_by_two(5, 0, 0, 5)
    ]  # 1.0
    few = [Judgement({"x": "s", "y": "t"}[j.annotator], f"s{j.pair}", j.verdict) for j in two_by_two(0, 2, 2, 0)]
    found = agreement([*one, *other, *few])
    assert found is not None and (found.annotators, found.pairs, found.couples) == (6, 64, 2)
    assert found.cohen == pytest.approx(0.7)


# how many of 14 judges put each of 10 subjects into each of 5 categories; by Fleiss' formulas the mean agreement is
# 0.378, that by chance 0.213, and so kappa 0.165 / 0.787 = 0.210
FLEISS = """0 0 0 0 14/0 2 6 4 2/0 0 3 5 6/0 3 9 2 0/2 2 8 1 1/7 7 0 0 0/3 2 6 3 0/2 5 3 2 2/6 5 2 1 0/0 2 2 3 7"""


def test_fleiss_kappa_of_judges_without_names() -> None:
    judgements = []
    for pair, row in enumerate(FLEISS.split("/")):
        verdicts = [category for category, count in enumerate(row.split()) for _ in range(int(count))]
        # other people for every pair: Fleiss' kappa does not ask who they are
        judgements += [Judgement(f"{pair}-{at}", str(pair), f"c{verdict}") for at, verdict in enumerate(verdicts)]
    judgements += [Judgement(who, "another", "c0") for who in "xy"]  # of two judges only: left out
    found = agreement(judgements)
    assert found is not None and found.fleiss_pairs == 10
    assert found.fleiss == pytest.approx(0.210, abs=5e-4)


# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: 12 units, 4 observers, missing values
OBSERVERS = {"A": "123321412...", "B": "1233224125.3", "C": ".3332342251.", "D": "12332441251."}


def test_krippendorffs_alpha_with_missing_judgements() -> None:
    judgements = [
        Judgement(who, str(unit), value)
        for who, values in OBSERVERS.items()
        for unit, value in enumerate(values)
        if value != "."
    ]
    found = agreement(judgements)
    assert found is not None and (found.annotators, found.pairs) == (4, 11)
    assert found.alpha == pytest.approx(0.743, abs=5e-4)


def test_nothing_judged_twice_is_no_agreement_and_one_verdict_only_leaves_it_undefined() -> None:
    assert agreement([Judgement("x", "1", "a"), Judgement("y", "2", "a"), Judgement("x", "1", "b")]) is None
    found = agreement(two_by_two(9, 0, 0, 0))
    assert found is not None and found.same == 1
    assert (found.cohen, found.fleiss, found.alpha) == (None, None, None)
    assert "100.0% the same, Cohen's kappa undefined" in in_words(found)


def test_the_last_word_on_a_pair_counts() -> None:
    found = agreement([Judgement("x", "1", "a"), Judgement("y", "1", "b"), Judgement("x", "1", "b")])
    assert found is not None and found.same == 1
