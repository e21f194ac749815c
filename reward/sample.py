"""One reply to be judged, and the error that stops a run when it cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from baton.chat import Messages

SHOWN_CHARACTERS = 600


@dataclass(frozen=True)
class Sample:
    """A prompt, the policy's reply to it, and what else the data row says.

    `response_ids` are the policy's own tokens, the stop token included where the reply ended by itself; `response` is
    their text without special tokens. `columns` are the row's further fields, such as the right answer.
    """

    prompt: Messages
    prompt_ids: list[int]
    response_ids: list[int]
    response: str
    columns: dict[str, Any]


class RewardError(RuntimeError):
    """A reward failed, or is no finite number. A run stops: a zero in its place would be trained on as a judgement."""


def failure(label: str, what: str, samples: Sequence[Sample]) -> RewardError:
    """The error for `samples`, of which the first is shown: what went wrong with which reward on which row."""
    first = samples[0]
    many = f" (the first of the {len(samples)} rows that were sent together)" if len(samples) > 1 else ""
    prompt = " / ".join(f"{message['role']}: {message['content']}" for message in first.prompt)
    return RewardError(
        f"reward {label}: {what}\n  prompt{many}: {_shortened(prompt)}\n  response: {_shortened(first.response)}"
    )


def shown(value: object) -> str:
    """A value as an error message quotes it."""
    return _shortened(repr(value))


def _shortened(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} … {text[-half:]}"
