"""Axes and escaping, by hand."""

import pytest

from reward.knowledge.charts import Plane, padded, shortened, ticks
from reward.knowledge.evenly import evenly
from reward.knowledge.markup import Markup, element, joined


def test_ticks_are_round_and_within() -> None:
    assert ticks((0.0, 1.0)) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks((-3.1, 9.0)) == [-2.5, 0.0, 2.5, 5.0, 7.5]
    assert ticks((0.48, 1.0)) == [0.6, 0.8, 1.0]
    assert all(0.0 <= tick <= 2e-5 for tick in ticks((0.0, 2e-5)))


def test_plane_keeps_values_inside() -> None:
    plane = Plane("p", (0.0, 10.0), (0.0, 1.0), ("x", "y"))
    assert plane.x(5.0) == pytest.approx((plane.x(0.0) + plane.x(10.0)) / 2)
    assert plane.x(99.0) == plane.x(10.0) and plane.y(-1.0) == plane.y(0.0) > plane.y(1.0)


def test_padding_of_nothing_is_something() -> None:
    low, high = padded((2.0, 2.0))
    assert low < 2.0 < high


def test_long_names_are_shortened() -> None:
    assert shortened("abcdef", 4) == "abc…" and shortened("abcd", 4) == "abcd"
    assert shortened("some/folder/file.jsonl", 12) == "file.jsonl" and shortened("a/b.jsonl", 12) == "a/b.jsonl"


def test_elements_escape_text_but_not_markup() -> None:
    assert element("p", {"title": '"<'}, "a < b", Markup("<i>c</i>")) == ('<p title="&quot;&lt;">a &lt; b<i>c</i></p>')
    assert isinstance(joined("<"), Markup) and joined("<") == "&lt;"
    assert element("line", {"x1": 1.0}) == '<line x1="1"/>'


def test_evenly_taken() -> None:
    assert evenly(range(10), 4) == [0, 2, 5, 7]
    assert evenly("ab", 5) == ["a", "b"] and evenly("ab", 0) == []
