"""The page in headless Chromium: keys pressed, the server killed halfway, nothing lost, nothing run."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.baton.registry.ui.conftest import HOSTILE
from tests.reward.labelling import driving
from tests.reward.labelling.conftest import rows_of
from tests.reward.labelling.driving import Annotator, Killer, Server

pytestmark = pytest.mark.skipif(driving.CHROMIUM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=driving.CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


def test_two_annotators_and_a_killed_server(browser: Any, tmp_path: Path, out: Path) -> None:
    """The quick form of tests/bench/label.py."""
    driving.write_pairs(tmp_path / "pairs.jsonl", 6)
    server = Server(tmp_path / "pairs.jsonl", out)
    try:
        annotators = [Annotator(browser.new_context().new_page(), name) for name in ("ann", "Bo Ø. <b>")]
        for each in annotators:
            each.open(server.address)
        killer = Killer(server, out, [4], random.Random(2), down=0.2)
        killer.start()
        driving.judge_all(annotators, 6, random.Random(1), undo=0.1)
        killer.join()
        assert "That was the last one" in annotators[0].page.inner_text("main")
        assert killer.kills == 1
    finally:
        server.kill()
    driving.check(out, annotators, 6)


def test_hostile_pairs_at_every_width(browser: Any, tmp_path: Path, out: Path) -> None:
    texts = [
        "\n".join(HOSTILE),
        "\n".join(HOSTILE[::-1]),
        "שלום \u202e abc\u202c",
        "```\n" + "x" * 3000,
        "long " * 5000,
        "",
    ]
    rows = [{"prompt": f"{text} ?", "response_a": text, "response_b": text + "b"} for text in texts]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    server = Server(tmp_path / "pairs.jsonl", out)
    complaints: list[str] = []
    requested: list[str] = []
    try:
        for width, scheme in ((320, "light"), (1400, "dark")):
            context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page = context.new_page()
            page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
            page.on("request", lambda request: requested.append(request.url))
            annotator = Annotator(page, f"at {width}")
            annotator.open(server.address)
            for _ in texts:
                assert page.title().endswith("· Baton"), "a script ran"
                assert page.evaluate("document.scripts.length") == 1
                assert page.evaluate("document.querySelectorAll('main svg, main img, main [onerror]').length") == 0
                too_wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
                assert too_wide <= 0, f"{too_wide} px too wide at {width}"
                bar = page.evaluate("document.querySelector('#choices').getBoundingClientRect().bottom")
                assert abs(bar - 800) < 1, "the buttons are out of sight"
                annotator.press("1")
                annotator.settle()
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, background[4:-1].split(", "))) < 150) == (scheme == "dark")
            context.close()
    finally:
        server.kill()
    assert complaints == []
    assert {url for url in requested if not url.startswith(server.address + "/")} == set()
    assert len(rows_of(out)) == 2 * len(texts)


def test_without_scripts_and_with_keys_that_mean_nothing(browser: Any, tmp_path: Path, out: Path) -> None:
    driving.write_pairs(tmp_path / "pairs.jsonl", 4)
    server = Server(tmp_path / "pairs.jsonl", out)
    try:
        page = browser.new_context(java_script_enabled=False).new_page()
        page.goto(server.address + "/judge?annotator=ann")
        for button in ("Reply 2", "Both bad", "Undo", "Skip"):
            page.click(f"button:has-text('{button}')")
        assert page.url == server.address + "/judge?annotator=ann"
        assert [row["choice"] for row in rows_of(out)] == ["second", "skip"]
        page = browser.new_context().new_page()
        page.goto(server.address + "/judge?annotator=ann")
        page.wait_for_timeout(160)
        for key in ("Enter", "Control+1", "Alt+2", "5", "x", "Space"):
            page.keyboard.press(key)
        # held down, a key counts once: the first of these asks, the others are its repetitions
        before = page.inner_text("#count")
        for _ in range(5):
            page.keyboard.down("3")
            page.wait_for_timeout(160)
        page.keyboard.up("3")
        page.dblclick("button[value=bad]")
        page.wait_for_function("before => document.querySelector('#count').innerText !== before", arg=before)
        page.wait_for_timeout(160)
        assert page.inner_text("#count") == "4 of 4"
        page.goto(server.address + "/?stay")
        page.fill("#annotator", "1u2")  # keys in a field are text
        assert page.input_value("#annotator") == "1u2" and len(rows_of(out)) == 4
    finally:
        server.kill()
