"""Endpoints that answer well, late, wrongly or not at all, on a server of the test's own."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from baton.errors import UserError
from baton.ppo_sections import RewardSource
from reward import endpoint
from reward.endpoint import EndpointSource
from reward.sample import RewardError, Sample
from reward.sources import checked

Answer = Callable[[dict[str, Any]], tuple[int, bytes]]
HELLO = [{"role": "user", "content": "Héllo?"}]


def sample(response: str, **columns: Any) -> Sample:
    return Sample(HELLO, [1, 2], [3, 4], response, columns)


class Server:
    """Answers by the given functions in turn, the last for ever; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.answers: list[Answer] = [lengths]
        self.pause_s = 0.0  # before every byte of the answer
        self.whole_answers = 0  # those whose last byte was sent
        self.headers_sent: list[tuple[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                outer.headers.append(self.headers)
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                status, content = answer(body)
                self.send_response(status)
                for key, value in outer.headers_sent or [("Content-Length", str(len(content)))]:
                    self.send_header(key, value)
                self.end_headers()
                try:
                    for at in range(len(content)) if outer.pause_s else ():
                        time.sleep(outer.pause_s)
                        self.wfile.write(content[at : at + 1])
                        self.wfile.flush()
                    if not outer.pause_s:
                        self.wfile.write(content)
                    outer.whole_answers += 1
                except OSError:
                    pass  # the client has gone

            def log_message(self, *arguments: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/judge"


def lengths(body: dict[str, Any]) -> tuple[int, bytes]:
    return 200, json.dumps({"rewards": [len(sample["response"]) for sample in body["samples"]]}).encode()


def status(code: int, text: str = "busy") -> Answer:
    return lambda body: (code, text.encode())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    running = Server()
    yield running
    running.server.shutdown()
    running.server.server_close()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, which are not waited for."""
    slept: list[float] = []
    real = time.sleep

    def sleep(seconds: float) -> None:
        # the server's own threads do wait
        slept.append(seconds) if threading.current_thread() is MAIN else real(seconds)

    monkeypatch.setattr(endpoint.time, "sleep", sleep)
    return slept


MAIN = threading.main_thread()


def opened(server: Server, **settings: Any) -> EndpointSource:
    return EndpointSource(RewardSource(url=server.url, **settings))


def test_the_request_and_its_batches(server: Server) -> None:
    source = opened(server, batch_size=2, weight=0.5)
    assert (source.label, source.weight) == ("judge", 0.5)
    samples = [sample("a", answer="1"), sample("bb", note=None), sample("çcc")]
    assert checked(source, samples) == [1.0, 2.0, 3.0]
    assert server.asked == [
        {
            "samples": [
                {"prompt": HELLO, "response": "a", "columns": {"answer": "1"}},
                {"prompt": HELLO, "response": "bb", "columns": {"note": None}},
            ]
        },
        {"samples": [{"prompt": HELLO, "response": "çcc", "columns": {}}]},
    ]
    assert {headers["Content-Type"] for headers in server.headers} == {"application/json"}


def test_the_default_batch_is_32(server: Server) -> None:
    checked(opened(server), [sample("x")] * 40)
    assert [len(body["samples"]) for body in server.asked] == [32, 8]


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_server_is_asked_again_after_longer_and_longer_pauses(
    server: Server, pauses: list[float], code: int
) -> None:
    server.answers = [status(code), status(code), status(code), lengths]
    assert checked(opened(server), [sample("ab")]) == [2.0]
    assert pauses == [0.5, 1.0, 2.0] and len(server.asked) == 4


@pytest.mark.parametrize(
    ("said", "expected"), [("7", 7.0), ("0", 0.5), ("9000", 30.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.5), ("-1", 0.5)]
)
def test_retry_after_makes_the_pause_longer(server: Server, pauses: list[float], said: str, expected: float) -> None:
    server.headers_sent = [("Retry-After", said), ("Content-Length", "4")]
    server.answers = [status(503)]
    with pytest.raises(RewardError, match="answered 503"):
        checked(opened(server, retries=1), [sample("ab")])
    assert pauses == [expected]


def test_each_new_attempt_is_told(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers = [status(503, "no GPU left"), lengths]
    checked(opened(server, name="helpful"), [sample("the reply")])
    told = capsys.readouterr().err
    for part in ("reward helpful:", server.url, "503", "no GPU left", "asked again in 0.5 s"):
        assert part in told
    assert "the reply" not in told


def test_a_token_of_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    checked(opened(server), [sample("x")])
    monkeypatch.setenv("JUDGE_TOKEN", "secret\n")
    source = opened(server, token_env="JUDGE_TOKEN")
    checked(source, [sample("x")])
    assert [headers["Authorization"] for headers in server.headers] == [None, "Bearer secret"]
    server.answers = [status(401, "no")]
    with pytest.raises(RewardError) as caught:
        checked(source, [sample("x")])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("value", "message"), [(None, "is not set"), ("", "is not set"), ("a b", "is no token")])
def test_a_token_that_is_not_there(
    server: Server, monkeypatch: pytest.MonkeyPatch, value: str | None, message: str
) -> None:
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_TOKEN", value)
    with pytest.raises(UserError, match=message):
        opened(server, token_env="JUDGE_TOKEN")


def test_a_token_is_for_a_url() -> None:
    for setting in ({"function": "a:b", "token_env": "TOKEN"}, {"url": "http://x/", "token_env": "not a name"}):
        with pytest.raises(ValueError, match="token_env names the environment variable"):
            RewardSource(**setting)


def test_a_server_that_stays_busy_stops_the_run(server: Server, pauses: list[float]) -> None:
    server.answers = [status(503, "no GPU left")]
    with pytest.raises(RewardError) as caught:
        checked(opened(server, retries=1, name="helpful"), [sample("the reply")])
    for part in ("reward helpful:", server.url, "503", "no GPU left", "after 2 attempts", "Héllo?", "the reply"):
        assert part in str(caught.value)
    assert pauses == [0.5] and len(server.asked) == 2


@pytest.mark.parametrize("code", [400, 401, 404, 422])
def test_a_refusal_is_final(server: Server, pauses: list[float], code: int) -> None:
    server.answers = [status(code, "no such field")]
    with pytest.raises(RewardError, match=f"answered {code} .*no such field"):
        checked(opened(server), [sample("x")])
    assert len(server.asked) == 1 and pauses == []


def test_a_redirect_is_not_followed(server: Server) -> None:
    server.answers = [status(302)]
    server.headers_sent = [("Location", server.url), ("Content-Length", "4")]
    with pytest.raises(RewardError, match="answered 302"):
        checked(opened(server), [sample("x")])
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON: ''"),
        ("<html>", "not JSON: '<html>'"),
        ("[1.0, 2.0]", r"answered \[1.0, 2.0\]; expected"),
        ('{"reward": [1, 2]}', "expected .*rewards"),
        ('{"rewards": 1}', "expected .*rewards"),
        ('{"rewards": [1]}', "1 rewards for 2 samples"),
        ('{"rewards": [1, 2, 3]}', "3 rewards for 2 samples"),
        ('{"rewards": [1, null]}', "answered None for a sample.*\n.*\n  response: second"),
        ('{"rewards": [1, "2"]}', "answered '2' for a sample"),
        ('{"rewards": [1, NaN]}', "gave nan, which is not a finite number\n.*\n  response: second"),
        ('{"rewards": [-Infinity, 1]}', "gave -inf, .*\n.*\n  response: first"),
    ],
)
def test_a_wrong_answer_stops_the_run(server: Server, content: str, message: str) -> None:
    server.answers = [lambda body: (200, content.encode())]
    with pytest.raises(RewardError, match=message):
        checked(opened(server), [sample("first"), sample("second")])
    assert len(server.asked) == 1


def test_a_server_that_does_not_answer_in_time(server: Server) -> None:
    def late(body: dict[str, Any]) -> tuple[int, bytes]:
        time.sleep(1)
        return lengths(body)

    server.answers = [late]
    with pytest.raises(RewardError, match="did not answer within 0.1 s, after 2 attempts"):
        checked(opened(server, timeout_s=0.1, retries=1), [sample("x")])


def test_a_server_that_drips_its_answer(server: Server) -> None:
    """Every byte comes within the timeout; the whole answer does not, and is not waited for."""
    server.pause_s = 0.05
    server.answers = [lambda body: (200, b'{"rewards": [1.0]}' + b" " * 1200)]  # a minute's worth
    with pytest.raises(RewardError, match="did not answer within 0.2 s"):
        checked(opened(server, timeout_s=0.2, retries=0), [sample("x")])
    assert len(server.asked) == 1 and server.whole_answers == 0


def test_an_answer_that_is_cut_off_is_asked_for_again(server: Server) -> None:
    server.headers_sent = [("Content-Length", "500")]
    with pytest.raises(RewardError, match="IncompleteRead.*after 2 attempts"):
        checked(opened(server, retries=1), [sample("x")])
    assert len(server.asked) == 2


def test_a_server_that_is_not_there(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        with pytest.raises(RewardError, match="cannot be reached: .*efused.*after 9 attempts"):
            checked(EndpointSource(RewardSource(url=url, name="gone")), [sample("x")])
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]  # a minute and a half to start the server again


@pytest.mark.parametrize("value", [float("nan"), {1, 2}])
def test_columns_that_json_cannot_say(server: Server, value: Any) -> None:
    with pytest.raises(RewardError, match="columns cannot be written as JSON"):
        checked(opened(server), [sample("x", odd=value)])
    assert server.asked == []


@pytest.mark.parametrize("url", ["localhost:80", "ftp://host/x", "http://", "http://host:port/", "file:///etc/passwd"])
def test_what_is_no_url_is_refused_at_opening(url: str) -> None:
    with pytest.raises(UserError, match="is no address; expected http://"):
        EndpointSource(RewardSource(url=url, name="x"))


def test_nothing_to_judge_asks_nothing(server: Server) -> None:
    assert checked(opened(server), []) == [] and server.asked == []
