"""How far annotators agree beyond chance: Cohen's and Fleiss' kappa and Krippendorff's alpha, from NLTK."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

from baton.errors import UserError

Verdict = Literal["a", "b", "tie"]

# of two annotators with fewer pairs in common, kappa is a lottery, and undefined the more often the more they agree
MIN_COMMON = 5


class Judgement(NamedTuple):
    """What one annotator said of one pair. Which reply is a must not depend on who judges, nor on which one won."""

    annotator: str
    pair: str
    verdict: Verdict


@dataclass(frozen=True)
class Agreement:
    """Of the pairs judged by two annotators or more; a coefficient that the data leave undefined is None.

    `cohen`: kappa of every two annotators on the pairs that both judged, at least MIN_COMMON, averaged (Cohen 1960;
    Light 1971).
    `fleiss`: kappa of pairs with the same number of judgements, whoever gave them (Fleiss 1971); the number that most
    pairs have. `alpha`: nominal, whatever the number (Krippendorff 1980).
    """

    annotators: int
    pairs: int
    same: float  # of two judgements of one pair, how many say the same, averaged over pairs
    cohen: float | None
    couples: int  # of annotators, that cohen averages
    fleiss: float | None
    fleiss_pairs: int
    alpha: float | None


def agreement(judgements: Iterable[Judgement]) -> Agreement | None:
    """The agreement of annotators, or None where no pair was judged by two; an annotator's last word on a pair counts.

    Raises UserError where NLTK is not installed.
    """
    by_pair: dict[str, dict[str, Verdict]] = defaultdict(dict)
    for annotator, pair, verdict in judgements:
        by_pair[pair][annotator] = verdict
    shared = {pair: said for pair, said in by_pair.items() if len(said) > 1}
    if not shared:
        return None
    couples = [triples for triples in _couples(shared).values() if len(triples) >= 2 * MIN_COMMON]
    cohens = [kappa for triples in couples if (kappa := _coefficient("kappa", triples)) is not None]
    count = _usual_count(shared)
    even = {pair: list(said.values()) for pair, said in shared.items() if len(said) == count}
    return Agreement(
        annotators=len({annotator for said in shared.values() for annotator in said}),
        pairs=len(shared),
        same=sum(_same(list(said.values())) for said in shared.values()) / len(shared),
        cohen=sum(cohens) / len(cohens) if cohens else None,
        couples=len(cohens),
        # without the names: Fleiss' judges of one pair need not be those of the next
        fleiss=_coefficient("pi", [(str(slot), p, v) for p, said in even.items() for slot, v in enumerate(said)]),
        fleiss_pairs=len(even),
        alpha=_coefficient("alpha", [(who, p, v) for p, said in shared.items() for who, v in said.items()]),
    )


def in_words(found: Agreement) -> str:
    """One line for people."""
    coefficients = (
        ("Cohen's kappa", found.cohen, f" (couples: {found.couples:,})"),
        ("Fleiss' kappa", found.fleiss, f" (pairs: {found.fleiss_pairs:,})"),
        ("Krippendorff's alpha", found.alpha, ""),
    )
    said = [f"{name} " + ("undefined" if value is None else f"{value:.3f}{of}") for name, value, of in coefficients]
    return (
        f"{found.annotators:,} annotators on {found.pairs:,} pairs that two or more judged: {found.same:.1%} the same, "
        + ", ".join(said)
    )


def _couples(shared: dict[str, dict[str, Verdict]]) -> dict[tuple[str, str], list[tuple[str, str, str]]]:
    """NLTK's triples (annotator, pair, verdict) of every two annotators, on the pairs that both judged."""
    couples: dict[tuple[str, str], list[tuple[str, str, str]]] = defaultdict(list)
    for pair, said in shared.items():
        for first, second in combinations(sorted(said), 2):
            couples[first, second] += [(first, pair, said[first]), (second, pair, said[second])]
    return couples


def _coefficient(name: Literal["kappa", "pi", "alpha"], triples: list[tuple[str, str, str]]) -> float | None:
    """A coefficient of NLTK's; its multi-pi is Fleiss' kappa. None where every verdict is the same: 0 by 0."""
    if len({verdict for _, _, verdict in triples}) < 2:
        return None
    task = _annotation_task()(data=triples)
    return float(getattr(task, name)())


def _annotation_task() -> Callable:
    try:
        from nltk.metrics.agreement import AnnotationTask
    except ModuleNotFoundError as error:
        if error.name != "nltk":
            raise
        raise UserError("agreement among annotators needs NLTK: pip install nltk") from None
    return AnnotationTask


def _usual_count(shared: dict[str, dict[str, Verdict]]) -> int:
    """How many judgements most pairs have; of equally common numbers the larger."""
    counts = Counter(len(said) for said in shared.values())
    return max(counts, key=lambda count: (counts[count], count))


def _same(verdicts: list[Verdict]) -> float:
    couples = list(combinations(verdicts, 2))
    return sum(a == b for a, b in couples) / len(couples)
