"""Pairs of given lengths, and scores for them."""

from collections.abc import Callable
from typing import Any

import pytest

from reward.pairs import Pair


@pytest.fixture
def make_pair() -> Callable[..., Pair]:
    """A pair whose replies have so many tokens behind 2 common ones; what else it is by keyword."""

    def make(num_chosen: int, num_rejected: int, /, **given: Any) -> Pair:
        fields: dict[str, Any] = {
            "prompt": [{"role": "user", "content": "Q"}],
            "chosen": [{"role": "assistant", "content": "good."}],
            "rejected": [{"role": "assistant", "content": "bad."}],
            "source": "a.jsonl",
            "turns": 1,
        }
        return Pair([5, 6, *[7] * num_chosen], [5, 6, *[8] * num_rejected], 2, **(fields | given))

    return make
