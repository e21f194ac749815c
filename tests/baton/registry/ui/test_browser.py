"""The page in headless Chromium: nothing runs, nothing is fetched from elsewhere, nothing sticks out."""

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from baton.registry import Registry
from baton.registry.ui import server

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
PATHS = ("/", "/m/team/hostile", "/m/team/hostile/1", "/m/team/hostile/2", "/compare?ref=team/hostile:1")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@pytest.fixture
def address(hostile: Registry) -> Iterator[str]:
    announced: list[str] = []
    arguments = (hostile, "127.0.0.1", 0, announced.append)
    # the server stops with the process: uvicorn listens for signals in the main thread alone
    threading.Thread(target=server.serve, args=arguments, daemon=True).start()
    deadline = time.monotonic() + 10
    while not announced and time.monotonic() < deadline:
        time.sleep(0.02)
    yield announced[0].rstrip("/")


def test_hostile_pages_in_a_browser(address: str, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    complaints: list[str] = []
    requested: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width, scheme in ((375, "light"), (1400, "dark")):
            context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page = context.new_page()
            page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("requestfailed", lambda request: complaints.extend(_failed(request)))
            page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
            page.on("request", lambda request: requested.append(request.url))
            for path in PATHS:
                page.goto(address + path)
                page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
                assert page.title().endswith("· Baton"), "a script ran"
                assert page.evaluate("document.scripts.length") == 0
                assert page.evaluate("document.querySelectorAll('main svg, main [onerror], main [onload]').length") == 0
                links = page.evaluate("[...document.links].map(each => each.href)")
                assert all(link.startswith(address + "/") for link in links)
                too_wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
                assert too_wide <= 0, f"{path} is {too_wide} px too wide at {width}"
            page.screenshot(path=tmp_path / "shot.png", full_page=True)
            assert (tmp_path / "shot.png").stat().st_size > 5000
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, background[4:-1].split(", "))) < 150) == (scheme == "dark")
            # what people do without JavaScript: choose two versions and compare them
            page.goto(address + "/m/team/hostile")
            page.check("input[value='team/hostile:1']")
            page.click("text=Compare the chosen")
            assert page.url == f"{address}/compare?ref=team%2Fhostile%3A1"
            context.close()
        browser.close()
    assert complaints == []
    assert {url for url in requested if not url.startswith(address + "/")} == set()
    assert any(url.endswith("lineage.svg") for url in requested)


def _failed(request: Any) -> list[str]:
    """A complaint; none about the icon that the browser gives up when it goes on to the next page."""
    return [] if request.failure == "net::ERR_ABORTED" else [f"failed: {request.url}: {request.failure}"]
