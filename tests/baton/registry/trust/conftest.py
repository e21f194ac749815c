"""A clock of the tests' own: every record is a second after the one before, so that their order is known."""

from datetime import UTC, datetime, timedelta
from itertools import count

import pytest

from baton.registry import provenance


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a second pass between any two looks at the clock."""
    begun, seconds = datetime(2026, 1, 1, tzinfo=UTC), count()
    monkeypatch.setattr(
        provenance, "now", lambda: (begun + timedelta(seconds=next(seconds))).strftime("%Y-%m-%dT%H:%M:%SZ")
    )
