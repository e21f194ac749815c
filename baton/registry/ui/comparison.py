"""Versions side by side: their metrics with the best marked, and the settings in which their recipes differ."""

from typing import Any, NamedTuple

from baton.registry.travel.card import flatten, is_number, measured, show
from baton.registry.trust.attestations import Attestation

# By the last words of a metric's name; whatever is not listed has no direction, and nothing is marked.
_HIGHER = ("accuracy", "reward", "score", "margin", "win_rate", "f1", "bleu", "rouge", "auc", "exact_match")
_LOWER = (
    *("loss", "perplexity", "kl", "kl_nats", "bits_per_byte", "bits_per_token", "surprisal", "nll"),
    *("error", "error_rate", "calibration_error", "brier", "ece"),
)


class Cell(NamedTuple):
    """One value as text; `is_best` among its row, by the metric's known direction."""

    text: str
    is_best: bool = False


class Line(NamedTuple):
    """A row: what it is, which direction is better ("higher", "lower" or None), and a cell for each version."""

    name: str
    direction: str | None
    cells: list[Cell]


def metrics_of(manifest: dict[str, Any], said: list[Attestation]) -> dict[str, Any]:
    """A version's metrics by name; what an evaluation attests has its author's name, and replaces nothing."""
    found: dict[str, Any] = {}
    for each in measured(manifest, said):
        name, count = f"{each.name} (by {each.by})" if each.by else each.name, 1
        while (key := name if count == 1 else f"{name} #{count}") in found:
            count += 1
        found[key] = each.value
    return found


def direction(name: str) -> str | None:
    """Whether "higher" or "lower" values of a metric are better, by its name; None when it does not say."""
    last = name.lower().partition(" (by ")[0].split("/")[-1]
    for known, answer in ((_LOWER, "lower"), (_HIGHER, "higher")):
        if any(last == word or last.endswith(f"_{word}") for word in known):
            return answer
    return None


def metric_lines(columns: list[dict[str, Any]]) -> list[Line]:
    """A line for each metric that some version has."""
    lines = []
    for name in dict.fromkeys(name for column in columns for name in column):
        values = [column.get(name) for column in columns]
        better = direction(name)
        best = _best(values, better)
        cells = [
            Cell("" if value is None else show(value), best is not None and is_number(value) and value == best)
            for value in values
        ]
        lines.append(Line(name, better, cells))
    return lines


def _best(values: list[Any], better: str | None) -> float | None:
    numbers = [value for value in values if is_number(value)]
    if better is None or len(set(numbers)) < 2:
        return None
    return max(numbers) if better == "higher" else min(numbers)


def differing_lines(columns: list[dict[str, Any]]) -> list[Line]:
    """A line for each setting in which the recipes differ."""
    flat = [flatten(column, ".") for column in columns]
    lines = []
    for name in sorted({name for column in flat for name in column}):
        texts = [show(column[name]) if name in column else "" for column in flat]
        if len(set(texts)) > 1:
            lines.append(Line(name, None, [Cell(text) for text in texts]))
    return lines
