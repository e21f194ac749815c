"""What is to be judged: prompts with two replies, read from any of the files that hold such."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import Any, NamedTuple

from baton.data import load
from baton.data.faults import BadRow, Unusable
from baton.data.files import Record, describe, locate, read_records
from baton.data.formats import convert
from baton.data.turns import Messages, check_row, say
from baton.errors import UserError
from baton.recipe import Source

_SAME = "both replies are the same"
_AGAIN = "the same pair again"


@dataclass(frozen=True)
class Reply:
    """One of the two: what it says, which model said it (where known), and whether it ran into its length limit."""

    messages: Messages
    model: str | None = None
    digest: str | None = None
    is_cut_off: bool = False


@dataclass(frozen=True)
class Question:
    """A prompt and its replies `a` and `b`, in the file's order; people see them in an order of their own."""

    id: str
    prompt: Messages
    a: Reply
    b: Reply

    @property
    def content(self) -> str:
        """What is judged, as a digest: of two questions with the same one a judgement says the same."""
        return content_digest(self.prompt, self.a.messages, self.b.messages)


class Asked(NamedTuple):
    """The questions of a file in its order, and how many were left out for which reason."""

    questions: list[Question]
    left_out: dict[str, int]


def content_digest(prompt: Messages, one: Messages, other: Messages) -> str:
    """A digest of a prompt and two replies, whichever of them is named first."""
    texts = [json.dumps(part, sort_keys=True) for part in (prompt, one, other)]
    return hashlib.sha256(json.dumps([texts[0], *sorted(texts[1:])]).encode()).hexdigest()


def read_questions(path: str, file_format: str | None) -> Asked:
    """The pairs of one file: of `baton rollout`, of `{prompt, response_a, response_b}`, or preferences of any format.

    path: a file, folder or glob. file_format: of preferences, where their fields do not make it plain. Pairs of which
    no preference can be learned (the same reply twice, half a surrogate pair) are left out and counted; an empty reply
    stays, for people should be able to say that it is bad. Raises UserError for whatever is wrong with the file.
    """
    files = locate(path, Path.cwd())
    if files is None:
        raise UserError(f"{path} is no file here; expected pairs to judge, as `baton rollout REF PROMPTS --n 2` writes")
    records = read_records(files)
    first = next(records)  # an empty file is a UserError already
    left_out: Counter[str] = Counter()
    if isinstance(first.row, dict) and ("replies" in first.row or "response_a" in first.row):
        found = _of_records(chain([first], records), left_out)
    else:
        found = _of_preferences(path, file_format, left_out)
    questions: dict[str, Question] = {}
    for question in found:
        known = questions.setdefault(question.id, question)
        if known is not question:
            if known.content != question.content:
                raise UserError(
                    f"{path} names two different pairs {question.id}; expected one id for each: its judgements could "
                    "not be told apart"
                )
            left_out[_AGAIN] += 1
    if not questions:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in left_out.items())
        raise UserError(f"{path} holds no pair that can be judged ({reasons})")
    return Asked(list(questions.values()), dict(left_out))


def _of_preferences(path: str, file_format: str | None, left_out: Counter[str]) -> Iterator[Question]:
    source = Source.model_validate({"path": path, "format": file_format})
    loaded = load(source, Path.cwd(), "preference")
    left_out.update({drop.reason: drop.count for drop in loaded.dropped})
    for row in loaded.rows:
        # Never by who was preferred: the file of another round of judgements names one pair both ways.
        replies = sorted((row["chosen"], row["rejected"]), key=json.dumps)
        yield _question(row.get("pair"), row["prompt"], Reply(replies[0]), Reply(replies[1]))


def _of_records(records: Iterator[Record], left_out: Counter[str]) -> Iterator[Question]:
    for record in records:
        try:
            for question in _of_row(record.row):
                try:
                    check_row(_checked(question), "preference")
                except Unusable as reason:
                    left_out[_SAME if str(reason) == "chosen equals rejected" else str(reason)] += 1
                else:
                    yield question
        except BadRow as fault:
            raise UserError(f"{record.place} {fault}") from None
        except Unusable as reason:
            left_out[str(reason)] += 1


def _checked(question: Question) -> dict[str, Any]:
    """A row as `check_row` takes it, with a mark in place of one empty reply: two of them are the same reply."""
    row: dict[str, Any] = {"prompt": question.prompt, "chosen": question.a.messages, "rejected": question.b.messages}
    for side in ("chosen", "rejected"):
        if len(row[side]) == 1 and not row[side][0]["content"].strip():
            row[side] = [{**row[side][0], "content": "(empty)"}]
    return row


def _of_row(row: Any) -> list[Question]:
    """The questions of one row; of more than two replies, each two."""
    if not isinstance(row, dict):
        raise BadRow(f"is {describe(row)}; expected an object with a prompt and replies")
    if "response_a" in row or "response_b" in row:
        replies = [_reply(row.get(name), name) for name in ("response_a", "response_b")]
    elif isinstance(row.get("replies"), list):
        replies = [_reply(each, f"replies[{index}]") for index, each in enumerate(row["replies"])]
    else:
        raise BadRow(f"has neither `replies` nor `response_a` and `response_b`; its fields are {', '.join(row)}")
    if len(replies) < 2:
        raise Unusable(f"{len(replies)} replies, and two are needed")
    # the prompt alone, so that no other field of the row is taken for a part of it
    (prompted,) = convert({"prompt": row.get("prompt"), "system": row.get("system")}, "prompts", "prompt")
    pair = row.get("pair", row.get("id"))
    if pair is not None and not isinstance(pair, str | int):
        raise BadRow(f"has {describe(pair)} as `pair`; expected a string")
    questions = []
    for one, other in combinations(range(len(replies)), 2):
        numbered = pair if pair is None or len(replies) == 2 else f"{pair}/{one}-{other}"
        questions.append(_question(numbered, prompted["prompt"], replies[one], replies[other]))
    return questions


def _reply(value: Any, name: str) -> Reply:
    if isinstance(value, str):
        return Reply([say("assistant", value)])
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise BadRow(f"has {describe(value)} as `{name}`; expected a string, or an object with its `text`")
    for field in ("model", "digest"):
        if not isinstance(value.get(field), str | None):
            raise BadRow(f"has {describe(value[field])} as `{name}.{field}`; expected a string")
    is_cut_off = value.get("ended") is False
    return Reply([say("assistant", value["text"])], value.get("model"), value.get("digest"), is_cut_off)


def _question(pair: str | int | None, prompt: Messages, a: Reply, b: Reply) -> Question:
    identity = content_digest(prompt, a.messages, b.messages)[:16] if pair is None else str(pair)
    return Question(identity, prompt, a, b)
