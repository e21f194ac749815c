"""reward_report.html: all that is known of a reward on one page, without a script and without another file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from reward.knowledge import plots
from reward.knowledge.accuracy import Z_95
from reward.knowledge.findings import findings
from reward.knowledge.markup import Markup, element, joined
from reward.knowledge.measure import Knowledge
from reward.knowledge.perturbations import PERTURBATIONS
from reward.knowledge.remedies import Remedy

LEVEL_NAMES = {"good": "good", "mind": "mind", "bad": "beware"}
EXAMPLE = "Paris. It lies on the Seine."
REMEDY_NAMES = {
    "none": "as it is",
    "length_penalty": "length penalty",
    "reference_shaping": "less SFT's reply",
    "both": "both",
}


def write_report(path: Path, known: Knowledge, *, name: str, facts: Mapping[str, str] | None = None) -> None:
    """Write the page. name: the reward's, as its title; facts: what else a reader should know, label -> text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(known, name, facts or {}), encoding="utf-8")


def page(known: Knowledge, name: str, facts: Mapping[str, str]) -> str:
    """The whole document."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    shown = " · ".join(f"{label}: {text}" for label, text in facts.items())
    sections: Sequence[Callable[[Knowledge], Markup]] = (
        _findings,
        _accuracy,
        _calibration,
        _scale,
        _length,
        _ensemble,
        _robustness,
        _remedies,
        _all_metrics,
    )
    head = element(
        "head",
        {},
        element("meta", {"charset": "utf-8"}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("title", {}, f"Reward report: {name}"),
        element("style", {}, Markup(style)),
    )
    title = [element("h1", {}, name), element("p", {"class": "quiet"}, shown or "Reward report"), _tiles(known)]
    body = element("body", {}, element("main", {}, *title, *(section(known) for section in sections)))
    return f"<!doctype html>\n{element('html', {'lang': 'en'}, head, body)}\n"


def _tiles(known: Knowledge) -> Markup:
    m = known.metrics
    interval = f"{m['eval/accuracy_low']:.1%} to {m['eval/accuracy_high']:.1%} on {m['eval/pairs']:,.0f} pairs"
    tiles = [
        (f"{m['eval/accuracy']:.1%}", f"accuracy, {interval}"),
        (f"{m['eval/accuracy_longer']:.1%}", "accuracy of always preferring the longer reply"),
        (f"{m['eval/calibration_error']:.3f}", "expected calibration error"),
    ]
    if "eval/length_correlation_within" in m:
        tiles.append((f"{m['eval/length_correlation_within']:+.2f}", "correlation with length, within prompts"))
    if "sft/score_mean" in m:
        said = f"{m['sft/score_mean']:.2f} ± {m['sft/score_deviation']:.2f}"
        tiles.append((said, f"score of {m['sft/samples']:,.0f} SFT replies, mean and deviation"))
    shown = (element("div", {"class": "tile"}, element("b", {}, a), element("span", {}, b)) for a, b in tiles)
    return element("div", {"class": "tiles"}, *shown)


def _findings(known: Knowledge) -> Markup:
    items = [
        element(
            "li",
            {},
            element("span", {"class": f"tag {found.level}"}, LEVEL_NAMES[found.level]),
            element("div", {}, element("b", {}, f"{found.title}. "), found.text),
        )
        for found in findings(known)
    ]
    return _section("In short", element("ul", {"class": "findings"}, *items))


def _accuracy(known: Knowledge) -> Markup:
    said = (
        "Share of held-out pairs in which the chosen reply has the higher score, equal scores counting half, with "
        "Wilson's 95% interval. The dashed line is what always preferring the longer reply gets."
    )
    content = [
        _prose(said),
        _figure("wide", "By group", "Dots are shares, lines their intervals.", plots.accuracy_rows(known)),
    ]
    if "eval/ties" in known.metrics:
        apart = known.metrics.get("eval/tie_auroc")
        ties = f"{known.metrics['eval/ties']:,.0f} pairs that were judged equal are left out of every other figure. "
        ties += f"Their mean |margin| is {known.metrics['eval/tie_margin']:.3f}"
        ties += "." if apart is None else f"; |margin| tells a decided pair from a tie with AUROC {apart:.2f}."
        content.append(_prose(ties))
    return _section("Accuracy", *content)


def _calibration(known: Knowledge) -> Markup:
    m = known.metrics
    said = (
        "Bradley-Terry takes sigmoid(margin) for the probability of a preference. Pairs are put in ten "
        "bins of equal width by the probability that the reward gives its own preference (0.5 to 1); the error is "
        "the mean distance of accuracy from it (Guo et al. 2017, eq. 3). A perfectly calibrated reward would show "
        f"{m['eval/calibration_noise']:.3f} on so many pairs by chance. The temperature that fits the margins best is "
        f"{m['eval/temperature']:.2f}: above 1 they claim too much."
    )
    drawn = (
        _figure(
            "",
            "Reliability",
            "Accuracy of each bin, with its interval; the larger a dot, the more pairs. Dashed: perfect.",
            plots.reliability(known),
        ),
        _figure("", "Confidence", "How many pairs each bin holds.", plots.confidences(known)),
    )
    return _section("Calibration", _prose(said), _plots(*drawn))


def _scale(known: Knowledge) -> Markup:
    said = "A Bradley-Terry score has no zero of its own: only differences between replies to one prompt mean anything."
    if known.sample_scores is not None:
        m = known.metrics
        said += (
            f" The {m['sft/samples']:,.0f} replies sampled from the SFT model ({m['sft/tokens']:.0f} tokens on average,"
            f" {m['sft/ended']:.0%} ended by themselves) score {m['sft/score_mean']:.3f} ± "
            f"{m['sft/score_deviation']:.3f}: the scale on which PPO begins, and by which it normalises."
        )
    legend = [("one", "chosen"), ("two", "rejected")]
    legend += [("three", "SFT's replies")] if known.sample_scores is not None else []
    drawn = (
        _figure("", "Scores", "Share of replies by score.", plots.scores(known), legend),
        _figure("", "Margins", "Share of pairs by chosen less rejected.", plots.margins(known)),
    )
    return _section("Scale", _prose(said), _plots(*drawn))


def _length(known: Knowledge) -> Markup:
    m = known.metrics
    said = (
        "Length in tokens behind the prompt. Pairs of like length are those whose shorter reply lacks at most a tenth "
        "of the longer one. Within prompts, what a prompt does to score and length is taken away first."
    )
    header = ["", "pairs", "accuracy", "95% interval", "longer reply"]
    rows = [["all pairs", f"{m['eval/pairs']:,.0f}", *_interval(m, ""), f"{m['eval/accuracy_longer']:.1%}"]]
    if "eval/accuracy_matched" in m:
        longer = f"{m['eval/accuracy_longer_matched']:.1%}"
        rows.append(["of like length", f"{m['eval/pairs_matched']:,.0f}", *_interval(m, "_matched"), longer])
    words = {"eval/length_correlation": "over all replies", "eval/length_correlation_within": "within prompts"}
    found = "; ".join(f"{m[key]:+.3f} {where}" for key, where in words.items() if key in m)
    legend = [("one", "chosen"), ("two", "rejected"), ("ink", "fitted within prompts")]
    drawn = [_figure("", "Score by length", "One dot a reply.", plots.score_by_length(known), legend)]
    drawn.append(_figure("", "Margin by difference in length", "One dot a pair.", plots.margin_by_length(known)))
    correlations = _prose(f"Correlation of score and length: {found}.") if found else Markup("")
    return _section("Length", _prose(said), _table(header, rows), correlations, _plots(*drawn))


def _ensemble(known: Knowledge) -> Markup:
    m = known.metrics
    if "eval/agreement" not in m:
        return Markup("")
    members = [m[f"eval/accuracy/member/{k}"] for k in range(len(known.margin))]
    said = (
        f"{len(members)} members, {min(members):.1%} to {max(members):.1%} accurate by themselves, "
        f"{m['eval/accuracy']:.1%} together. All agree on {m['eval/agreement']:.1%} of pairs, two of them on "
        f"{m['eval/agreement_pairwise']:.1%}."
    )
    if "eval/deviation_auroc" in m:
        said += (
            f" The deviation of the margin over members tells errors from right answers with AUROC "
            f"{m['eval/deviation_auroc']:.2f}; a small |margin| alone does with {m['eval/error_auroc']:.2f}."
        )
    caption = "Accuracy of the mean in parts of equal size, by the margin's deviation over members."
    return _section("Ensemble", _prose(said), _figure("wide", "By disagreement", caption, plots.disagreement(known)))


def _robustness(known: Knowledge) -> Markup:
    if not known.perturbed:
        return Markup("")
    said = (
        "Each change leaves a reply no better. Changes of the score are in deviations of the score (of SFT's replies, "
        "where there are any). “Turned over”: pairs in the right order that are no longer once the rejected reply "
        "alone is changed. The phrases are English."
    )
    header = ["change", "example", "replies", "mean change", "score rises", "turned over"]
    rows = []
    for found in known.perturbed:
        text = PERTURBATIONS[found.name](EXAMPLE).replace("\n\n", " ¶ ") if found.name in PERTURBATIONS else ""
        over = "–" if found.flipped is None else f"{found.flipped:.0%} of {found.num_ordered:,}"
        change, risen = f"{found.mean_change:+.2f}", f"{found.risen:.0%}"
        rows.append([found.name.replace("_", " "), text, f"{len(found.changes):,}", change, risen, over])
    figure = _figure("wide", "Mean change", "With its 95% interval.", plots.perturbations(known))
    return _section("Robustness", _prose(said), figure, _table(header, rows, texts=(0, 1), marked=3))


def _remedies(known: Knowledge) -> Markup:
    if len(known.remedies) < 2:
        return Markup("")
    said = "What each remedy would do to the measures above, on the same pairs. "
    if known.fit is not None:
        said += (
            f"The length penalty takes {known.fit.slope:+.5f} ± {known.fit.error:.5f} a token from the score, the "
            f"least-squares worth of a token within prompts on {known.fitted_on}; a reply of "
            f"{known.fit.mean_tokens:.0f} tokens keeps its score. "
        )
        if abs(known.fit.slope) < Z_95 * known.fit.error:
            said += "That worth cannot be told from none, and a penalty by it is likely to do nothing useful. "
    if any(remedy.name == "reference_shaping" for remedy in known.remedies):
        said += (
            "Shaping takes the score of the SFT model's reply to the same prompt away: the order within a prompt "
            "cannot change, the comparison across prompts can. "
        )
    said += "“Across prompts” is how often a chosen reply outscores a rejected one, whatever their prompts."
    header = ["remedy", "accuracy", "like length", "calibration error", "r with length", "r within prompts"]
    table = _table([*header, "across prompts"], [_remedy_row(remedy) for remedy in known.remedies])
    if known.fit is None:
        return _section("Remedies", _prose(said), table)
    legend = [("one", "accuracy"), ("three", "accuracy, like length"), ("two", "correlation within prompts")]
    figure = _figure("middling", "How strong a penalty", "1 is the fitted slope.", plots.strengths(known), legend)
    return _section("Remedies", _prose(said), table, figure)


def _remedy_row(remedy: Remedy) -> list[str]:
    def signed(value: float | None) -> str:
        return "–" if value is None else f"{round(value, 3) + 0.0:+.3f}"  # + 0.0: no minus before a zero

    return [
        REMEDY_NAMES.get(remedy.name, remedy.name),
        f"{remedy.accuracy.rate:.1%}",
        "–" if remedy.matched is None else f"{remedy.matched.rate:.1%}",
        f"{remedy.calibration_error:.3f}",
        signed(remedy.length_correlation),
        signed(remedy.length_within),
        "–" if remedy.across_prompts is None else f"{remedy.across_prompts:.1%}",
    ]


def _all_metrics(known: Knowledge) -> Markup:
    rows = [[key, f"{value:.6g}"] for key, value in sorted(known.metrics.items())]
    opened = element("summary", {}, f"All {len(rows)} figures, by their names in a manifest")
    return _section("Figures", element("details", {}, opened, _table(["metric", "value"], rows)))


def _interval(metrics: Mapping[str, float], suffix: str) -> tuple[str, str]:
    rate, low, high = (metrics[f"eval/accuracy{suffix}{end}"] for end in ("", "_low", "_high"))
    return f"{rate:.1%}", f"{low:.1%} to {high:.1%}"


def _section(title: str, *content: str) -> Markup:
    return element("section", {}, element("h2", {}, title), *content)


def _prose(text: str) -> Markup:
    return element("p", {}, text)


def _plots(*figures: Markup) -> Markup:
    return element("div", {"class": "plots"}, *figures)


def _figure(style: str, title: str, caption: str, drawing: Markup, legend: Sequence[tuple[str, str]] = ()) -> Markup:
    keys = [element("span", {}, element("i", {"class": colour}), name) for colour, name in legend]
    shown = [element("div", {"class": "legend"}, *keys)] if keys else []
    head = element("figcaption", {}, element("b", {}, title), caption, *shown)
    return element("figure", {"class": style} if style else {}, head, drawing)


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[int] = (0,), marked: int | None = None
) -> Markup:
    """A table; all columns but `texts` are numbers, those of column `marked` stand out where they are above 0.1."""

    def cell(at: int, text: str, kind: str) -> Markup:
        style = "" if at in texts else "number"
        if at == marked and kind == "td" and float(text) >= 0.1:
            style += " rise"
        return element(kind, {"class": style} if style else {}, text)

    head = element("tr", {}, *(cell(at, text, "th") for at, text in enumerate(header)))
    body = [
        element("tr", {}, *(cell(at, text, "th" if at == 0 else "td") for at, text in enumerate(row))) for row in rows
    ]
    table = element("table", {}, element("thead", {}, head), element("tbody", {}, joined(*body)))
    return element("div", {"class": "scroll"}, table)
