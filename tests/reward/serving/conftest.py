"""A client that speaks ASGI by hand, a model that can be held up, and servers in processes of their own."""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from reward.sample import Sample
from reward.serving.access import Access
from reward.serving.app import Application, make_app
from reward.serving.limits import Limits, RefusedError
from reward.serving.metrics import Metrics
from reward.serving.model import Scores
from reward.serving.worker import Worker
from tests.conftest import ROOT
from tests.reward.conftest import save_classifier

JSON = {"content-type": "application/json", "host": "127.0.0.1:8788"}


def row(response: str, content: str = "one") -> dict[str, Any]:
    """One row of a request."""
    return {"prompt": [{"role": "user", "content": content}], "response": response, "columns": {}}


def body_of(*responses: str) -> bytes:
    """A request's body."""
    return json.dumps({"samples": [row(response) for response in responses]}).encode()


@dataclass
class Answer:
    """What came back: status, headers by lower-case name, and the body, read as JSON where it is some."""

    status: int
    headers: dict[str, str]
    raw: bytes

    @property
    def content(self) -> Any:
        """The body as JSON."""
        return json.loads(self.raw)

    @property
    def error(self) -> str:
        """The message of a refusal."""
        assert set(self.content) == {"error"}, self.content
        return self.content["error"]


@dataclass
class Lengths:
    """A model whose reward is the reply's length; `gate` closed, it scores nothing."""

    gate: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)
    passes: list[int] = field(default_factory=list)  # rows that were scored together
    score_of: Callable[[int], float] = float

    def encode(self, samples: Sequence[Sample]) -> list[list[int]]:
        """As many ids as characters."""
        for at, sample in enumerate(samples):
            if "unreadable" in sample.response:
                raise RefusedError(422, f"samples.{at}: cannot be read")
        return [[0] * len(sample.response) for sample in samples]

    def score(self, sequences: Sequence[Sequence[int]]) -> Scores:
        """Their number."""
        self.begun.set()
        assert self.gate.wait(30)
        self.passes.append(len(sequences))
        return Scores([self.score_of(len(ids)) for ids in sequences], None)


@dataclass
class Served:
    """An application with its parts."""

    app: Any
    application: Application
    model: Lengths
    metrics: Metrics
    worker: Worker

    def ask(self, body: bytes = b"", path: str = "/reward", method: str = "POST", **headers: str) -> Answer:
        """One request by itself."""
        return asyncio.run(talk(self.app, [body], path=path, method=method, headers=JSON | headers))

    def sample(self, name: str) -> dict[str, float]:
        """The metric's samples by their labels, as an independent reader of the format finds them."""
        from prometheus_client.parser import text_string_to_metric_families

        found = {}
        for family in text_string_to_metric_families(self.metrics.text().decode()):
            for sample in family.samples:
                if sample.name == name:
                    found[",".join(value for _, value in sorted(sample.labels.items()))] = sample.value
        return found


async def talk(
    app: Any,
    chunks: Iterable[bytes],
    *,
    path: str = "/reward",
    method: str = "POST",
    headers: dict[str, str] = JSON,
    leave: asyncio.Event | None = None,
    whole: bool = True,
) -> Answer:
    """One request by ASGI. leave: when the client goes away; whole: whether it sends everything before it waits."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in chunks]
    if whole:
        messages[-1]["more_body"] = False
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await (leave or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(key.replace("_", "-").encode(), value.encode()) for key, value in headers.items()],
        "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 8788),
    }
    await app(scope, receive, send)
    found = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:]))


@pytest.fixture
def served() -> Iterator[Callable[..., Served]]:
    """served(token=…, join_tokens=…, host=…, open=…, **limits): an application around `Lengths`."""
    made: list[Served] = []

    def make(
        token: str | None = None, join_tokens: int = 0, host: str = "127.0.0.1", open: bool = True, **limits: Any
    ) -> Served:
        model, metrics = Lengths(), Metrics()
        if open:
            model.gate.set()
        metrics.serves("tiny/reward:1", "sha256:abc", "float32", "cpu")
        worker = Worker(model, metrics, join_tokens)
        access = Access(token, host)
        application = Application("tiny/reward:1", "sha256:abc", worker, access, Limits(**limits), metrics)
        made.append(Served(make_app(application), application, model, metrics, worker))
        return made[-1]

    yield make
    for one in made:
        one.model.gate.set()
        one.worker.close()


PROGRAM = """
import sys, typer
from baton.errors import UserError
from reward.commands import serve
app = typer.Typer()
app.callback()(lambda: None)
serve.register(app)
try:
    app()
except UserError as error:
    sys.exit(f"error: {error}")
"""


@dataclass
class Server:
    """A server's process."""

    process: "subprocess.Popen[str]"
    line: str  # what it said when it was ready
    log: Path

    @property
    def url(self) -> str:
        """Where rewards are asked for."""
        return self.line.split()[0]

    def health(self, token: str | None = None) -> dict[str, Any]:
        """What /health says."""
        request = urllib.request.Request(self.url.replace("/reward", "/health"))
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """started(registry, ref, *options, **environment): a server in a process of its own, when it is ready."""
    monkeypatch.setenv("no_proxy", "*")
    processes: list[subprocess.Popen[str]] = []

    def start(registry: Any, ref: str, *options: str, **environment: str) -> Server:
        log = tmp_path / f"server-{len(processes)}.log"
        command = [sys.executable, "-c", PROGRAM, "serve-reward", ref, "--registry", registry.location, *options]
        given = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        with log.open("w") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=given)
        processes.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert re.match(r"http://127\.0\.0\.1:\d+/reward  ", line), (line, log.read_text())
        return Server(process, line, log)

    yield start
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> Any:
    """A registry with other/judge:1, a random classifier that reads 64 characters."""
    from baton.registry import Registry

    root = tmp_path_factory.mktemp("judge")
    registry = Registry(str(root / "registry"), create=True)
    registry.publish(save_classifier(root / "folder", pad="<pad>"), name="other/judge", kind="reward")
    return registry
