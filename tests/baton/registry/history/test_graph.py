"""The picture of a lineage: what it shows, that text fits, and that nothing in it does anything."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from baton.registry import Registry, records
from baton.registry.history.graph import Edge, Graph, Node, graph, number, numbers_of, source_line, to_html, to_svg
from baton.registry.history.plain import plain
from baton.registry.history.svg import cells, escape, fit

SVG = "{http://www.w3.org/2000/svg}"
EVIL = "<script>alert(1)</script>\"'&]]>\x00\x1b\u202e\ud800"


def node(digest: str, name: str, **facts: Any) -> Node:
    """A version with nothing special about it."""
    empty = {"kind": "base", "licence": None, "aliases": (), "metrics": {}, "data": (), "by": None, "time": None}
    return Node(digest, name, **{**empty, "is_deleted": False, **facts})


def digest(character: str) -> str:
    return "sha256:" + character * 64


@pytest.fixture
def hostile() -> Graph:
    facts = {"licence": EVIL * 9, "aliases": (EVIL, "b" * 300), "data": (EVIL,), "by": EVIL, "time": EVIL}
    metrics = {EVIL: 1.0, "k" * 500: 1e300, "n": float("nan"), "s": EVIL, "🤖" * 99: 3}
    return Graph(
        digest("a"),
        (node(digest("a"), EVIL, metrics=metrics, **facts), node(digest("b"), "漢" * 200, kind="base")),
        (Edge(digest("b"), digest("a"), (EVIL, "x" * 500)),),
    )


def test_nodes_and_edges(registry: Registry, plant: Any) -> None:
    base = plant("team/base", licence="mit", data=[{"path": "t.jsonl", "use": "train", "rows": 1200}])
    sft = plant("team/sft", "adapter", base, {"pretrain": base})
    ppo = plant("team/ppo", "adapter", base, {"sft": sft, "reference": sft}, metrics={"x": 1})
    registry.promote("team/ppo:1", "prod", "x")
    tombstone = {"why": "x", "by": "ada", "time": "t"}
    assert records.write(registry.store, records.tombstones_folder("team/base"), 1, tombstone)
    found = graph(registry, ppo)
    assert found.subject == ppo.digest and found.nodes[0].name == "team/ppo:1"
    named = {node.name: node for node in found.nodes}
    assert set(named) == {"team/ppo:1", "team/sft:1", "team/base:1"}
    assert named["team/ppo:1"].aliases == ("prod",) and named["team/ppo:1"].metrics == {"x": 1}
    assert named["team/base:1"].is_deleted and named["team/base:1"].licence == "mit"
    assert named["team/base:1"].data == ("t.jsonl  (train)  1,200 rows  licence unknown",)
    assert set(found.edges) == {
        Edge(base.digest, sft.digest, ("pretrain", "base")),
        Edge(base.digest, ppo.digest, ("base",)),
        Edge(sft.digest, ppo.digest, ("reference", "sft")),
    }
    drawn = ElementTree.fromstring(to_svg(found))
    text = " ".join(drawn.itertext())
    for shown in ("team/ppo:1", "team/sft:1", "team/base:1", "prod", "pretrain, base", "reference, sft", "deleted"):
        assert shown in text
    assert drawn.find(f"{SVG}title") is not None
    assert "team/sft:1 was made from team/base:1 (pretrain, base)" in text
    dashed = [path for path in drawn.iter(f"{SVG}path") if path.get("class") == "line dashed"]
    assert len(dashed) == 1, "the one edge that is only a base"


def test_the_picture_is_still_and_self_contained(hostile: Graph) -> None:
    text = to_svg(hostile, {digest("a"): 'javascript:"><script>'})
    drawn = ElementTree.fromstring(text)  # well-formed, or this raises
    tags = {element.tag.removeprefix(SVG) for element in drawn.iter()}
    assert tags <= {"svg", "title", "desc", "style", "rect", "g", "text", "path", "clipPath", "a"}
    attributes = {key for element in drawn.iter() for key in element.attrib}
    assert not any(key.startswith("on") or key.endswith("src") for key in attributes)
    style = drawn.find(f"{SVG}style")
    assert style is not None and style.text and "url(" not in style.text and "@import" not in style.text
    assert "prefers-color-scheme:dark" in style.text
    for character in "\x00\x1b\u202e\ud800":
        assert character not in text
    page = to_html(hostile, EVIL)
    assert "<script" not in page and "default-src 'none'" in page
    page.encode("utf-8")


def test_text_fits_its_box(hostile: Graph) -> None:
    drawn = ElementTree.fromstring(to_svg(hostile))
    groups = [group for group in drawn.iter(f"{SVG}g") if group.find(f"{SVG}title") is not None]
    assert len(groups) == 2
    num_texts = 0
    for group in groups:
        box = group.find(f"{SVG}rect")
        assert box is not None
        right = float(box.get("x", "")) + float(box.get("width", ""))
        bottom = float(box.get("y", "")) + float(box.get("height", ""))
        for text in group.iter(f"{SVG}text"):
            # a monospaced character is 0.6 of the font's size wide: 13 pixels for the name, 12 or 11 for the rest
            width = cells(text.text or "") * 0.602 * (13 if "name" in text.get("class", "") else 12)
            start = float(text.get("x", "")) - (width / 2 if text.get("text-anchor") == "middle" else 0)
            assert start > float(box.get("x", "")) and start + width <= right
            assert float(text.get("y", "")) + 3 < bottom
            num_texts += 1
    assert num_texts >= 9


def test_two_pictures_on_a_page_keep_their_styles(hostile: Graph) -> None:
    other = Graph(digest("b"), hostile.nodes[1:], ())
    for drawn in (hostile, other):
        name = f"g{drawn.subject[-12:]}"
        text = to_svg(drawn)
        assert set(re.findall(r'id="([^"-]+)', text)) == {name}
        style = ElementTree.fromstring(text).findtext(f"{SVG}style") or ""
        rules = re.findall(r"([^{}]+)\{", style.replace("@media (prefers-color-scheme:dark){", ""))
        assert rules and all(rule.startswith(f"#{name}") for rule in rules)


def test_the_page_has_the_metrics_side_by_side() -> None:
    nodes = (
        node(digest("a"), "t/new:1", kind="adapter", metrics={"loss": 1.5, "note": "<b>", "many": [1]}),
        node(digest("b"), "t/base:1", metrics={"loss": 2.25, "count": 12345}),
    )
    page = to_html(Graph(digest("a"), nodes, (Edge(digest("b"), digest("a"), ("base",)),)), "A title")
    metrics = page[page.index("<h2>Metrics</h2>") :]
    # ancestors to the left, as in the picture
    assert re.findall(r'<th scope="col">([^<]*)', metrics) == ["metric", "t/base:1", "t/new:1"]
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th>(.*?)</tr>', metrics)
    values = {key: re.findall(r">([^<]*)</td>", cells) for key, cells in rows}
    assert values == {"count": ["12,345", ""], "loss": ["2.25", "1.5"], "note": ["", "&lt;b&gt;"]}
    assert "<h1>A title</h1>" in page and "<h2>Versions</h2>" in page


def test_a_version_without_ancestors_or_metrics() -> None:
    alone = Graph(digest("a"), (node(digest("a"), digest("a")),), ())
    text = " ".join(ElementTree.fromstring(to_svg(alone)).itertext())
    assert "sha256:aaaaaaaaaaaa…" in text and "has no ancestors" in text
    assert "Metrics" not in to_html(alone, "x")


def test_links() -> None:
    alone = Graph(digest("a"), (node(digest("a"), "t/m:1"),), ())
    drawn = ElementTree.fromstring(to_svg(alone, {digest("a"): "/v?ref=t/m:1&x"}))
    (link,) = drawn.iter(f"{SVG}a")
    assert link.get("href") == "/v?ref=t/m:1&x" and drawn.get("role") == "group"
    assert ElementTree.fromstring(to_svg(alone)).get("role") == "img"


def test_short_texts() -> None:
    assert fit("abcdef", 6) == "abcdef" and fit("abcdefg", 6) == "abcde…"
    assert fit("team/abcdef:12", 10, keep_end=3) == "team/a…:12"
    assert fit("漢字漢字", 5) == "漢字…" and cells("漢a") == 3
    assert escape("a<b>\x07&") == "a&lt;b&gt;\ufffd&amp;"
    assert plain("e\u0301 漢 🤖") == "e\u0301 漢 🤖" and plain("a\nb\u200b") == "a\ufffdb\ufffd"
    assert source_line({"path": "p", "slice": [None, 5], "rows": 5, "licence": "mit"}) == "p  rows 0 to 5  mit"
    assert source_line({"path": "p", "slice": [2, None]}) == "p  rows 2 to the end  licence unknown"
    assert source_line({"path": "p", "use": "eval", "size": 12345}) == "p  (eval)  12,345 bytes  licence unknown"
    assert source_line("x") == "a source without a name  licence unknown"
    assert (number(1234), number(0.123456), number(10**30), number(-0.0)) == ("1,234", "0.1235", "1e+30", "-0")
    metrics = {"seconds": 9, "x_before": 1, "x": 2, "eval/loss": 3, "text": "t", "bad": float("inf"), "yes": True}
    metrics |= {"eval/eos_rate": 1, "eval/win_rate": 0.5}
    assert list(numbers_of(metrics)) == ["eval/win_rate", "eval/loss", "eval/eos_rate", "x", "x_before", "seconds"]


def test_chromium_draws_it(hostile: Graph, tmp_path: Path) -> None:
    """A browser reads the page: no dialogue, no script, the boxes where they belong."""
    sync_api = pytest.importorskip("playwright.sync_api")
    import shutil

    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("no browser")
    (tmp_path / "page.html").write_text(to_html(hostile, EVIL), encoding="utf-8")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(color_scheme="dark")
        said: list[str] = []
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on("console", lambda message: said.append(message.text))
        page.goto((tmp_path / "page.html").as_uri())
        overflow = page.evaluate(
            """() => [...document.querySelectorAll('svg g > g > text.name, svg g > g > text.faint')].filter(text => {
                 const box = text.closest('g').parentNode.querySelector('rect.box').getBoundingClientRect();
                 const own = text.getBoundingClientRect();
                 return own.left < box.left || own.right > box.right || own.bottom > box.bottom; }).length"""
        )
        paper = page.evaluate("() => getComputedStyle(document.querySelector('svg .paper')).fill")
        count = page.evaluate("() => document.querySelectorAll('svg text').length")
        browser.close()
    assert said == [] and overflow == 0 and count > 9
    assert paper == "rgb(13, 17, 23)", "dark, because the reader's system is"
