"""The web application: who is judging, one pair after the other, and how far everybody is."""

import sys
from importlib.resources import files
from typing import Any
from urllib.parse import urlencode

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from baton.registry.ui.protect import LOOPBACK, Protect
from reward.labelling import forms, order
from reward.labelling.judgements import CHOICES, Judgement, make_line
from reward.labelling.names import annotator_key, annotator_name
from reward.labelling.progress import Accord, accords, standings
from reward.labelling.questions import Question
from reward.labelling.rendering import render
from reward.labelling.store import Store, StoreError

_STATIC = {
    "style.css": "text/css; charset=utf-8",
    "keys.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_HEADERS = {
    # this server's one script, which asks nobody else
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'; img-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    # with no-referrer browsers send `Origin: null` even to ourselves, and forms could not be told from foreign ones
    "Referrer-Policy": "same-origin",
    # going back must show what is now to be judged, not what was
    "Cache-Control": "no-store",
}
_SAID = {
    "first": "reply 1 is better",
    "second": "reply 2 is better",
    "tie": "a tie",
    "bad": "both are bad",
    "skip": "skipped",
}


class Application:
    """The questions of one file, and the judgements that answer them."""

    def __init__(self, questions: list[Question], store: Store, seed: int, annotator: str | None) -> None:
        """seed: of the order and the sides. annotator: whom the first page sends on without asking."""
        self.questions, self.store, self.seed, self.annotator = questions, store, seed, annotator
        self._by_key = {order.page_key(seed, question): question for question in questions}
        self._orders: dict[str, list[Question]] = {}
        self._known_accords: tuple[int, list[Accord]] = (-1, [])

    # Plain functions run in threads, so that a slow disk does not stop the others.
    def start(self, request: Request) -> Response:
        """Who is judging?"""
        if self.annotator is not None and "stay" not in request.query_params:
            return _to_judge(self.annotator)
        return self._start_page()

    def judge(self, request: Request) -> Response:
        """The next pair of an annotator."""
        name = annotator_name(request.query_params.get("annotator", ""))
        if name is None:
            return self._start_page("Please give a name of up to 60 visible characters.", 400)
        return self._judge_page(request, self.store.spelling(name))

    async def take(self, request: Request) -> Response:
        """One judgement."""
        form = await forms.read_form(request)
        name, choice = _name(form), form.get("choice", "")
        question = self._by_key.get(form.get("question", ""))
        if choice not in CHOICES:
            raise HTTPException(400, "This form says nothing that can be stored.")
        if question is None:
            raise HTTPException(409, "This pair is not in the file that is being judged now. Load the page again.")
        await run_in_threadpool(self._add, question, name, choice)
        return _to_judge(name)

    async def undo(self, request: Request) -> Response:
        """Take back the annotator's last judgement."""
        form = await forms.read_form(request)
        name = _name(form)
        await run_in_threadpool(self.store.undo, name, form.get("judgement", ""))
        return _to_judge(name)

    def static(self, request: Request) -> Response:
        """The style sheet, the script and the icon."""
        name = request.path_params["file"]
        if name not in _STATIC:
            raise HTTPException(404)
        content = files("reward.labelling").joinpath("static", name).read_bytes()
        return Response(content, headers={"Content-Type": _STATIC[name], "Cache-Control": "no-cache"})

    def favicon(self, request: Request) -> Response:
        """Where browsers look for an icon by themselves."""
        return RedirectResponse("/static/icon.svg", 301)

    def refusal(self, request: Request, error: Exception) -> Response:
        """What is not there, or not allowed."""
        assert isinstance(error, HTTPException)
        text = f"There is no page {request.url.path}." if error.status_code == 404 else str(error.detail)
        title = "Not found" if error.status_code == 404 else "Not taken"
        return self._page("message.html", {"title": title, "text": text}, error.status_code)

    def unstored(self, request: Request, error: Exception) -> Response:
        """A disk that takes nothing: the page stays as it is."""
        return self._page("message.html", {"title": "Not stored", "text": str(error)}, 507)

    def defect(self, request: Request, error: Exception) -> Response:
        """What nobody foresaw: its kind goes to the page, the rest to the terminal."""
        print(f"{request.url.path}: {error!r}", file=sys.stderr)
        text = f"{type(error).__name__} while making this page: a defect of Baton. What was judged is safe."
        return self._page("message.html", {"title": "This cannot be shown", "text": text}, 500)

    def _add(self, question: Question, name: str, choice: Any) -> None:
        name = self.store.spelling(name)
        is_swapped = order.is_swapped(self.seed, annotator_key(name), question)
        self.store.add(make_line(question, name, choice, is_swapped))

    def _start_page(self, problem: str | None = None, status: int = 200) -> Response:
        context = {
            "problem": problem,
            "total": len(self.questions),
            "standings": standings(self.store.judgements(), self.questions),
            "accords": self._accords(),
        }
        return self._page("start.html", context, status)

    def _judge_page(self, request: Request, name: str) -> Response:
        mine = self.store.of(name)
        judged = {each.pair for each in mine}
        waiting = [question for question in self._order(name) if question.id not in judged]
        token = forms.token_of(request)
        context: dict[str, Any] = {
            "token": token,
            "annotator": name,
            "done": len(self.questions) - len(waiting),
            "total": len(self.questions),
            "last": _last(mine),
            "accords": [each for each in self._accords() if name in (each.first, each.second)],
            "question": None,
        }
        if waiting:
            question = waiting[0]
            is_swapped = order.is_swapped(self.seed, annotator_key(name), question)
            replies = (question.b, question.a) if is_swapped else (question.a, question.b)
            key = order.page_key(self.seed, question)
            context |= {"question": key, "prompt": question.prompt, "replies": replies}
        answer = self._page("judge.html", context)
        # lax: whoever follows a link to this page keeps the token that their other tabs know
        answer.set_cookie(forms.COOKIE, token, httponly=True, samesite="lax", max_age=30 * 86_400)
        return answer

    def _order(self, name: str) -> list[Question]:
        key = annotator_key(name)
        if key not in self._orders:
            if len(self._orders) > 1000:
                self._orders.clear()  # names are free to invent
            self._orders[key] = order.order(self.seed, key, self.questions)
        return self._orders[key]

    def _accords(self) -> list[Accord]:
        revision = self.store.revision
        if self._known_accords[0] != revision:
            self._known_accords = revision, accords(self.store.judgements())
        return self._known_accords[1]

    def _page(self, template: str, context: dict[str, Any], status: int = 200) -> Response:
        return HTMLResponse(render(template, context), status, _HEADERS)


