"""Rewards by rule, for `function: reward.rules:NAME` in a recipe: pure functions of prompts, replies and data."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from baton.chat import Messages

ANSWER_MARK = "####"
_STATED = re.compile(r"answer\s+is", re.IGNORECASE)
# a minus after a letter, a digit or a closing bracket subtracts; commas group by three, else they separate numbers
_NUMBER = re.compile(
    r"(?:(?<![\w.)])([-−]))?(?:\$([-−])?)?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)",
)


def exact_answer(
    *,
    prompts: list[Messages],
    responses: list[str],
    token_ids: list[list[int]],
    columns: dict[str, list[Any]],
    column: str = "answer",
    format_reward: float = 0.0,
) -> list[float]:
    """1 where the reply's answer is the number that the data row gives, else 0; GSM8K's way (Cobbe et al. 2021).

    A reply's answer is the first number after its last "####", else after its last "answer is", else its last number;
    1,600, $1600 and 1600.00 are the same. The right one stands after "####" in `column`, or is all of it. A wrong
    answer, but one, earns `format_reward`. Raises ValueError where a row gives no right answer.
    """
    if column not in columns:
        raise ValueError(f"the data has no column {column!r}; it has {', '.join(columns) or 'none besides the prompt'}")
    rewards = []
    for response, given in zip(responses, columns[column], strict=True):
        right = None if given is None else stated_number(str(given))
        if right is None:
            raise ValueError(f"the column {column!r} gives no number to compare with: {given!r}")
        answer = stated_number(response)
        rewards.append(0.0 if answer is None else 1.0 if answer == right else format_reward)
    return rewards


def length_window(
    *,
    prompts: list[Messages],
    responses: list[str],
    token_ids: list[list[int]],
    columns: dict[str, list[Any]],
    at_most: int,
    at_least: int = 0,
    fade: int = 0,
) -> list[float]:
    """1 where a reply has `at_least` to `at_most` tokens (the stop token counts), else 0.

    With `fade`, the reward falls in a straight line outside the window and is 0 from `fade` tokens on: a policy just
    outside then sees which way to go.
    """
    if not 0 <= at_least <= at_most or fade < 0:
        raise ValueError(f"expected 0 <= at_least <= at_most and fade >= 0; found {at_least}, {at_most} and {fade}")
    rewards = []
    for ids in token_ids:
        outside = max(at_least - len(ids), len(ids) - at_most, 0)
        rewards.append(max(0.0, 1.0 - outside / fade) if fade else float(outside == 0))
    return rewards


def regular_expression(
    *,
    prompts: list[Messages],
    responses: list[str],
    token_ids: list[list[int]],
    columns: dict[str, list[Any]],
    pattern: str,
    whole: bool = False,
) -> list[float]:
    """1 where `pattern` (Python's `re`; `.` matches line ends too) is found in the reply, or is all of it; else 0."""
    compiled = re.compile(pattern, re.DOTALL)
    match = compiled.fullmatch if whole else compiled.search
    return [float(match(response) is not None) for response in responses]


def stated_number(text: str) -> Decimal | None:
    """The number that a text gives as its answer; None where it gives none."""
    marks = [text.rfind(ANSWER_MARK), max((found.start() for found in _STATED.finditer(text)), default=-1)]
    for mark in marks:
        if mark >= 0 and (numbers := numbers_in(text[mark:])):
            return numbers[0]
    numbers = numbers_in(text)
    return numbers[-1] if numbers else None


def numbers_in(text: str) -> list[Decimal]:
    """Every number of a text, in order: `-1,234.50`, `$72`, `.5`; a full stop after a number is no part of it."""
    numbers = []
    for minus, minus_after, digits in _NUMBER.findall(text):
        number = Decimal(digits.replace(",", ""))
        numbers.append(-number if minus or minus_after else number)
    return numbers
