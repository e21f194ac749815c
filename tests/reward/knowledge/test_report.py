"""The page: self-contained, without scripts, every text escaped, and saying what the measures mean."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from reward.knowledge.findings import findings
from reward.knowledge.measure import Knowledge, accuracy_by_group, measure, measure_samples, measure_ties
from reward.knowledge.report import write_report

EVIL = "<script>alert('a')</script>&\"b\""


class Reader(HTMLParser):
    """Collects tags, checks that they close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.words.append(data)


@pytest.fixture
def known(make_pair) -> Knowledge:
    """Three members on 60 pairs whose longer reply is the better liked, with everything that a report can show."""
    from reward.knowledge import accuracy, calibration, ensemble
    from reward.knowledge.debias import fit_length
    from reward.knowledge.length import reply_lengths
    from reward.knowledge.remedies import compare_remedies
    from reward.knowledge.robustness import Perturbed
    from reward.knowledge.sft_samples import SftSample

    generator = torch.Generator().manual_seed(0)
    pairs = [make_pair(10 + at % 7, 5 + at % 11, source=EVIL if at % 2 else "b.jsonl") for at in range(60)]
    lengths = reply_lengths(pairs)
    noise = torch.randn(2, 3, 60, generator=generator)
    chosen, rejected = 0.3 * lengths.chosen + noise[0], 0.3 * lengths.rejected + noise[1]
    margin, ties = chosen - rejected, torch.tensor([[0.1], [0.2], [-0.1]])
    samples = [SftSample([], [1], [2, 3], True)] * 5
    sample_scores = torch.randn(3, 5, generator=generator)
    fit = fit_length(margin.mean(0), lengths)
    metrics = measure(chosen, rejected, pairs) | measure_ties(margin, ties) | measure_samples(sample_scores, samples)
    return Knowledge(
        metrics=metrics,
        margin=margin,
        scores=torch.cat([chosen.mean(0), rejected.mean(0)]),
        lengths=lengths,
        ties=ties,
        groups=accuracy_by_group(margin.mean(0), pairs),
        bins=calibration.reliability(margin.mean(0), accuracy.points(margin.mean(0))),
        quantiles=ensemble.by_disagreement(margin),
        samples=samples,
        sample_scores=sample_scores,
        perturbed=[Perturbed("flattery", [0.7, 0.9, 0.8], 2, 1, 0), Perturbed(EVIL, [0.0, -0.1], 0, 0, 1)],
        fit=fit,
        fitted_on="120 training pairs",
        remedies=compare_remedies(chosen.mean(0), rejected.mean(0), lengths, fit, torch.zeros(60)),
    )


def test_page_is_whole_and_harmless(known: Knowledge, tmp_path: Path) -> None:
    write_report(tmp_path / "new" / "report.html", known, name=f"team/reward {EVIL}", facts={EVIL: EVIL})
    text = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    names = {tag for tag, _ in reader.tags}
    assert names.isdisjoint({"script", "link", "iframe", "img", "object", "foreignobject"})
    attributes = {key for _, given in reader.tags for key in given}
    assert not {key for key in attributes if key.startswith("on") or key in ("href", "src", "xlink:href", "style")}
    assert "url(" not in text and "@import" not in text and EVIL not in text
    words = " ".join(reader.words)
    assert EVIL in words and f"{known.metrics['eval/accuracy']:.1%}" in words
    # every plot is drawn with numbers
    assert names >= {"svg", "polyline", "circle", "rect"} and not re.search(r"nan|inf\b", text.split("</style>")[1])
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == [
        "In short", "Accuracy", "Calibration", "Scale", "Length", "Ensemble", "Robustness", "Remedies", "Figures"
    ]  # fmt: skip


def test_page_of_the_least_that_can_be_known(make_pair, tmp_path: Path) -> None:
    """One member, one pair, equal scores, no samples, nothing perturbed."""
    from reward.knowledge import accuracy, calibration
    from reward.knowledge.length import reply_lengths

    pairs, zeros = [make_pair(3, 3)], torch.zeros(1, 1)
    known = Knowledge(
        metrics=measure(zeros, zeros, pairs),
        margin=zeros,
        scores=torch.zeros(2),
        lengths=reply_lengths(pairs),
        ties=torch.zeros(1, 0),
        groups=accuracy_by_group(zeros[0], pairs),
        bins=calibration.reliability(zeros[0], accuracy.points(zeros[0])),
    )
    write_report(tmp_path / "report.html", known, name="least")
    assert "<h2>Ensemble</h2>" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [finding.level for finding in findings(known)][0] == "bad"


def test_findings_say_what_matters(known: Knowledge) -> None:
    found = {finding.title: finding for finding in findings(known)}
    assert found["An empty change pays"].level == "bad" and "flattering the user" in found["An empty change pays"].text
    assert found["It leans to the longer reply"].level in ("mind", "bad")
    # as accurate, beside a longer reply that is right more often
    known.metrics.update({"eval/accuracy_longer": known.metrics["eval/accuracy"]})
    assert findings(known)[0].title == "It may know no more than the length"
    known.metrics.update({"eval/calibration_error": 0.3, "eval/calibration_noise": 0.01, "eval/temperature": 2.5})
    assert (findings(known)[1].level, findings(known)[1].title) == ("bad", "Its margins claim too much")
    known.metrics.update({"eval/calibration_error": 0.04})
    assert findings(known)[1].level == "good"


def test_verdicts_that_turn_over_are_told_though_no_change_pays_on_average(known: Knowledge) -> None:
    rising, still = known.perturbed
    # 10 of 40, Wilson's lower end 14%; then 1 of 40, whose lower end is 0.4%
    for num_flipped, title in ((10, "An empty change can turn a verdict over"), (1, "No empty change pays")):
        known.perturbed[:] = [replace(still, name="closing", num_ordered=40, num_flipped=num_flipped)]
        assert findings(known)[-1].title == title
    # a rise that chance explains: mean 0.2, standard error 0.2
    known.perturbed[:] = [replace(rising, changes=[0.0, 0.4], num_ordered=0)]
    assert findings(known)[-1].level == "good"


def test_page_in_a_browser_makes_no_request_and_does_not_overflow(known: Knowledge, tmp_path: Path) -> None:
    """Narrow and wide, with the page's own style sheet."""
    path = tmp_path / "report.html"
    write_report(path, known, name=f"team/reward {EVIL}")
    chromium = Path("/usr/bin/chromium")
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as play:
        try:
            browser = play.chromium.launch(**({"executable_path": str(chromium)} if chromium.exists() else {}))
        except sync.Error as error:
            pytest.skip(f"no browser: {str(error).splitlines()[0]}")
        requests: list[str] = []
        for width in (360, 1200):
            page = browser.new_page(viewport={"width": width, "height": 800})
            page.on("request", lambda request: requests.append(request.url))
            page.goto(path.as_uri())
            wider = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wider == 0
            assert page.evaluate(
                "[...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().width > 200)"
            )
        assert requests == [path.as_uri()] * 2
        browser.close()
