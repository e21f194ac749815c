"""The web application: routes, and errors as pages."""

import re
import sys
from importlib.resources import files
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from baton.errors import UserError
from baton.registry.ui import pages
from baton.registry.ui.protect import LOOPBACK, Protect
from baton.registry.ui.rendering import render

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry

_STATIC = {"style.css": "text/css; charset=utf-8", "icon.svg": "image/svg+xml"}
# An answer that a browser can be led to by itself: nothing in it may load or run.
_PICTURE = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox; frame-ancestors 'none'"}


class Application:
    """The pages of one registry."""

    def __init__(self, registry: "Registry") -> None:
        """registry: only read."""
        self.registry = registry

    # Plain functions: Starlette runs them in threads, so that a slow store does not stop the others.
    def models(self, request: Request) -> Response:
        """The first page."""
        return self._page(pages.models(self.registry, request.query_params.get("q", ""), _number(request, "page")))

    def model(self, request: Request) -> Response:
        """One model."""
        return self._page(pages.model(self.registry, _name(request), _number(request, "page")))

    def version(self, request: Request) -> Response:
        """One version."""
        return self._page(pages.version(self.registry, _name(request), request.path_params["number"]))

    def lineage(self, request: Request) -> Response:
        """The picture of its ancestors."""
        try:
            svg = pages.lineage_svg(self.registry, _name(request), request.path_params["number"])
        except UserError as error:
            svg = _text_picture(str(error))
        return Response(svg, media_type="image/svg+xml", headers=_PICTURE)

    def compare(self, request: Request) -> Response:
        """Versions side by side."""
        return self._page(pages.compare(self.registry, request.query_params.getlist("ref")))

    def static(self, request: Request) -> Response:
        """The style sheet and the icon."""
        name = request.path_params["file"]
        if name not in _STATIC:
            raise HTTPException(404)
        content = files("baton.registry.ui").joinpath("static", name).read_bytes()
        return Response(content, headers={"Content-Type": _STATIC[name]})

    def favicon(self, request: Request) -> Response:
        """Where browsers look for an icon by themselves."""
        return RedirectResponse("/static/icon.svg", 301)

    def _page(self, page: pages.Page) -> Response:
        template, context = page
        return HTMLResponse(render(template, {**context, "location": self.registry.location}))

    def message(self, status: int, title: str, text: str) -> Response:
        """A page that only says something."""
        context = {"title": title, "text": text, "location": self.registry.location}
        return HTMLResponse(render("message.html", context), status)

    def not_found(self, request: Request, error: Exception) -> Response:
        """No such model, version or page."""
        text = str(error) if isinstance(error, pages.NotFoundError) else f"There is no page {request.url.path}."
        return self.message(404, "Not found", text)

    def user_error(self, request: Request, error: Exception) -> Response:
        """A registry that cannot be read."""
        return self.message(500, "This cannot be shown", str(error))

    def defect(self, request: Request, error: Exception) -> Response:
        """What nobody foresaw: its traceback goes to the terminal, never to the page."""
        print(f"{request.url.path}: {error!r}", file=sys.stderr)
        text = f"{type(error).__name__} while making this page: a defect of Baton, or a registry that it did not write."
        return self.message(500, "This cannot be shown", text)


def make_app(registry: "Registry", hosts: frozenset[str] = LOOPBACK, any_address: bool = False) -> Protect:
    """The application of one registry; hosts, any_address: what a request's Host header may say (ui/protect.py)."""
    app = Application(registry)
    model = "/m/{team}/{name}"
    routes = [
        Route("/", app.models),
        Route(model, app.model),
        Route(model + "/{number:int}", app.version),
        Route(model + "/{number:int}/lineage.svg", app.lineage),
        Route("/compare", app.compare),
        Route("/static/{file}", app.static),
        Route("/favicon.ico", app.favicon),
    ]
    handlers = {
        pages.NotFoundError: app.not_found,
        HTTPException: app.not_found,
        UserError: app.user_error,
        Exception: app.defect,
    }
    # outermost, so that pages about errors are protected as well
    return Protect(Starlette(routes=routes, exception_handlers=handlers), hosts, any_address)  # type: ignore[arg-type]


def _name(request: Request) -> str:
    return f"{request.path_params['team']}/{request.path_params['name']}"


def _number(request: Request, key: str) -> int:
    text = request.query_params.get(key, "1")
    return int(text) if re.fullmatch("[0-9]{1,7}", text) else 1


def _text_picture(text: str) -> str:
    from markupsafe import escape

    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="640" height="48" font-family="system-ui, sans-serif" '
        f'font-size="13"><text x="8" y="28" fill="#b3261e">{escape(text)}</text></svg>'
    )