def make_app(
    questions: list[Question],
    store: Store,
    seed: int = 0,
    annotator: str | None = None,
    hosts: frozenset[str] = LOOPBACK,
    any_address: bool = False,
) -> Protect:
    """The application of one file; hosts, any_address: what a request's Host header may say (Protect)."""
    app = Application(questions, store, seed, annotator)
    routes = [
        Route("/", app.start, methods=["GET"]),
        Route("/judge", app.judge, methods=["GET"]),
        Route("/judge", app.take, methods=["POST"]),
        Route("/undo", app.undo, methods=["POST"]),
        Route("/static/{file}", app.static, methods=["GET"]),
        Route("/favicon.ico", app.favicon, methods=["GET"]),
    ]
    handlers = {HTTPException: app.refusal, StoreError: app.unstored, Exception: app.defect}
    # outermost, so that pages about errors are protected as well
    inner = Starlette(routes=routes, exception_handlers=handlers)  # type: ignore[arg-type]
    return Protect(inner, hosts, any_address, ("GET", "HEAD", "POST"))


def _name(form: dict[str, str]) -> str:
    name = annotator_name(form.get("annotator", ""))
    if name is None:
        raise HTTPException(400, "This form names no annotator.")
    return name


def _to_judge(name: str) -> Response:
    return RedirectResponse(f"/judge?{urlencode({'annotator': name})}", 303)


def _last(mine: list[Judgement]) -> dict[str, str] | None:
    return {"id": mine[-1].id, "said": _SAID[mine[-1].choice]} if mine else None
