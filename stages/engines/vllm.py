"""Rollouts by a vLLM server that runs in an environment of its own; the policy's adapter is pushed after each update.

Start the server on the same base, where it sees the run folder (the same machine, or a shared file system):

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank R --max-loras 2 \\
        --logprobs-mode processed_logprobs

`processed_logprobs`: those of the distribution that is sampled; by default they are those at temperature 1.
"""

from __future__ import annotations

import http.client
import json
import shutil
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from baton.decode import Reply
from baton.errors import UserError
from baton.ppo_sections import Rollout
from stages.rollout import sampling_noise

TIMEOUT_S = 600.0
"""Of one request, which waits for its turn on the server and makes one reply."""

ATTEMPTS = 5
FIRST_PAUSE_S = 1.0
RETRIED_STATUS = (429, 502, 503, 504)

START_HINT = (
    "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank R "
    "--max-loras 2 --logprobs-mode processed_logprobs"
)


class Refused(Exception):
    """The server answered with an error of its own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


class Server:
    """JSON to a server and back; tries again while it cannot be reached or is busy."""

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S, first_pause_s: float = FIRST_PAUSE_S) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"rollout.url: {url!r} is no address; expected http://host:port of a vLLM server")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout_s, self._first_pause_s = timeout_s, first_pause_s

    def ask(self, path: str, payload: dict[str, Any] | None = None) -> str:
        """GET, or POST `payload`; the answer's text. Raises Refused, or UserError where there is no server."""
        problem = ""
        cause: Exception | None = None
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(self._first_pause_s * 2 ** (attempt - 1))
            body = None if payload is None else json.dumps(payload).encode()
            request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=self._timeout_s) as response:
                    return str(response.read().decode())
            except urllib.error.HTTPError as error:
                with error:
                    message = error.read(2000).decode(errors="replace").strip()
                if error.code not in RETRIED_STATUS:
                    raise Refused(error.code, message) from error
                problem, cause = f"answered {error.code} {message}", error
            except (OSError, http.client.HTTPException) as error:
                problem, cause = f"cannot be reached: {getattr(error, 'reason', None) or error!r}", error
        raise UserError(
            f"the vLLM server {self.url} {problem} ({path}, {ATTEMPTS} attempts). Is it running? If not, {START_HINT}; "
            "the run goes on from its last checkpoint"
        ) from cause


