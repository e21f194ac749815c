"""Which numbers of what is known each of the report's plots shows."""

from __future__ import annotations

import math

import torch

from reward.knowledge import charts
from reward.knowledge.accuracy import Z_95, Share, wilson
from reward.knowledge.charts import Group, Plane, Row
from reward.knowledge.evenly import evenly
from reward.knowledge.markup import Markup
from reward.knowledge.measure import Knowledge
from reward.knowledge.remedies import STRENGTHS, Remedy, effect, penalised

GROUP_NAMES = {"source": "", "turns": "turns", "margin": "given margin", "score margin": "|margin|"}
MOST_ROWS = 24


def accuracy_rows(known: Knowledge) -> Markup:
    """All pairs, those of like length, then every group."""
    m = known.metrics
    whole = Share(m["eval/accuracy"], m["eval/accuracy_low"], m["eval/accuracy_high"], int(m["eval/pairs"]))
    shares = {"all pairs": whole}
    if "eval/accuracy_matched" in m:
        rate, low, high = (m[f"eval/accuracy_matched{end}"] for end in ("", "_low", "_high"))
        shares["of like length"] = Share(rate, low, high, int(m["eval/pairs_matched"]))
    for by, groups in known.groups.items():
        if len(groups) > 1:  # one group is all pairs again
            shares |= {f"{GROUP_NAMES[by]} {group}".strip() or "no source": seen for group, seen in groups.items()}
    rows = [_share_row(name, seen) for name, seen in list(shares.items())[:MOST_ROWS]]
    level = (m["eval/accuracy_longer"], "longer reply")
    return charts.rows_chart("Accuracy by group", rows, _bounds(rows, level[0]), level)


def reliability(known: Knowledge) -> Markup:
    """Accuracy by confidence."""
    titles = ("probability that the reward gives its preference", "how often it is right")
    total = sum(seen.count for seen in known.bins)
    lowest = min([0.4, *(wilson(seen.accuracy, seen.count)[0] - 0.03 for seen in known.bins)])
    plane = Plane("Reliability diagram", (0.5, 1.0), (lowest, 1.0), titles, percent="xy")
    plane.line([(0.5, 0.5), (1.0, 1.0)], "ideal")
    for seen in known.bins:
        low, high = wilson(seen.accuracy, seen.count)
        plane.line([(seen.confidence, low), (seen.confidence, high)], "one")
    for seen in known.bins:
        plane.dot(seen.confidence, seen.accuracy, "one", 3 + 5 * math.sqrt(seen.count / total))
    return plane.svg()


def confidences(known: Knowledge) -> Markup:
    """Pairs by confidence."""
    total = sum(seen.count for seen in known.bins)
    most = max(seen.count for seen in known.bins) / total
    titles = ("probability that the reward gives its preference", "share of pairs")
    plane = Plane("Pairs by confidence", (0.5, 1.0), (0.0, most * 1.08), titles, percent="xy")
    for seen in known.bins:
        plane.bar(seen.low, seen.high, seen.count / total, "one", f"{seen.count:,} pairs")
    return plane.svg()


def scores(known: Knowledge) -> Markup:
    """Scores of the chosen, the rejected and SFT's replies."""
    half = len(known.scores) // 2
    groups = [("chosen", "one", known.scores[:half].tolist()), ("rejected", "two", known.scores[half:].tolist())]
    if known.sample_scores is not None:
        groups.append(("SFT", "three", known.sample_scores.mean(0).tolist()))
    return charts.histogram("Scores by kind of reply", groups, "score")


def margins(known: Knowledge) -> Markup:
    """Margins of the pairs."""
    groups = [("margin", "one", known.margin.mean(0).tolist())]
    return charts.histogram("Margins", groups, "margin: chosen less rejected")


def score_by_length(known: Knowledge) -> Markup:
    """A dot a reply."""
    half = len(known.scores) // 2
    both = torch.cat([known.lengths.chosen, known.lengths.rejected])
    groups = [
        Group("chosen", "one", both[:half].tolist(), known.scores[:half].tolist()),
        Group("rejected", "two", both[half:].tolist(), known.scores[half:].tolist()),
    ]
    slope = known.fit.slope if known.fit is not None else 0.0
    middle = (slope, float(both.mean()), float(known.scores.mean()))
    return charts.scatter("Score by length", groups, ("tokens of the reply", "score"), middle)


def margin_by_length(known: Knowledge) -> Markup:
    """A dot a pair."""
    differences, margin = known.lengths.difference.tolist(), known.margin.mean(0).tolist()
    plane_xs, plane_ys = (charts.padded(charts.trimmed(values)) for values in (differences, margin))
    titles = ("tokens that the chosen reply has more", "margin")
    plane = Plane("Margin by difference in length", plane_xs, plane_ys, titles)
    plane.line([(plane_xs[0], 0.0), (plane_xs[1], 0.0)], "ideal")
    for x, y in evenly(list(zip(differences, margin, strict=True)), charts.MOST_POINTS):
        plane.dot(x, y, "dot one", 2.4)
    return plane.svg()


def disagreement(known: Knowledge) -> Markup:
    """Accuracy by the members' disagreement."""
    rows = [_share_row(f"deviation {part.low:.2g} to {part.high:.2g}", part.accuracy) for part in known.quantiles]
    level = (known.metrics["eval/accuracy"], "all pairs")
    return charts.rows_chart("Accuracy by disagreement", rows, _bounds(rows, level[0]), level)


def perturbations(known: Knowledge) -> Markup:
    """Mean change of the score under each perturbation."""
    rows = []
    for found in known.perturbed:
        mean, error = found.mean_change, Z_95 * found.error
        rows.append(Row(found.name.replace("_", " "), mean, mean - error, mean + error, f"{mean:+.2f} deviations"))
    bounds = charts.padded((min(0.0, *(row.low for row in rows)), max(0.0, *(row.high for row in rows))))
    return charts.rows_chart("Change by perturbation", rows, bounds, (0.0, "no change"), percent=False)


def strengths(known: Knowledge) -> Markup:
    """Accuracy and length correlation as the penalty grows."""
    assert known.fit is not None
    half = len(known.scores) // 2
    tried: list[tuple[float, Remedy]] = []
    for strength in STRENGTHS:
        sides = penalised(known.scores[:half], known.scores[half:], known.lengths, known.fit, strength)
        tried.append((strength, effect("", *sides, known.lengths)))
    curves = {
        "one": [(strength, seen.accuracy.rate) for strength, seen in tried],
        "three": [(strength, seen.matched.rate) for strength, seen in tried if seen.matched is not None],
        "two": [(strength, seen.length_within) for strength, seen in tried if seen.length_within is not None],
    }
    values = [value for curve in curves.values() for _, value in curve]
    titles = ("times the fitted slope", "accuracy; correlation")
    plane = Plane("Measures by strength of the penalty", (0.0, STRENGTHS[-1]), (min(0.0, *values), 1.0), titles)
    for style, curve in curves.items():
        plane.line(curve, style)
        for x, y in curve:
            plane.dot(x, y, style)
    return plane.svg()


def _share_row(name: str, seen: Share) -> Row:
    return Row(name, seen.rate, seen.low, seen.high, f"{seen.rate:.1%} of {seen.count:,}")


def _bounds(rows: list[Row], level: float) -> tuple[float, float]:
    """Room for every interval, for the level they are compared with and for a coin's half."""
    lowest, highest = min(level, *(row.low for row in rows)), max(level, *(row.high for row in rows))
    return max(0.0, min(0.48, lowest - 0.02)), min(1.0, max(0.6, highest + 0.02))
