"""Rewards by an HTTP endpoint: batches posted as JSON, retried, timed out."""

from __future__ import annotations

import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import SplitResult, urlsplit

from baton.errors import UserError
from baton.ppo_sections import RewardSource
from reward.sample import Sample, failure, shown

# a server that was killed has a minute and a half to be started again, and then TIMEOUT_S an attempt to load its model
BATCH_SIZE, TIMEOUT_S, RETRIES = 32, 30.0, 8
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
RETRIED_STATUS = (408, 429, *range(500, 600))
_TOKEN = re.compile(r"[!-~]+")


class EndpointSource:
    """An HTTP endpoint that judges replies.

    A batch of at most `batch_size` (32) rows is one POST with Content-Type: application/json:

        {"samples": [{"prompt": [{"role": "user", "content": "…"}], "response": "…", "columns": {…}}, …]}

    The answer has status 200 and one finite number a sample, in the same order; other fields are not read:

        {"rewards": [0.5, …]}

    With `token_env`, the environment variable of that name holds a token that goes with every request, as
    Authorization: Bearer.

    An endpoint that does not answer within `timeout_s` (30), cannot be reached, breaks off, or answers 408, 429 or 5xx
    is asked again up to `retries` (8) times, after 0.5, 1, 2, … at most 30 seconds, or its Retry-After if that
    is longer; so the same batch may reach it more than once. Everything else is an error at once: another status
    (redirects included: a POST would lose its body), an answer that is not JSON or not of this form, or another number
    of rewards. Standard library only: the stack's own HTTP client has another name from one release of
    huggingface_hub to the next.
    """

    def __init__(self, setting: RewardSource) -> None:
        """Raises UserError where the url is none, or the token's variable holds none."""
        assert setting.url is not None
        parts = urlsplit(setting.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not _has_port(parts):
            raise UserError(f"url: {setting.url!r} is no address; expected http://host:port/path or https://…")
        self.label, self.weight = setting.label, setting.weight
        self._url = setting.url
        self._batch_size = setting.batch_size or BATCH_SIZE
        self._timeout_s = setting.timeout_s or TIMEOUT_S
        self._retries = RETRIES if setting.retries is None else setting.retries
        self._token = None if setting.token_env is None else _token_in(setting.token_env)
        self._opener = urllib.request.build_opener(_NoRedirect)

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Rewards in the samples' order. Raises RewardError with the batch's first row."""
        size = self._batch_size
        return [
            reward for start in range(0, len(samples), size) for reward in self._batch(samples[start : start + size])
        ]

    def _batch(self, samples: Sequence[Sample]) -> list[float]:
        body = _body(self.label, samples)
        for attempt in range(self._retries + 1):
            pause = min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S)
            try:
                return self._rewards(self._post(body), samples)
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"{self._url} answered {error.code} {error.reason}: {shown(_start_of(error))}"
                if error.code not in RETRIED_STATUS:
                    raise failure(self.label, problem, samples) from error
                cause: Exception = error
                pause = max(pause, _retry_after_s(error))
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                late = isinstance(reason, TimeoutError)
                problem = f"{self._url} " + (
                    f"did not answer within {self._timeout_s:g} s" if late else f"cannot be reached: {reason!r}"
                )
                cause = error
            if attempt < self._retries:
                print(f"reward {self.label}: {problem}; asked again in {pause:g} s", file=sys.stderr, flush=True)
                time.sleep(pause)
        raise failure(self.label, f"{problem}, after {self._retries + 1} attempts", samples) from cause

    def _post(self, body: bytes) -> bytes:
        """The answer's body; a TimeoutError when it is not complete within the time."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(self._url, data=body, headers=headers, method="POST")
        deadline = time.monotonic() + self._timeout_s
        chunks = []
        with self._opener.open(request, timeout=self._timeout_s) as response:
            # the timeout is of each wait alone: a server that drips its answer would hold the run for ever
            while chunk := response.read1(1 << 16):
                chunks.append(chunk)
                if time.monotonic() > deadline:
                    raise TimeoutError
            if response.length:  # bytes announced and not sent: read1 does not mind
                raise http.client.IncompleteRead(b"".join(chunks), response.length)
        return b"".join(chunks)

    def _rewards(self, answer: bytes, samples: Sequence[Sample]) -> list[float]:
        try:
            content = json.loads(answer)
        except (ValueError, RecursionError) as error:
            what = f"{self._url} answered what is not JSON: {shown(answer[:2000].decode(errors='replace'))}"
            raise failure(self.label, what, samples) from error
        rewards: Any = content.get("rewards") if isinstance(content, dict) else None
        if not isinstance(rewards, list):
            what = f'{self._url} answered {shown(content)}; expected {{"rewards": [one number a sample]}}'
            raise failure(self.label, what, samples)
        if len(rewards) != len(samples):
            counts = f"{len(rewards)} rewards for {len(samples)} samples"
            raise failure(self.label, f"{self._url} answered {counts}: {shown(rewards)}", samples)
        for reward, sample in zip(rewards, samples, strict=True):
            if not isinstance(reward, (int, float)):
                what = f"{self._url} answered {shown(reward)} for a sample; expected a number"
                raise failure(self.label, what, [sample])
        return [float(reward) for reward in rewards]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        """Follow none: the redirect's status becomes the error."""


def _token_in(variable: str) -> str:
    token = os.environ.get(variable, "").strip()
    if not _TOKEN.fullmatch(token):
        found = "holds what is no token" if token else "is not set, or empty"
        raise UserError(f"token_env: ${variable} {found}; expected the token of the url's server: export {variable}=…")
    return token


def _retry_after_s(error: urllib.error.HTTPError) -> float:
    """The seconds of a Retry-After header, at most the longest pause; 0 where there are none."""
    text = error.headers.get("Retry-After", "") if error.headers else ""
    return min(float(text), LONGEST_PAUSE_S) if text.isdecimal() else 0.0


def _has_port(parts: SplitResult) -> bool:
    """Whether the port is a number, or left out."""
    try:
        return parts.port != 0
    except ValueError:
        return False


def _body(label: str, samples: Sequence[Sample]) -> bytes:
    rows = [{"prompt": s.prompt, "response": s.response, "columns": s.columns} for s in samples]
    try:
        return json.dumps({"samples": rows}, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise failure(label, f"the data's columns cannot be written as JSON: {error}", samples) from error


def _start_of(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(2000).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""
