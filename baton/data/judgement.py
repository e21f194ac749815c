"""A judgement: what a preference row tells beside its two replies: ties, margins, who judged, which pair it was."""

from __future__ import annotations

import math
from typing import Any

from baton.data.faults import BadRow, Unusable
from baton.data.files import describe
from baton.data.turns import Messages

# of UltraFeedback's binarized rows, and of those that argilla and others made of them
_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
_TIES = ("tie", "draw", "both_bad", "bothbad", "tie (bothbad)", "tie (both bad)")
_ANNOTATOR = ("annotator", "annotator_id", "judge")
_PAIR = ("pair", "pair_id")


def judgement_of(row: dict) -> dict[str, Any]:
    """The keys of a normalised preference row beside prompt, chosen and rejected; each only where the row tells it.

    `is_tie`: True, from `is_tie`, `tie`, `both_bad`, or `label` or `winner` that say so. `margin`: by how much the
    chosen reply is better, in the source's own unit, from `margin` or the difference of two scores; a tie has none.
    `annotator`, `pair`: strings. Raises BadRow where a field is not what it should be, and Unusable where the scores
    contradict the choice.
    """
    margin = _margin(row)
    facts: dict[str, Any] = {}
    if _is_tie(row):
        facts["is_tie"] = True
    elif margin is not None:
        if margin < 0:
            raise Unusable("scores contradict the choice")
        facts["margin"] = margin
    for key, names in (("annotator", _ANNOTATOR), ("pair", _PAIR)):
        if (name := _named(row, names)) is not None:
            facts[key] = name
    return facts


def check_judged(row: dict) -> None:
    """Raises Unusable for a row that the annotator skipped; its replies need not be there."""
    if _flag(row, "skipped"):
        raise Unusable("skipped by the annotator")


def by_winner(row: dict, first: Messages, second: Messages) -> tuple[Messages, Messages]:
    """(chosen, rejected) of replies a and b as the row's `winner` says; a tie leaves them as they are."""
    winner = row.get("winner")
    named = winner.strip().lower().removeprefix("model_") if isinstance(winner, str) else None
    if named in ("a", "b") or _is_tie(row):
        return (second, first) if named == "b" else (first, second)
    found = repr(winner) if isinstance(winner, str) else describe(winner)
    raise BadRow(f"has {found} as `winner`; expected model_a, model_b, tie or tie (bothbad)")


def part_ways(first: Messages, second: Messages) -> tuple[Messages, Messages, Messages]:
    """(prompt, reply, reply) of two whole dialogues: what both begin with, and each side from the first difference on.

    Raises Unusable where the user says something else in one than in the other: then the replies answer other prompts.
    """
    asked = [[turn for turn in side if turn["role"] != "assistant"] for side in (first, second)]
    if asked[0] != asked[1]:
        raise Unusable("prompts differ")
    limit = max(0, min(len(first), len(second)) - 1)
    same = next((at for at in range(limit) if first[at] != second[at]), limit)
    return first[:same], first[same:], second[same:]


def _is_tie(row: dict) -> bool:
    if any([_flag(row, "is_tie"), _flag(row, "tie"), _flag(row, "both_bad")]):
        return True
    words = [row.get("label"), row.get("winner")]
    # labels mean many things beside: a topic, a class; only these say that neither reply is better
    return row.get("label") == 0.5 or any(isinstance(word, str) and word.strip().lower() in _TIES for word in words)


def _flag(row: dict, name: str) -> bool:
    value = row.get(name)
    if value not in (None, True, False):
        raise BadRow(f"has {describe(value)} as `{name}`; expected true or false")
    return bool(value)


def _margin(row: dict) -> float | None:
    if row.get("margin") is not None:
        return _number(row, "margin")
    for better, worse in _SCORES:
        if row.get(better) is not None and row.get(worse) is not None:
            return _number(row, better) - _number(row, worse)
    return None


def _number(row: dict, name: str) -> float:
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"has {describe(value)} as `{name}`; expected a number")
    if not math.isfinite(value):
        raise BadRow(f"has {value} as `{name}`; expected a finite number")
    return float(value)


def _named(row: dict, names: tuple[str, ...]) -> str | None:
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        return None
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRow(f"has {describe(value)} as `{name}`; expected a string or a whole number")
    return str(value)
