"""Rules on replies worked by hand."""

import inspect
from decimal import Decimal
from typing import Any

import pytest

from reward import rules
from reward.callables import GIVEN
from reward.rules import exact_answer, length_window, numbers_in, regular_expression, stated_number


def answers(responses: list[str], right: list[Any], **arguments: Any) -> list[float]:
    """`exact_answer` as a run calls it."""
    given = {"prompts": [[] for _ in responses], "token_ids": [[] for _ in responses]}
    return exact_answer(**given, responses=responses, columns={"answer": right}, **arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("72", ["72"]),
        ("1,234.50 and 12,345,678", ["1234.50", "12345678"]),
        ("it costs $72.", ["72"]),
        ("-5, $-5, -$5, = −7", ["-5", "-5", "-5", "-7"]),
        ("5-3 is not 5 - 3, nor (4)-2, nor x-1", ["5", "3", "5", "3", "4", "2", "1"]),
        ("x=-3", ["-3"]),
        ("1, 2,3", ["1", "2", "3"]),
        ("1,2345 is two numbers", ["1", "2345"]),
        ("0.5, .5, 3.", ["0.5", "0.5", "3"]),
        ("50% of 1,000,", ["50", "1000"]),
        ("2024-01-05", ["2024", "1", "5"]),
        ("none at all. a.b", []),
    ],
)
def test_numbers_in_a_text(text: str, expected: list[str]) -> None:
    assert numbers_in(text) == [Decimal(number) for number in expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("#### $1,600.00 in 2 months", "1600"),
        ("first #### 3, no: #### 4", "4"),
        ("The answer is 8, since 2 * 4 = 8 and 3 > 2", "8"),
        ("the Answer  is: **-12**. 5", "-12"),
        ("the answer is 3. No, the answer is 6 of 7", "6"),
        ("#### 5, though the answer is 6", "5"),
        ("#### five, so 6, or 7", "6"),
        ("6 or 7\n####", "7"),
        ("the answer is unclear; maybe 9 or 10", "9"),
        ("3 + 4 makes 7.", "7"),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_number_that_a_text_states(text: str, expected: str | None) -> None:
    assert stated_number(text) == (None if expected is None else Decimal(expected))


def test_exact_answers_worked_by_hand() -> None:
    responses = ["So 72 clips.", "#### 72.0", "It is 71", "no number", "1,600", "-3"]
    right = ["24 + 48\n#### 72", "72", "#### 72", "#### 72", "#### $1600", 3]
    assert answers(responses, right) == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert answers(responses, right, format_reward=0.1) == [1.0, 1.0, 0.1, 0.0, 1.0, 0.1]


def test_floats_are_compared_as_they_are_written() -> None:
    assert answers(["0.3", "0.30000001"], [0.3, 0.3]) == [1.0, 0.0]


@pytest.mark.parametrize("right", [None, "#### unknown", ""])
def test_a_row_without_a_right_answer_is_an_error(right: Any) -> None:
    with pytest.raises(ValueError, match="column 'answer' gives no number"):
        answers(["1", "2"], ["1", right])


def test_a_missing_column_is_an_error() -> None:
    with pytest.raises(ValueError, match="no column 'solution'; it has answer"):
        answers(["1"], ["1"], column="solution")


def lengths(counts: list[int], **arguments: Any) -> list[float]:
    given: dict[str, Any] = {"prompts": [], "responses": [], "columns": {}}
    return length_window(**given, token_ids=[[5] * count for count in counts], **arguments)


def test_length_windows_worked_by_hand() -> None:
    assert lengths([0, 3, 4, 6, 7], at_least=4, at_most=6) == [0, 0, 1, 1, 0]
    assert lengths([1, 10, 11], at_most=10) == [1, 1, 0]
    # 4 outside of a fade of 8 is a half, 2 is three quarters, 8 and more are nothing
    assert lengths([0, 2, 4, 6, 8, 14, 99], at_least=4, at_most=6, fade=8) == [0.5, 0.75, 1, 1, 0.75, 0, 0]


@pytest.mark.parametrize("arguments", [{"at_most": 3, "at_least": 4}, {"at_most": -1}, {"at_most": 3, "fade": -1}])
def test_an_impossible_window_is_an_error(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected 0 <= at_least <= at_most"):
        lengths([1], **arguments)


def test_regular_expressions() -> None:
    given: dict[str, Any] = {"prompts": [], "token_ids": [], "columns": {}}
    replies = ["<a>\nx</a>", "say <a>x</a>", "x"]
    assert regular_expression(**given, responses=replies, pattern="<a>.*</a>") == [1, 1, 0]
    assert regular_expression(**given, responses=replies, pattern="<a>.*</a>", whole=True) == [1, 0, 0]


def test_every_rule_has_the_interface_of_a_reward_function() -> None:
    public = {name: item for name, item in vars(rules).items() if inspect.isfunction(item) and name[0] != "_"}
    shipped = [function for name, function in public.items() if name not in ("stated_number", "numbers_in")]
    assert len(shipped) == 3
    for function in shipped:
        parameters = inspect.signature(function).parameters
        assert tuple(parameters)[:4] == GIVEN
        assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
