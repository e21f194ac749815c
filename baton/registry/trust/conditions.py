"""Conditions on a metric, as a gate states them: `reward_accuracy >= 0.7`, `eval/win_rate > current`.

    condition = metric operator right
    metric    = one word without '<', '>', '=', '!' (eval/win_rate, kl_nats, top-1)
    operator  = ">=" | "<=" | ">" | "<" | "=="
    right     = number | "current" [("+" | "-") number]      current: what the alias means now
"""

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from baton.errors import UserError, nearest

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}
_DIGITS = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_NUMBER = re.compile(rf"[+-]?{_DIGITS}")
_CONDITION = re.compile(r"(?P<metric>[^\s<>=!]+)\s*(?P<operator>[<>=!]+)\s*(?P<right>[^\s<>=!].*)")
_CURRENT = re.compile(rf"current(?:\s*(?P<sign>[+-])\s*(?P<margin>{_DIGITS}))?")
_FORMS = "`metric >= 0.7`, or `metric > current` (better than what the alias means now; also `current - 0.01`)"


@dataclass(frozen=True)
class Condition:
    """`metric operator number`, or, with `is_relative`, `metric operator current + number`."""

    metric: str
    operator: str
    number: float
    is_relative: bool = False

    def __str__(self) -> str:
        """The one spelling, which `parse` reads back."""
        right = _spelled(self.number)
        if self.is_relative:
            right = "current"
            if self.number:
                right += f" {'-' if self.number < 0 else '+'} {_spelled(abs(self.number))}"
        return f"{self.metric} {self.operator} {right}"

    def holds(self, value: float, current: float = 0.0) -> bool:
        """Whether it holds of a value; current: the value to compare with. Nothing holds of nan or infinity."""
        right = current + self.number if self.is_relative else self.number
        return math.isfinite(value) and math.isfinite(right) and OPERATORS[self.operator](value, right)


def parse(text: str) -> Condition:
    """Read a condition; raises UserError that says what of it was not understood."""
    found = _CONDITION.fullmatch(text.strip())
    if found is None:
        raise UserError(f"{text!r} is not a condition; expected {_FORMS}.")
    if found["operator"] not in OPERATORS:
        raise UserError(f"{text!r}: {found['operator']!r} is none of {', '.join(OPERATORS)}.")
    right = found["right"]
    relative = _CURRENT.fullmatch(right)
    if relative:
        number = float(f"{relative['sign']}{relative['margin']}") if relative["margin"] else 0.0
    elif _NUMBER.fullmatch(right):
        number = float(right)
    else:
        meant = " Did you mean current?" if nearest(right.casefold(), ["current"]) else ""
        raise UserError(f"{text!r}: {right!r} is neither a number nor `current`; expected {_FORMS}.{meant}")
    if not math.isfinite(number):
        raise UserError(f"{text!r}: {right!r} is too large for a number.")
    return Condition(found["metric"], found["operator"], number, relative is not None)


def _spelled(number: float) -> str:
    return repr(number).removesuffix(".0")
