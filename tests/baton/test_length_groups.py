"""Groups of like length: the budget holds, and a group that is busy enough takes nothing that is mostly padding."""

import pytest

from baton.length_groups import groups


@pytest.mark.parametrize(
    ("max_tokens", "enough", "expected"),
    [
        (1000, None, [[900], [600], [100, 90, 85, 40, 10]]),
        (2000, None, [[900, 600], [100, 90, 85, 40, 10]]),
        (2000, 256, [[900], [600], [100, 90, 85], [40, 10]]),  # three of 100 are 256 at least; 80 and more would do
        (2000, 300, [[900], [600], [100, 90, 85], [40, 10]]),
        (2000, 301, [[900], [600], [100, 90, 85, 40], [10]]),
        (200, 1000, [[900], [600], [100, 90], [85, 40], [10]]),  # the budget comes first
    ],
)
def test_what_lies_together(max_tokens: int, enough: int | None, expected: list[list[int]]) -> None:
    widths = [10, 600, 90, 40, 900, 100, 85]
    found = groups(widths, 1, max_tokens, enough)
    assert [[widths[at] for at in group] for group in found] == expected
