"""Everybody's order and sides: random, the same after a restart, and close enough to compare people."""

from reward.labelling.order import BLOCK, is_swapped, order, page_key
from tests.reward.labelling.conftest import question

QUESTIONS = [question(number) for number in range(400)]


def test_everybody_sees_everything_in_an_order_of_their_own() -> None:
    ann, bo = (order(0, name, QUESTIONS) for name in ("ann", "bo"))
    assert sorted(ann, key=QUESTIONS.index) == QUESTIONS == sorted(bo, key=QUESTIONS.index)
    assert ann != bo != QUESTIONS != ann
    assert ann == order(0, "ann", QUESTIONS[::-1])  # whatever the file's order
    assert order(1, "ann", QUESTIONS) != ann


def test_whoever_stops_early_has_judged_what_others_did() -> None:
    ann, bo = (order(0, name, QUESTIONS) for name in ("ann", "bo"))
    for count in (BLOCK, 5 * BLOCK):
        assert set(map(id, ann[:count])) == set(map(id, bo[:count]))


def test_sides_are_random_and_stay() -> None:
    for annotator in ("ann", "bo"):
        swapped = [is_swapped(0, annotator, each) for each in QUESTIONS]
        assert 160 < sum(swapped) < 240  # four deviations around the half
        assert swapped == [is_swapped(0, annotator, each) for each in QUESTIONS]
    agree = sum(is_swapped(0, "ann", each) == is_swapped(0, "bo", each) for each in QUESTIONS)
    assert 160 < agree < 240
    assert [is_swapped(1, "ann", each) for each in QUESTIONS] != [is_swapped(0, "ann", each) for each in QUESTIONS]


def test_the_name_on_the_page_says_nothing() -> None:
    keys = {page_key(0, each) for each in QUESTIONS}
    assert len(keys) == len(QUESTIONS) and not any("p" in key for key in keys)
