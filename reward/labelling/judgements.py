"""A judgement as the line of a file that training reads: made of a choice, and read back."""

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from reward.labelling.questions import Question, content_digest

Choice = Literal["first", "second", "tie", "bad", "skip"]  # of the replies as they were shown
Outcome = Literal["a", "b", "tie", "bad", "skip"]  # a: the reply whose text sorts first, however a file orders them
CHOICES: tuple[str, ...] = get_args(Choice)


class NoJudgement(Exception):
    """A line is not one of ours; the message says what is missing."""


@dataclass(frozen=True)
class Judgement:
    """What a line says, without its texts. `id` is of the line, `content` of the pair that it judges."""

    id: str
    pair: str
    annotator: str
    choice: Choice
    outcome: Outcome
    content: str


def make_line(question: Question, annotator: str, choice: Choice, is_swapped: bool) -> bytes:
    """The judgement as one line of JSON, its line end included.

    A row of preferences: `chosen` and `rejected` are messages. Where there is no winner (`is_tie`, also `both_bad`, or
    `skipped`) they are a and b. `shown` and `choice` say where on the page each reply was, for whoever looks for
    annotators with a favourite side.
    """
    a, b = question.a, question.b
    chosen, rejected = (b, a) if choice in ("first", "second") and (choice == "first") == is_swapped else (a, b)
    row: dict[str, Any] = {
        "pair": question.id,
        "annotator": annotator,
        "prompt": question.prompt,
        "chosen": chosen.messages,
        "rejected": rejected.messages,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "models": {"chosen": chosen.model, "rejected": rejected.model},
        "shown": "ba" if is_swapped else "ab",
        "choice": choice,
    }
    if chosen.digest or rejected.digest:
        row["digests"] = {"chosen": chosen.digest, "rejected": rejected.digest}
    if choice in ("tie", "bad"):
        row["is_tie"] = True
    if choice == "bad":
        row["both_bad"] = True
    if choice == "skip":
        row["skipped"] = True
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def read_line(line: bytes) -> Judgement:
    """What a line says. Raises NoJudgement if it is not one that `make_line` writes."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise NoJudgement("is not JSON") from error
    if not isinstance(row, dict):
        raise NoJudgement("is no object")
    for field, kind in (("pair", str), ("annotator", str), ("prompt", list), ("chosen", list), ("rejected", list)):
        if not isinstance(row.get(field), kind):
            raise NoJudgement(f"has no `{field}`")
    choice = row.get("choice")
    if choice not in CHOICES or row.get("shown") not in ("ab", "ba"):
        raise NoJudgement("has no `choice` and `shown`")
    outcome: Outcome = choice
    if choice in ("first", "second"):
        # not by the places a and b: a file that comes back with its replies swapped must not turn verdicts round
        outcome = "a" if _text(row["chosen"]) <= _text(row["rejected"]) else "b"
    content = content_digest(row["prompt"], row["chosen"], row["rejected"])
    identity = hashlib.sha256(line.strip()).hexdigest()[:24]
    return Judgement(identity, row["pair"], row["annotator"], choice, outcome, content)


def _text(messages: list[Any]) -> str:
    return json.dumps(messages, sort_keys=True)
