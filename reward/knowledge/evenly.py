"""Some of many, evenly taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def evenly(items: Sequence[T], most: int) -> list[T]:
    """All of `items`, or `most` of them, evenly spaced from the first on: sources that follow one another all count."""
    if len(items) <= most:
        return list(items)
    return [items[at * len(items) // most] for at in range(most)]
