"""A small HTTP proxy before a store's server: loses answers, refuses, delays, and counts what passes."""

import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit


class Passed(NamedTuple):
    """One request that came by: method, path with query, bytes of its body, and what was done to it."""

    method: str
    path: str
    size: int
    fault: str | None


Decide = Callable[[str, str, dict[str, str]], str | None]
"""(method, path, headers) -> None to let pass, "lose" the answer after forwarding, "refuse" before it, or "NNN"."""


class FaultProxy:
    """Use as a context; `url` is where it listens, `decide` may be set at any time."""

    def __init__(self, target: str) -> None:
        """target: URL of the real server."""
        self.target = urlsplit(target)
        self.decide: Decide = lambda method, path, headers: None
        self.passed: list[Passed] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *arguments: object) -> None:
                pass

            def handle_any(self) -> None:
                proxy._handle(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *arguments: None  # type: ignore[method-assign] # killed clients are the point
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        # The server that this is made of has said "100 Continue" by itself.
        headers = {name: value for name, value in request.headers.items() if name.lower() != "expect"}
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        fault = self.decide(request.command, request.path, headers)
        self.passed.append(Passed(request.command, request.path, len(body), fault))
        if fault == "refuse":
            request.close_connection = True
            return
        if fault is not None and fault != "lose":
            self._answer(request, int(fault[:3]), [], ERROR.format(code=fault[4:] or "Fault").encode())
            return
        assert self.target.hostname is not None
        onward = http.client.HTTPConnection(self.target.hostname, self.target.port, timeout=60)
        onward.request(request.command, request.path, body, headers)
        answer = onward.getresponse()
        data = answer.read()
        if fault == "lose":
            request.close_connection = True
            return
        self._answer(request, answer.status, answer.getheaders(), data)

    def _answer(
        self, request: BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], data: bytes
    ) -> None:
        request.send_response_only(status)
        kept = [(name, value) for name, value in headers if name.lower() not in ("transfer-encoding", "connection")]
        for name, value in kept:
            request.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in kept):
            request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)


ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>as the test wants it</Message></Error>"
