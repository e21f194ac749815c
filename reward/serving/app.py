"""The web application: rewards, health and metrics over HTTP."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
import traceback
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from reward.serving.access import Access
from reward.serving.body import read_samples
from reward.serving.limits import Limits, RefusedError
from reward.serving.metrics import Metrics
from reward.serving.model import Scores
from reward.serving.worker import Job, Worker

PATH = "/reward"
RETRY_AFTER_S = 1
GONE = 499
"""In log and metrics: the client left before its answer was there."""


class Application:
    """One version behind HTTP."""

    def __init__(
        self, name: str, digest: str, worker: Worker, access: Access, limits: Limits, metrics: Metrics
    ) -> None:
        """name, digest: of the version; worker: scores."""
        self._name, self._digest = name, digest
        self._worker, self._access, self._limits, self._metrics = worker, access, limits, metrics
        self._in_hand = 0

    async def reward(self, request: Request) -> Response:
        """POST: {"samples": [{"prompt", "response", "columns"}, …]} -> {"rewards": […]}, and "deviations"."""
        started = time.perf_counter()
        job: Job | None = None
        status, note, num_rows = 500, "", 0
        try:
            job = await self._accept(request)
            scores = await self._scores(request, job)
            answer, num_rows = self._answer(scores), len(scores.rewards)
            status = 200
            return answer
        except RefusedError as error:
            status, note = error.status, str(error)
            return refusal(error)
        except ClientDisconnect:
            status, note = GONE, "the client has gone"
            return Response(status_code=GONE)  # nobody reads it
        except Exception as error:
            note = _where(error)
            return refusal(RefusedError(500, "the server failed; its log says at what"))
        finally:
            seconds = time.perf_counter() - started
            self._metrics.answered(status, seconds, num_rows)
            self._log(request, status, job, seconds, note)

    async def _accept(self, request: Request) -> Job:
        """The request's rows, handed to the worker. Raises RefusedError, ClientDisconnect."""
        try:
            self._access.check_host(request.headers)
            self._access.check_token(request.headers)
            check_head(request, self._limits)
            if self._in_hand >= self._limits.queue:
                what = f"{self._in_hand} requests are waiting already; ask again"
                raise RefusedError(503, what, RETRY_AFTER_S)
        except RefusedError:
            if request.headers.get("expect", "").lower() != "100-continue":  # then it has not sent its body yet
                await _discard(request.stream(), self._limits)
            raise
        if not self._worker.alive:
            raise RefusedError(500, "the model's thread has ended; this server must be started anew")
        self._in_hand += 1
        self._metrics.queued(self._in_hand)
        try:
            body = await _read(request, self._limits)
            samples = await run_in_threadpool(read_samples, body, self._limits)
            return self._worker.submit(samples)
        except BaseException:
            self._leave()
            raise

    async def _scores(self, request: Request, job: Job) -> Scores:
        """Wait for a job, or for its client to leave. Raises RefusedError, ClientDisconnect."""
        answer = asyncio.wrap_future(job.answer)
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            waited: set[asyncio.Future[Any]] = {answer, gone}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ClientDisconnect
            return answer.result()
        finally:
            gone.cancel()
            answer.cancel()  # a row that nobody waits for is not scored
            self._leave()

    def _leave(self) -> None:
        self._in_hand -= 1
        self._metrics.queued(self._in_hand)

    def _answer(self, scores: Scores) -> Response:
        for at, number in enumerate([*scores.rewards, *(scores.deviations or [])]):
            if not math.isfinite(number):
                row = at % len(scores.rewards)
                raise RefusedError(500, f"samples.{row}: the model's reward is {number}, which is no finite number")
        content: dict[str, list[float]] = {"rewards": scores.rewards}
        if scores.deviations is not None:
            content["deviations"] = scores.deviations
        return _json(content, 200, {"X-Baton-Version": self._name, "X-Baton-Digest": self._digest})

    async def health(self, request: Request) -> Response:
        """GET: whether rewards are to be had and, for whoever has the token, of which version."""
        try:
            self._access.check_host(request.headers)
        except RefusedError as error:
            return refusal(error)
        ready = self._worker.alive
        content: dict[str, object] = {"ready": ready}
        if self._access.bears_token(request.headers):
            content |= {"version": self._name, "digest": self._digest, "queue": self._in_hand}
        return _json(content, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """GET: the counters, for Prometheus."""
        try:
            self._access.check_host(request.headers)
            self._access.check_token(request.headers)
        except RefusedError as error:
            return refusal(error)
        return Response(self._metrics.text(), headers={"Content-Type": self._metrics.content_type})

    def _log(self, request: Request, status: int, job: Job | None, seconds: float, note: str) -> None:
        """One line: when, from where, what came of it; no text of anybody's."""
        client = request.client.host if request.client else "-"
        parts = [datetime.now(UTC).isoformat(timespec="milliseconds"), client, str(status), f"{seconds:.3f} s"]
        if job is not None:
            parts += [f"{len(job.samples)} rows", f"{job.num_tokens} tokens", f"waited {job.waited_s:.3f} s"]
        print("  ".join([*parts, *([note] if note else [])]), file=sys.stderr, flush=True)


def make_app(application: Application) -> Starlette:
    """Its routes; errors are JSON as well."""
    routes = [
        Route(PATH, application.reward, methods=["POST"]),
        Route("/health", application.health),
        Route("/metrics", application.metrics),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _no_such_page, Exception: _defect})


