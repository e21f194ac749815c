"""What every answer of the page goes through: who may ask, what may be asked, and what a browser may do with it."""

import ipaddress

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_HEADERS = {
    # No script at all, and nothing from elsewhere: text from a registry can at worst be ugly.
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class Protect:
    """Refuses foreign Host headers and other methods; adds the security headers that an answer does not set itself."""

    def __init__(
        self, app: ASGIApp, hosts: frozenset[str], any_address: bool, methods: tuple[str, ...] = ("GET", "HEAD")
    ) -> None:
        """hosts: names by which the page may be asked for, lower-case. any_address: or by any IP address.

        methods: by default those that change nothing.

        A site that a browser shows can point its own name at this machine (DNS rebinding) and then read the page as
        its own; the Host header gives it away, and it cannot use an address instead of its name.
        """
        self.app, self.hosts, self.any_address, self.methods = app, hosts, any_address, methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, by ASGI."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no websockets here

        async def send_protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        if not self._is_ours(Headers(scope=scope).getlist("host")):
            refusal = PlainTextResponse("This page answers only to the address that was printed at its start.", 421)
            await refusal(scope, receive, send_protected)
        elif scope["method"] not in self.methods:
            allowed = ", ".join(self.methods)
            refusal = PlainTextResponse(f"This page answers to {allowed} alone.", 405, {"Allow": allowed})
            await refusal(scope, receive, send_protected)
        else:
            await self.app(scope, receive, send_protected)

    def _is_ours(self, hosts: list[str]) -> bool:
        if len(hosts) != 1:
            return False
        name = _without_port(hosts[0]).lower()
        return name in self.hosts or (self.any_address and _is_address(name))


def _without_port(host: str) -> str:
    if host.startswith("["):  # IPv6: [::1]:8000
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
