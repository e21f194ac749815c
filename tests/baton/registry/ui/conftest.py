"""A client of the page, and a registry in which every text that people write is hostile."""

from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from starlette.testclient import TestClient

from baton.registry import Registry, records
from baton.registry.trust import attestations
from baton.registry.ui.app import make_app
from tests.baton.registry.conftest import Folders

SCRIPT = "<script>document.title='ran'</script>"
HOSTILE = [
    SCRIPT,
    "\"'><img src=x onerror=\"document.title='ran'\">",
    "javascript:document.title='ran'",
    "[x](javascript:document.title='ran')",
    "</pre></code></details><svg onload=document.title='ran'>",
    "{{ 7 * 7 }} {% raw %} ${7*7}",
]


class Strict(HTMLParser):
    """Refuses elements and attributes that could run something, and links that lead away."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One element, as a browser would read it."""
        assert tag not in ("script", "svg", "iframe", "object", "embed", "style", "base"), tag
        for name, value in attrs:
            assert not name.startswith("on") and name not in ("style", "srcdoc", "formaction"), (tag, name)
            if name in ("href", "src", "action"):
                assert value and value[0] in "/#" and value[:2] != "//", (tag, value)


def client_of(registry: Registry) -> TestClient:
    """A client that asks as a browser on this machine does."""
    return TestClient(make_app(registry), base_url="http://127.0.0.1:8787", follow_redirects=False)


@pytest.fixture
def get() -> Callable[..., str]:
    """get(registry, path, status=200): a page's HTML, checked for what no page may have."""

    def fetch(registry: Registry, path: str, status: int = 200) -> str:
        answer = client_of(registry).get(path)
        assert answer.status_code == status, answer.text
        assert "Traceback" not in answer.text
        Strict().feed(answer.text)
        return answer.text

    return fetch


@pytest.fixture
def hostile(registry: Registry, made: Folders) -> Registry:
    """team/hostile:1 with every text from outside hostile; the alias `prod` with hostile reasons and names."""
    details: dict[str, Any] = {
        "licence": SCRIPT,
        "metrics": {text: number for number, text in enumerate(HOSTILE)} | {"text": SCRIPT, "nested": {SCRIPT: 1.5}},
        "data": [{"path": text, "licence": text, "rows": text, "weight": text} for text in HOSTILE] + [SCRIPT],
        "recipe": {text: [text, {text: text}] for text in HOSTILE},
        "code": {"baton": SCRIPT, "commit": SCRIPT, "dirty": SCRIPT},
        "packages": {SCRIPT: SCRIPT},
    }
    version = registry.publish(made.base, name="team/hostile", kind="base", details=details)
    registry.publish(made.other_base, name="team/hostile", kind="base", parents={SCRIPT: version})
    for number, text in enumerate(HOSTILE, 1):
        record = {"to": 1, "previous": None, "reason": text, "by": text, "time": text}
        outcome = {"condition": text, "holds": True, "found": text}
        record |= {"gates": [{"source": text, "digest": text, "outcomes": [outcome]}], "rolled_back_from": text}
        assert records.write(registry.store, records.alias_folder("team/hostile", "prod"), number, record)
        for kind in attestations.TYPES:
            body = {"note": text, "metrics": {text: 1.0}, "repo": text, text: [text]}
            attestations.attest(registry, version.digest, kind, body, by=text)
    stone = {"why": SCRIPT, "by": SCRIPT, "time": SCRIPT}
    assert records.write(registry.store, records.tombstones_folder("team/hostile"), 2, stone)
    return registry