class VLLM:
    """A client of vLLM's OpenAI-compatible server. A reply is seeded by run and episode; its company may change it."""

    def __init__(
        self,
        rollout: Rollout,
        *,
        save_policy: Callable[[Path], None],
        seed: int,
        stop_ids: Sequence[int],
        folder: Path,
        agreed: Callable[[str], str] = str,
        is_main: bool = True,
        server: Server | None = None,
    ) -> None:
        """Raises UserError where no vLLM server answers. For `agreed` and `is_main` see `open_engine`."""
        assert rollout.url is not None
        self._rollout, self._save_policy, self._seed = rollout, save_policy, seed
        self._stop_ids, self._folder, self._agreed, self._is_main = list(stop_ids), folder, agreed, is_main
        self._server = server or Server(rollout.url)
        self._name: str | None = None
        self._pushes = 0
        try:
            json.loads(self._server.ask("/v1/models"))["data"]
        except (Refused, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._server.url} is no vLLM server ({error}); {START_HINT}") from error

    def push(self) -> None:
        """Save the policy's adapter, have it loaded under a new name, and the old one unloaded.

        A new name each time: the server's cache of prompts is kept by name.
        """
        self._pushes += 1
        # the name comes from one process, and says that all are done with the old adapter
        name = self._agreed(f"baton-{uuid.uuid4().hex[:12]}-{self._pushes}")
        folder = self._folder.resolve() / name
        self._save_policy(folder)
        if self._is_main:
            if not (folder / "adapter_config.json").exists():
                raise UserError(
                    "rollout.engine: vllm pushes the policy as a LoRA adapter, and this policy is a whole model; train "
                    "with lora, or use rollout.engine: built-in"
                )
            self._load(name, folder)
        self._agreed(name)
        old, self._name = self._name, name
        self._forget(old)

    def generate(self, prompts: Sequence[list[int]], indices: Sequence[int]) -> list[Reply]:
        """One request a prompt, `rollout.rows` at a time."""
        assert self._name is not None, "push comes first"
        if not len(prompts):
            return []
        with ThreadPoolExecutor(min(self._rollout.rows, len(prompts))) as pool:
            waiting = [pool.submit(self._reply, prompt, index) for prompt, index in zip(prompts, indices, strict=True)]
            try:
                return [reply.result() for reply in waiting]
            finally:
                # after a failure the others need not be asked any more
                pool.shutdown(wait=True, cancel_futures=True)

    def close(self) -> None:
        """Unload the adapter and delete its folder."""
        old, self._name = self._name, None
        self._forget(old)

    def _load(self, name: str, folder: Path) -> None:
        try:
            self._server.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        except Refused as error:
            # an answer that was lost: the first attempt had loaded it
            if error.status == 400 and "already been loaded" in error.message:
                return
            if error.status in (404, 405) and "lora" not in error.message.lower():
                raise UserError(f"{self._server.url} does not take adapters at run time; {START_HINT}") from error
            raise UserError(
                f"{self._server.url} could not load the policy's adapter from {folder} ({error}). It must see that "
                f"folder, serve the policy's base and allow the adapter's rank: {START_HINT}"
            ) from error

    def _forget(self, name: str | None) -> None:
        if name is None or not self._is_main:
            return
        try:
            self._server.ask("/v1/unload_lora_adapter", {"lora_name": name})
        except Refused as error:
            if error.status != 404:
                raise RuntimeError(f"{self._server.url} could not unload the adapter {name} ({error})") from error
        shutil.rmtree(self._folder.resolve() / name, ignore_errors=True)

    def _reply(self, prompt: Sequence[int], index: int) -> Reply:
        payload = {
            "model": self._name,
            "prompt": list(prompt),
            "max_tokens": self._rollout.max_new_tokens,
            "temperature": self._rollout.temperature,
            # said outright: what is left out comes from the model's generation_config.json
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": int(sampling_noise(self._seed, index, 1)[0] * 2**53),
            # the run's stop tokens and no other
            "stop_token_ids": self._stop_ids,
            "ignore_eos": True,
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
        }
        try:
            answer = self._server.ask("/v1/completions", payload)
        except Refused as error:
            raise UserError(f"{self._server.url} refused a prompt of {len(prompt)} tokens ({error})") from error
        return read_reply(answer, self._stop_ids, self._rollout.max_new_tokens)


def read_reply(answer: str, stop_ids: Sequence[int], max_new_tokens: int) -> Reply:
    """The reply in the text of a completion; raises RuntimeError where it is not what was asked for."""
    try:
        (choice,) = json.loads(answer)["choices"]
        logprobs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
        # token_ids since vLLM 0.10.2; before, tokens are written "token_id:17"
        ids = choice.get("token_ids") or [
            int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]
        ]
        reason = choice["finish_reason"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RuntimeError(
            f"the vLLM server's answer has no token ids or no log-probabilities: {answer[:500]}"
        ) from error
    ended = bool(ids) and ids[-1] in stop_ids
    whole = 0 < len(ids) <= max_new_tokens and len(ids) == len(logprobs)
    if not whole or not (ended or (reason == "length" and len(ids) == max_new_tokens)):
        raise RuntimeError(
            f"the vLLM server ended a reply after {len(ids)} of at most {max_new_tokens} tokens because of {reason!r} "
            f"with {len(logprobs)} log-probabilities, its last tokens being {ids[-3:]} and the stop tokens "
            f"{list(stop_ids)}; is its --max-model-len too small for prompt and reply?"
        )
    return Reply(ids, ended, logprobs)
