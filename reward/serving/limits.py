"""How much one request may ask for, and the refusal that says so."""

from __future__ import annotations

from dataclasses import dataclass

DEEPEST = 32
"""Brackets inside one another: the schema itself has four, the rest is for columns."""


@dataclass(frozen=True)
class Limits:
    """What a server takes; beyond it, a request is refused by a message of its own."""

    num_bytes: int = 8 << 20  # of a body
    num_rows: int = 1024  # of a request
    row_tokens: int = 8192  # of prompt and reply together
    queue: int = 64  # requests being read, waiting and scored at a time
    body_s: float = 30.0  # for a body to arrive


class RefusedError(Exception):
    """A request that is not answered with rewards: its HTTP status, and a message for whoever sent it.

    Messages hold names, places and numbers, never the text of a prompt or a reply: they are logged.
    """

    def __init__(self, status: int, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s
