"""Who may ask: the bearer token, and the names by which a server on this machine may be asked for."""

from __future__ import annotations

import hmac
import os
import re
from pathlib import Path

from starlette.datastructures import Headers

from baton.errors import UserError
from baton.registry.ui.server import is_loopback
from reward.serving.limits import RefusedError

VARIABLE = "BATON_REWARD_TOKEN"
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
_SHORTEST = 16
_VISIBLE = re.compile(r"[!-~]+")


class Access:
    """Checks a request's Authorization and Host headers."""

    def __init__(self, token: str | None, host: str) -> None:
        """token: what every request must bear, or None; host: the address that the server listens on."""
        self._token = token
        # with a token, a page that a browser shows can do nothing under a name that it points at this machine; without
        # one, the Host header gives it away (DNS rebinding)
        self._hosts = _LOOPBACK | {host.lower()} if is_loopback(host) and token is None else None

    def bears_token(self, headers: Headers) -> bool:
        """Whether the request shows the token, or none is asked for."""
        if self._token is None:
            return True
        given = headers.getlist("authorization")
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        right = hmac.compare_digest(token.strip().encode("latin-1", "replace"), self._token.encode())
        return right and scheme.lower() == "bearer"

    def check_host(self, headers: Headers) -> None:
        """Raises RefusedError 421 for a name that is not this machine's own."""
        names = [re.sub(r":\d*$", "", host).lower() for host in headers.getlist("host")]
        if self._hosts is not None and (len(names) != 1 or names[0] not in self._hosts):
            raise RefusedError(
                421, "this server answers to the names of this machine's own, such as localhost, unless a token is set"
            )

    def check_token(self, headers: Headers) -> None:
        """Raises RefusedError 401."""
        if not self.bears_token(headers):
            raise RefusedError(401, "expected the header `Authorization: Bearer TOKEN` with this server's token")


def read_token(file: Path | None) -> str | None:
    """The token of a file, else of $BATON_REWARD_TOKEN, else None. Raises UserError where it is no good one."""
    if file is not None:
        try:
            text, place = file.read_text(encoding="utf-8").strip(), f"--token-file {file}"
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--token-file {file} cannot be read: {error}") from None
    elif VARIABLE in os.environ:
        text, place = os.environ[VARIABLE].strip(), f"${VARIABLE}"
    else:
        return None
    if not _VISIBLE.fullmatch(text) or len(text) < _SHORTEST:
        raise UserError(
            f"{place} holds {len(text)} characters; expected one token of at least {_SHORTEST} letters, digits and "
            "signs, such as `openssl rand -hex 32` makes"
        )
    return text


def check_exposure(host: str, token: str | None, without_token: bool) -> None:
    """Other machines need a token, unless it is said that they do not. Raises UserError."""
    if not is_loopback(host) and token is None and not without_token:
        raise UserError(
            f"--host {host} lets other machines ask this server, and no token is set. Set one: --token-file FILE or "
            f"${VARIABLE}; or say --without-token, where everybody who can reach {host} may ask"
        )
    if without_token and token is not None:
        raise UserError(f"--without-token, but a token is set (--token-file or ${VARIABLE}); leave one of them out")
