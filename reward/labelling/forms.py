"""What a page sends: small, from this page and no other, and read before anything is done with it."""

import re
import secrets
from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.requests import Request

COOKIE = "baton_label"
_MOST_BYTES = 16_384


def token_of(request: Request) -> str:
    """The browser's token, or a new one for it: a page's forms repeat what its cookie says.

    No other site can read or set it, and it outlives the server, so that a page shown before a restart still works.
    """
    token = request.cookies.get(COOKIE, "")
    return token if re.fullmatch(r"[\w-]{32}", token, re.ASCII) else secrets.token_urlsafe(24)


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a form that this server's own page sent. Raises HTTPException for any other."""
    _check_origin(request)
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise HTTPException(415, "Expected a form of this page.")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MOST_BYTES:
            raise HTTPException(413, "This form is too large to be one of this page.")
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=16)
    except ValueError as error:
        raise HTTPException(400, "This form cannot be read.") from error
    form = dict(pairs)
    if len(form) != len(pairs):
        raise HTTPException(400, "This form says something twice.")
    cookie = request.cookies.get(COOKIE, "")
    if not cookie or not secrets.compare_digest(form.get("token", "").encode(), cookie.encode()):
        raise HTTPException(403, "This form is not of this browser's page. Load the page again, with cookies allowed.")
    return form


def _check_origin(request: Request) -> None:
    """Other sites can send forms here, but not with this page's origin."""
    origin = request.headers.get("origin")
    expected = f"{request.url.scheme}://{request.headers['host']}"
    if origin is None or origin.lower() != expected.lower():
        raise HTTPException(403, "This form was sent by another site.")
