"""The client against a local server that speaks vLLM's endpoints, with a tiny model and PEFT behind it."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.errors import UserError
from baton.ppo_sections import Rollout
from stages.engines import open_engine
from stages.engines.agreement import check_engine
from stages.engines.vllm import VLLM, Refused, Server, read_reply

PROMPTS = [[3, 4, 5], [7], [9, 9, 30, 9], [2, 40]]
STOPS = [1, 20]


class FakeVLLM(ThreadingHTTPServer):
    """What the tests see and break: requests by path, adapters by name, answers to give before the real ones."""

    def __init__(self, base: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.base, self.lock = base, threading.Lock()
        self.adapters: dict[str, Any] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.failures: list[tuple[str, int, str]] = []  # (path, status, message); status 0: hang up after doing it
        self.old = False  # before 0.10.2: no token_ids

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        """One row at a time, without a cache."""
        generator = torch.Generator().manual_seed(request["seed"])
        ids, logprobs, reason = list(request["prompt"]), [], "length"
        while len(logprobs) < request["max_tokens"]:
            with torch.no_grad():
                logits = self.adapters[request["model"]](input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            table = (logits.double() / request["temperature"]).log_softmax(-1)
            token = int(table.exp().multinomial(1, generator=generator))
            ids.append(token)
            logprobs.append(float(table[token]))
            if token in request["stop_token_ids"]:
                reason = "stop"
                break
        said = ids[len(request["prompt"]) :]
        tokens = {"tokens": [f"token_id:{token}" for token in said], "token_logprobs": logprobs}
        choice = {"index": 0, "text": "", "logprobs": tokens, "finish_reason": reason}
        return {"choices": [choice if self.old else choice | {"token_ids": said}]}


class Handler(BaseHTTPRequestHandler):
    server: FakeVLLM

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "base"}]} if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, request))
            failure = next((failure for failure in self.server.failures if failure[0] == self.path), None)
            if failure:
                self.server.failures.remove(failure)
            if failure and failure[1]:
                return self.answer(failure[1], {"error": {"message": failure[2]}})
            status, content = getattr(self, self.path.rpartition("/")[2])(request)
        if failure:
            return self.connection.close()
        self.answer(status, content)

    def completions(self, request: dict[str, Any]) -> tuple[int, Any]:
        return 200, self.server.complete(request)

    def load_lora_adapter(self, request: dict[str, Any]) -> tuple[int, Any]:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        name = request["lora_name"]
        if name in self.server.adapters:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        base = AutoModelForCausalLM.from_pretrained(self.server.base)
        self.server.adapters[name] = PeftModel.from_pretrained(base, request["lora_path"]).eval()
        return 200, "Success"

    def unload_lora_adapter(self, request: dict[str, Any]) -> tuple[int, Any]:
        if self.server.adapters.pop(request["lora_name"], None) is None:
            return 404, {"error": {"message": "The lora adapter cannot be found."}}
        return 200, "Success"

    def answer(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(role_folders: Any) -> Iterator[FakeVLLM]:
    fake = FakeVLLM(role_folders.base)
    thread = threading.Thread(target=fake.serve_forever, daemon=True)
    thread.start()
    yield fake
    fake.shutdown()
    fake.server_close()
    thread.join()


@pytest.fixture
def policy(role_folders: Any) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(role_folders.base)
    return PeftModel.from_pretrained(base, role_folders.sft, is_trainable=True).eval()


@pytest.fixture
def opened(server: FakeVLLM, policy: Any, tmp_path: Path) -> Callable[..., VLLM]:
    def make(seed: int = 3, save_policy: Any = None, **settings: Any) -> VLLM:
        settings = {"max_new_tokens": 7, "temperature": 0.8, "rows": 3} | settings
        return VLLM(
            Rollout(engine="vllm", url=server.url, **settings),
            save_policy=save_policy or policy.save_pretrained,
            seed=seed,
            stop_ids=STOPS,
            folder=tmp_path / "pushed",
            server=Server(server.url, timeout_s=20, first_pause_s=0.01),
        )

    return make


def trainer_logprobs(model: Any, prompt: list[int], ids: list[int], temperature: float = 0.8) -> list[float]:
    with torch.no_grad():
        table = (model(input_ids=torch.tensor([prompt + ids])).logits[0].double() / temperature).log_softmax(-1)
    return [float(table[len(prompt) + at - 1, token]) for at, token in enumerate(ids)]


def drift(model: Any, replies: list[Any], limit: float) -> float:
    theirs = [trainer_logprobs(model, prompt, reply.ids) for prompt, reply in zip(PROMPTS, replies, strict=True)]
    return check_engine([reply.logprobs for reply in replies], theirs, limit)


@pytest.mark.parametrize("old", [False, True])
def test_replies_come_from_the_pushed_policy(
    opened: Callable[..., VLLM], server: FakeVLLM, policy: Any, tmp_path: Path, old: bool
) -> None:
    server.old = old
    engine = opened()
    engine.push()
    first = engine.generate(PROMPTS, range(4))
    assert drift(policy, first, 1e-4) < 1e-4
    assert all(reply.ended or len(reply.ids) == 7 for reply in first) and any(reply.ended for reply in first)
    names = [request["lora_name"] for path, request in server.asked if path == "/v1/load_lora_adapter"]
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1.5)
    # the engine still has the old weights, and the probe sees it
    with pytest.raises(UserError, match="nats a token on average"):
        drift(policy, engine.generate(PROMPTS, range(4)), 0.05)
    engine.push()
    assert drift(policy, engine.generate(PROMPTS, range(4)), 1e-4) < 1e-4
    (left,) = server.adapters
    assert left not in names and [folder.name for folder in (tmp_path / "pushed").iterdir()] == [left]
    engine.close()
    assert not server.adapters and not list((tmp_path / "pushed").iterdir())


def test_the_request_asks_for_the_plain_softmax(opened: Callable[..., VLLM], server: FakeVLLM) -> None:
    engine = opened(temperature=0.7)
    engine.push()
    engine.generate(PROMPTS, [5, 6, 7, 8])
    asked = [request for path, request in server.asked if path == "/v1/completions"]
    assert sorted(request["prompt"] for request in asked) == sorted(PROMPTS)
    assert len({request["seed"] for request in asked}) == 4
    for request in asked:
        assert (request["temperature"], request["top_p"], request["top_k"], request["min_p"]) == (0.7, 1.0, 0, 0.0)
        assert request["repetition_penalty"] == 1.0 and request["max_tokens"] == 7
        assert request["stop_token_ids"] == STOPS and request["ignore_eos"] is True


def test_the_seed_belongs_to_run_and_episode(opened: Callable[..., VLLM]) -> None:
    engine, other = opened(), opened(seed=4)
    engine.push()
    other.push()
    first = engine.generate(PROMPTS, range(4))
    assert engine.generate(PROMPTS[::-1], [3, 2, 1, 0]) == first[::-1]
    assert engine.generate(PROMPTS, range(4, 8)) != first != other.generate(PROMPTS, range(4))


def test_a_busy_server_and_a_lost_answer_are_asked_again(opened: Callable[..., VLLM], server: FakeVLLM) -> None:
    engine = opened()
    server.failures = [("/v1/load_lora_adapter", 0, ""), ("/v1/completions", 503, "busy"), ("/v1/completions", 0, "")]
    engine.push()
    replies = engine.generate(PROMPTS, range(4))
    assert replies == engine.generate(PROMPTS, range(4)) and not server.failures


@pytest.mark.parametrize(
    ("failures", "said"),
    [
        ([("/v1/load_lora_adapter", 404, "Not Found")], "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        ([("/v1/load_lora_adapter", 500, "rank 64 is too large")], "could not load .*rank 64 is too large"),
        ([("/v1/completions", 400, "maximum context length")], "refused a prompt of . tokens .*maximum context"),
        ([("/v1/completions", 503, "busy")] * 99, "answered 503 .*busy.*5 attempts.*last checkpoint"),
    ],
)
def test_what_goes_wrong_is_said(
    opened: Callable[..., VLLM], server: FakeVLLM, failures: list[tuple[str, int, str]], said: str
) -> None:
    engine = opened()
    server.failures = list(failures)
    with pytest.raises(UserError, match=said):
        engine.push()
        engine.generate(PROMPTS, range(4))


def test_a_whole_model_is_refused(opened: Callable[..., VLLM], tiny_llama: Any) -> None:
    with pytest.raises(UserError, match="as a LoRA adapter"):
        opened(save_policy=tiny_llama.save_pretrained).push()


def test_no_server(tmp_path: Path, server: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    import stages.engines.vllm

    monkeypatch.setattr(stages.engines.vllm, "FIRST_PAUSE_S", 0.0)
    with pytest.raises(UserError, match="is no address"):
        Server("localhost:8000")

    def connect(url: str) -> Any:
        return VLLM(
            Rollout(max_new_tokens=1, engine="vllm", url=url),
            save_policy=lambda folder: None,
            seed=0,
            stop_ids=[],
            folder=tmp_path,
            server=Server(url, timeout_s=1, first_pause_s=0.0),
        )

    with pytest.raises(UserError, match="cannot be reached.*vllm serve"):
        connect("http://127.0.0.1:9")
    with pytest.raises(UserError, match="is no vLLM server"):
        connect(server.url + "/elsewhere")


def test_open_engine_connects(server: FakeVLLM, policy: Any, tmp_path: Path, model_of: Any) -> None:
    engine = open_engine(
        Rollout(max_new_tokens=3, engine="vllm", url=server.url + "/v1"),
        model_of=model_of,
        save_policy=policy.save_pretrained,
        seed=0,
        stop_ids=STOPS,
        pad_id=2,
        folder=tmp_path,
    )
    engine.push()
    assert len(engine.generate(PROMPTS, range(4))) == 4
    assert engine.generate([], []) == []
    engine.close()


def test_only_the_main_process_loads_and_all_use_its_name(server: FakeVLLM, policy: Any, tmp_path: Path) -> None:
    names: list[str] = []

    def agreed_on_main(name: str) -> str:
        names.append(name)
        return name

    engines = [
        VLLM(
            Rollout(max_new_tokens=3, engine="vllm", url=server.url),
            save_policy=save_policy,
            seed=0,
            stop_ids=STOPS,
            folder=tmp_path,
            agreed=agreed,
            is_main=is_main,
        )
        for save_policy, agreed, is_main in (
            (policy.save_pretrained, agreed_on_main, True),
            (lambda folder: None, lambda name: names[-1], False),
        )
    ]
    for engine in engines:
        engine.push()
    assert engines[0].generate(PROMPTS, range(4)) == engines[1].generate(PROMPTS, range(4))
    assert len(server.adapters) == 1
    engines[1].close()
    assert len(server.adapters) == 1


def answer(ids: list[int], reason: str, logprobs: int | None = None) -> str:
    tokens = {"token_logprobs": [-1.0] * (len(ids) if logprobs is None else logprobs), "tokens": ["?"] * len(ids)}
    return json.dumps({"choices": [{"token_ids": ids, "finish_reason": reason, "logprobs": tokens}]})


def test_answers_that_are_not_what_was_asked_for() -> None:
    assert read_reply(answer([5, 1], "stop"), [1], 4).ended
    assert not read_reply(answer([5, 6, 7, 8], "length"), [1], 4).ended
    for text in (
        answer([5, 6], "stop"),  # by a token that is none of ours
        answer([5, 6], "length"),  # by the server's own limit
        answer([5, 6, 7, 8, 9], "length"),
        answer([5, 1], "stop", logprobs=1),
        answer([], "stop"),
        "<html>",
        json.dumps({"choices": [{"finish_reason": "stop"}]}),
    ):
        with pytest.raises(RuntimeError, match="vLLM server"):
            read_reply(text, [1], 4)


def test_the_servers_own_errors(server: FakeVLLM) -> None:
    with pytest.raises(Refused, match="404"):
        Server(server.url, first_pause_s=0.0).ask("/v1/unload_lora_adapter", {"lora_name": "nobody"})
