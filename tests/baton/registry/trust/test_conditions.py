"""The grammar of conditions, and when they hold."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import UserError
from baton.registry.trust.conditions import OPERATORS, Condition, parse

quick = settings(max_examples=150, deadline=None, database=None)


def test_what_is_read() -> None:
    for text, expected in (
        ("reward_accuracy >= 0.7", Condition("reward_accuracy", ">=", 0.7)),
        ("  kl_nats<=8 ", Condition("kl_nats", "<=", 8.0)),
        ("eval/win_rate > current", Condition("eval/win_rate", ">", 0.0, True)),
        ("top-1 >= current - 0.01", Condition("top-1", ">=", -0.01, True)),
        ("loss < current-.5", Condition("loss", "<", -0.5, True)),
        ("x.y@z:3 == -1e-3", Condition("x.y@z:3", "==", -0.001)),
        ("a > current+ 2.", Condition("a", ">", 2.0, True)),
        ("current > 3", Condition("current", ">", 3.0)),  # a metric may be called so
    ):
        assert parse(text) == expected, text
    assert str(parse("top-1>=current-0.01")) == "top-1 >= current - 0.01"
    assert str(parse("kl_nats<=8")) == "kl_nats <= 8"


def test_what_is_refused() -> None:
    for text, message in (
        ("", "is not a condition; expected `metric >= 0.7`"),
        ("accuracy", "is not a condition"),
        ("accuracy >=", "is not a condition"),
        (">= 0.7", "is not a condition"),
        ("two words >= 1", "is not a condition"),
        ("accuracy = 0.7", "'=' is none of >=, <=, >, <, =="),
        ("accuracy => 0.7", "'=>' is none of"),
        ("accuracy != 0.7", "'!=' is none of"),
        ("accuracy >= high", "'high' is neither a number nor `current`"),
        ("accuracy >= curent", "Did you mean current?"),
        ("accuracy >= Current", "Did you mean current?"),
        ("accuracy >= nan", "neither a number"),
        ("accuracy >= inf", "neither a number"),
        ("accuracy >= 0,7", "neither a number"),
        ("accuracy >= 70%", "neither a number"),
        ("accuracy >= 0x1", "neither a number"),
        ("accuracy >= 1_0", "neither a number"),
        ("accuracy >= 1e999", "too large"),
        ("accuracy >= current * 2", "neither a number"),
        ("0 < accuracy < 1", "neither a number"),
    ):
        with pytest.raises(UserError) as caught:
            parse(text)
        assert message in str(caught.value), text


@pytest.mark.parametrize(
    ("text", "below", "equal", "above"),
    [("m > 2", 0, 0, 1), ("m >= 2", 0, 1, 1), ("m < 2", 1, 0, 0), ("m <= 2", 1, 1, 0), ("m == 2", 0, 1, 0)],
)
def test_when_it_holds(text: str, below: int, equal: int, above: int) -> None:
    condition = parse(text)
    assert [condition.holds(value) for value in (1.5, 2.0, 2.5)] == [below, equal, above]
    relative = parse(text.replace("2", "current + 1"))
    assert [relative.holds(value, current=1.0) for value in (1.5, 2.0, 2.5)] == [below, equal, above]
    for number in (math.nan, math.inf, -math.inf):
        assert not condition.holds(number)
        assert not relative.holds(2.0, current=number) and not relative.holds(number, current=number)


_metrics = st.text(
    st.characters(exclude_characters="<>=!", exclude_categories=("Z", "C")), min_size=1, max_size=20
).filter(lambda text: not any(c.isspace() for c in text))
_numbers = st.floats(allow_nan=False, allow_infinity=False)


@quick
@given(_metrics, st.sampled_from(sorted(OPERATORS)), _numbers, st.booleans())
def test_a_condition_is_read_back_as_it_was_spelled(metric: str, word: str, number: float, is_relative: bool) -> None:
    condition = Condition(metric, word, number, is_relative)
    assert parse(str(condition)) == condition
    assert str(parse(str(condition))) == str(condition)


@quick
@given(st.one_of(st.text(max_size=40), st.text(alphabet="ab/ <>=!+-.0123456789ecurnt", max_size=40)))
def test_anything_else_is_a_user_error(text: str) -> None:
    try:
        found = parse(text)
    except UserError:
        return
    assert found.operator in OPERATORS and math.isfinite(found.number) and parse(str(found)) == found