def refusal(error: RefusedError) -> Response:
    """{"error": message} with its status."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):
        headers["Connection"] = "close"  # what is left of the body must not be read as a request
    return _json({"error": str(error)}, error.status, headers)


def check_head(request: Request, limits: Limits) -> None:
    """Refuse by the headers alone. Raises RefusedError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # a form that a browser sends across sites without asking cannot be of this type
    if kind != "application/json":
        raise RefusedError(415, "expected Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RefusedError(415, "a compressed body is not read here; send it as it is")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limits.num_bytes:
        raise RefusedError(413, f"a body of {length} bytes; this server takes at most {limits.num_bytes}")


async def _read(request: Request, limits: Limits) -> bytes:
    """The whole body. Raises RefusedError 408 and 413, ClientDisconnect."""
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            chunks = request.stream()
            async for chunk in chunks:
                if len(body) + len(chunk) > limits.num_bytes:
                    await _discard(chunks, limits)
                    raise RefusedError(413, f"a body of more than {limits.num_bytes} bytes, the most it may have here")
                body += chunk
    except TimeoutError:
        raise RefusedError(408, f"the body was not complete after {limits.body_s:g} s") from None
    return bytes(body)


async def _discard(chunks: AsyncIterator[bytes], limits: Limits) -> None:
    """Read a refused body away, up to some size: clients read an answer only when they have sent everything."""
    length = 0
    try:
        async with asyncio.timeout(limits.body_s):
            async for chunk in chunks:
                length += len(chunk)
                if length > 8 * limits.num_bytes:
                    return
    except TimeoutError:
        return


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _no_such_page(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: f"there is POST {PATH}, GET /health and GET /metrics", 405: "another method is expected here"}
    refused = refusal(RefusedError(error.status_code, message.get(error.status_code, error.detail)))
    refused.headers.update(error.headers or {})
    return refused


def _defect(request: Request, error: Exception) -> Response:
    print(f"{request.url.path}: {_where(error)}", file=sys.stderr, flush=True)
    return refusal(RefusedError(500, "the server failed; its log says at what"))


def _where(error: BaseException) -> str:
    """The error's kind and place, without its message, which may quote a text."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return f"{type(error).__name__} at " + " > ".join(f"{frame.filename}:{frame.lineno}" for frame in frames)


def _json(content: object, status: int, headers: dict[str, str] | None = None) -> Response:
    body = json.dumps(content, ensure_ascii=False, allow_nan=False)
    return Response(body, status, {"Content-Type": "application/json", "Cache-Control": "no-store", **(headers or {})})
