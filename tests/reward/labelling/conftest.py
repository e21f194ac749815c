"""Pairs to judge, a client of the page, and what no page may have."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from reward.labelling.app import make_app
from reward.labelling.questions import Question, Reply
from reward.labelling.store import Store
from tests.baton.registry.ui.conftest import Strict

ORIGIN = "http://127.0.0.1:8788"


class Careful(Strict):
    """Refuses what the registry's page refuses, but knows this page's one script."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One element, as a browser would read it."""
        if tag == "script":
            assert attrs == [("src", "/static/keys.js"), ("defer", None)]
        else:
            super().handle_starttag(tag, attrs)


def say(content: str, role: str = "assistant") -> dict[str, Any]:
    return {"role": role, "content": content}


def question(number: int, **changed: Any) -> Question:
    """The pair `p<number>` with the replies `left <number>` of team/sft:1 and `right <number>` of team/ppo:2."""
    a = Reply([say(f"left {number}")], "team/sft:1", "sha256:aa")
    b = Reply([say(f"right {number}")], "team/ppo:2", "sha256:bb")
    fields = {"id": f"p{number}", "prompt": [say(f"prompt {number}", "user")], "a": a, "b": b}
    return Question(**(fields | changed))  # type: ignore[arg-type]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Page:
    """The page as a browser without JavaScript sees it."""

    def __init__(self, client: TestClient) -> None:
        self.client = client

    def get(self, path: str, status: int = 200) -> str:
        """A page's HTML, checked for what no page may have."""
        answer = self.client.get(path)
        assert answer.status_code == status, answer.text
        Careful().feed(answer.text)
        return answer.text

    def fields(self, path: str) -> dict[str, str]:
        """What the forms of a page would send."""
        import re

        return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', self.get(path)))

    def post(self, path: str, form: dict[str, str], **headers: str) -> Any:
        """Send a form as the page's own would."""
        return self.client.post(path, data=form, headers={"origin": ORIGIN} | headers)

    def judge(self, annotator: str, choice: str) -> dict[str, str]:
        """Judge the pair that is shown; what was sent."""
        form = self.fields(f"/judge?annotator={annotator}") | {"choice": choice}
        answer = self.post("/judge", form)
        assert (answer.status_code, answer.headers["location"]) == (303, f"/judge?annotator={annotator}")
        return form


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "judgements.jsonl"


@pytest.fixture
def open_page(out: Path) -> Iterator[Callable[..., Page]]:
    """open_page(questions, annotator=None): a page whose judgements go to `out`; closed at the end."""
    stores = []

    def opened(questions: list[Question], annotator: str | None = None) -> Page:
        for store in stores:
            store.close()  # as if the server had been started again
        stores.append(Store(out))
        app = make_app(questions, stores[-1], annotator=annotator)
        return Page(TestClient(app, base_url=ORIGIN, follow_redirects=False))

    yield opened
    for store in stores:
        store.close()
