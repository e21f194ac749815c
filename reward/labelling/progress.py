"""How far everybody is and how far they agree, told so that it sways nobody's next judgement."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from reward.labelling.judgements import Judgement
from reward.labelling.names import annotator_key
from reward.labelling.questions import Question

# Told anew at every common pair, agreement would tell how the other judged the pair that one just judged, and one
# could take it back. So only whole tens of common pairs count, and the figure says nothing of any of them.
STEP = 10


@dataclass(frozen=True)
class Standing:
    """One annotator's progress: how many of the questions are judged, how many of those skipped."""

    annotator: str
    done: int
    skipped: int
    total: int


@dataclass(frozen=True)
class Accord:
    """How two annotators agree over `common` pairs: the better reply the same, or no winner for both.

    `agreement` is the fraction of equal judgements, `kappa` Cohen's: None where it is not defined, because both always
    say the same one thing.
    """

    first: str
    second: str
    common: int
    agreement: float
    kappa: float | None


def standings(judgements: Iterable[Judgement], questions: Sequence[Question]) -> list[Standing]:
    """Everybody's progress over these questions, by name."""
    asked = {question.id for question in questions}
    names: dict[str, str] = {}
    done: dict[str, int] = {}
    skipped: dict[str, int] = {}
    for each in judgements:
        key = annotator_key(each.annotator)
        names.setdefault(key, each.annotator)
        done[key] = done.get(key, 0) + (each.pair in asked)
        skipped[key] = skipped.get(key, 0) + (each.pair in asked and each.choice == "skip")
    return [Standing(names[key], done[key], skipped[key], len(questions)) for key in sorted(names)]


def accords(judgements: Iterable[Judgement]) -> list[Accord]:
    """The agreement of every two annotators who have judged at least STEP pairs both; skipped ones do not count."""
    outcomes: dict[str, dict[str, tuple[int, str]]] = {}
    names: dict[str, str] = {}
    for place, each in enumerate(judgements):
        if each.outcome != "skip":
            key = annotator_key(each.annotator)
            names.setdefault(key, each.annotator)
            said = "neither" if each.outcome in ("tie", "bad") else each.outcome
            outcomes.setdefault(key, {}).setdefault(each.pair, (place, said))
    found = []
    for one, other in combinations(sorted(outcomes), 2):
        mine, theirs = outcomes[one], outcomes[other]
        # by when the second of them judged it
        common = sorted(mine.keys() & theirs.keys(), key=lambda pair: max(mine[pair][0], theirs[pair][0]))
        common = common[: len(common) // STEP * STEP]
        if common:
            sides = [mine[pair][1] for pair in common], [theirs[pair][1] for pair in common]
            equal = sum(map(str.__eq__, *sides)) / len(common)
            found.append(Accord(names[one], names[other], len(common), equal, _kappa(*sides)))
    return found


def _kappa(one: Sequence[str], other: Sequence[str]) -> float | None:
    from reward.agreement import Judgement as Said
    from reward.agreement import agreement

    verdicts: dict[str, Literal["a", "b", "tie"]] = {"a": "a", "b": "b", "neither": "tie"}
    said = [
        Said(who, str(place), verdicts[label])
        for who, labels in (("one", one), ("other", other))
        for place, label in enumerate(labels)
    ]
    found = agreement(said)
    return found.cohen if found else None
