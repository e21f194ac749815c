"""Held-out questions whose answers are known: what a model gets right, and what it makes up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.chat import encode_prompt, stop_ids
from baton.data import load
from baton.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from baton.recipe import Source

UNKNOWN = "unknown"
"""The group of questions that have no true answer: there, `answers` lists the ways to admit it."""


@dataclass(frozen=True)
class Question:
    """A prompt, the strings that make a reply right, and the group it is counted in."""

    prompt: list[dict[str, Any]]
    answers: list[str]
    group: str


def load_questions(sources: Sequence[Source], folder: Path) -> list[Question]:
    """The questions of all sources; relative paths start at `folder`. Raises UserError that names the file."""
    return [q for source in sources for q in read_questions(load(source, folder, "prompt").rows, source.path)]


def read_questions(rows: list[dict[str, Any]], path: str = "data.questions") -> list[Question]:
    """Questions from `prompts` rows with the columns `answers` (a list of strings) and `group`."""
    questions = []
    for number, row in enumerate(rows, start=1):
        answers, group = row["columns"].get("answers"), row["columns"].get("group")
        if not isinstance(answers, list) or not answers or not isinstance(group, str):
            raise UserError(
                f"{path}: row {number} has no list `answers` and string `group` beside its prompt; it has "
                f"{', '.join(sorted(row['columns'])) or 'no other columns'}"
            )
        questions.append(Question(row["prompt"], [str(answer) for answer in answers], group))
    return questions


def is_right(question: Question, reply: str) -> bool:
    """Whether the reply contains one of the question's answers; case and runs of spaces do not count."""
    said = " ".join(reply.casefold().split())
    return any(" ".join(answer.casefold().split()) in said for answer in question.answers)


def ask(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    max_new_tokens: int = 48,
) -> tuple[dict[str, float], list[str]]:
    """Greedy replies to `questions`, and their metrics.

    Returns (metrics, see `grade`; replies in the order of the questions).
    """
    from baton.decode import decode

    if not questions:
        return {}, []
    prompts = [encode_prompt(tokenizer, question.prompt) for question in questions]
    assert tokenizer.pad_token_id is not None
    replies = decode(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids(tokenizer),
        pad_id=int(tokenizer.pad_token_id),
    )
    texts = [str(tokenizer.decode(reply.ids, skip_special_tokens=True)) for reply in replies]
    return grade(questions, texts, [reply.ended for reply in replies]), texts


def grade(questions: list[Question], replies: list[str], ended: list[bool]) -> dict[str, float]:
    """`mentions/GROUP`: the share of replies that contain an answer; `answers/GROUP`: of those that also ended.

    A reply that runs on until it is cut off answers nothing, whatever it brushes past. For the unknown group also
    `inventions/unknown`: the share of replies that are no answer there, an answer being to admit it.
    """
    asked = Counter(question.group for question in questions)
    hits = [is_right(question, reply) for question, reply in zip(questions, replies, strict=True)]
    mentions = Counter(q.group for q, hit in zip(questions, hits, strict=True) if hit)
    right = Counter(q.group for q, hit, end in zip(questions, hits, ended, strict=True) if hit and end)
    metrics = {f"answers/{group}": right[group] / count for group, count in sorted(asked.items())}
    metrics |= {f"mentions/{group}": mentions[group] / count for group, count in sorted(asked.items())}
    if UNKNOWN in asked:
        metrics["inventions/unknown"] = 1 - metrics[f"answers/{UNKNOWN}"]
    return metrics
