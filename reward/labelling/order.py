"""In which order, and on which side, somebody sees what is to be judged: functions of (seed, annotator, pair)."""

import hashlib
import json

from reward.labelling.questions import Question

# Everybody works through the same blocks, each in an order of their own: whoever stops early has still judged mostly
# what the others did, so that agreement can be measured, and no pair always comes first, before anyone is warmed up.
BLOCK = 10


def order(seed: int, annotator: str, questions: list[Question]) -> list[Question]:
    """All questions, in the order in which `annotator` is asked."""
    shared = sorted(questions, key=lambda question: _digest(seed, "block", question.id))
    found = []
    for start in range(0, len(shared), BLOCK):
        found += sorted(shared[start : start + BLOCK], key=lambda q: _digest(seed, "place", annotator, q.id))
    return found


def is_swapped(seed: int, annotator: str, question: Question) -> bool:
    """Whether `annotator` sees the reply `b` first."""
    return bool(_digest(seed, "side", annotator, question.id)[0] & 1)


def page_key(seed: int, question: Question) -> str:
    """The name of a question on the page: its id may say which models replied."""
    return _digest(seed, "key", question.id).hex()[:24]


def _digest(*parts: str | int) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()
