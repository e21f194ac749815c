"""Any source is checked: one finite number a row, or an error that names the row."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from reward.sources import RewardError, Sample, checked
from tests.reward.conftest import ROWS


class Odd:
    """A source of somebody else's."""

    label, weight = "odd", 1.0

    def __init__(self, result: Any) -> None:
        self.result = result

    def score(self, samples: Sequence[Sample]) -> list[float]:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_any_source_is_checked() -> None:
    with pytest.raises(RewardError, match="reward odd: it gave 1 rewards for 3 rows") as caught:
        checked(Odd([1.0]), ROWS)
    assert "user: one" in str(caught.value)
    with pytest.raises(RewardError, match="reward odd: it raised OSError: no GPU"):
        checked(Odd(OSError("no GPU")), ROWS)


def test_long_texts_are_shortened_in_the_middle() -> None:
    long = Sample([{"role": "user", "content": "p" * 5000}], [1], [2], "start" + "r" * 5000 + "end", {})
    with pytest.raises(RewardError) as caught:
        checked(Odd([math.nan]), [long])
    assert len(str(caught.value)) < 1500 and "start" in str(caught.value) and "end" in str(caught.value)
