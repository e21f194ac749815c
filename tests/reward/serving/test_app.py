"""The application: what it answers, what it refuses, and what it says about either."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.reward.serving.conftest import JSON, Served, body_of, talk

Make = Callable[..., Served]
TOKEN = "0123456789abcdef"


def test_rewards_in_the_schema_of_ppo(served: Make) -> None:
    answer = served().ask(body_of("a", "four"))
    assert answer.status == 200 and answer.content == {"rewards": [1.0, 4.0]}
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-baton-version"] == "tiny/reward:1" and answer.headers["x-baton-digest"] == "sha256:abc"
    assert served().ask(b'{"samples": []}').content == {"rewards": []}


def test_an_ensemble_says_how_far_its_members_are_apart(served: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from reward.serving.model import Scores

    one = served()
    monkeypatch.setattr(one.model, "score", lambda sequences: Scores([1.5, 2.5], [0.25, 0.0]), raising=False)
    assert one.ask(body_of("a", "b")).content == {"rewards": [1.5, 2.5], "deviations": [0.25, 0.0]}


@pytest.mark.parametrize(
    ("limits", "body", "status", "message"),
    [
        ({"num_bytes": 90}, body_of("x"), 413, "a body of more than 90 bytes"),
        ({"num_rows": 1}, body_of("x", "y"), 413, "2 samples; this server takes at most 1"),
        ({}, b"", 400, "not JSON: Expecting value at character 0"),
        ({}, b"[1, 2]", 422, "the body: expected an object"),
        ({}, body_of("fine", "unreadable"), 422, "samples.1: cannot be read"),
    ],
)
def test_what_is_refused(served: Make, limits: dict[str, int], body: bytes, status: int, message: str) -> None:
    one = served(**limits)
    answer = one.ask(body)
    assert (answer.status, one.sample("baton_reward_requests_total")) == (status, {str(status): 1.0})
    assert message in answer.error
    assert one.ask(b'{"samples": []}').status == 200, "and it goes on"
    assert one.application._in_hand == 0


def test_a_length_that_is_announced_is_enough_to_refuse(served: Make) -> None:
    one = served(num_bytes=1000)
    answer = one.ask(body_of("x"), content_length="1001")
    assert answer.status == 413 and "a body of 1001 bytes; this server takes at most 1000" in answer.error
    assert answer.headers["connection"] == "close"


def test_a_body_in_pieces_without_a_length(served: Make) -> None:
    one, body = served(num_bytes=1000), body_of("x")
    pieces = [body[at : at + 7] for at in range(0, len(body), 7)]
    assert asyncio.run(talk(one.app, pieces)).content == {"rewards": [1.0]}
    assert asyncio.run(talk(one.app, [b" " * 300] * 4)).status == 413


@pytest.mark.parametrize(
    ("headers", "status", "message"),
    [
        ({"content-type": "text/plain"}, 415, "expected Content-Type: application/json"),
        ({"content-type": ""}, 415, "expected Content-Type: application/json"),
        ({"content-type": "application/json; charset=utf-8"}, 200, ""),
        ({"content-encoding": "gzip"}, 415, "compressed"),
        ({"host": "evil.example:8788"}, 421, "localhost"),
        ({"host": ""}, 421, "localhost"),
        ({"host": "[::1]:8788"}, 200, ""),
        ({"host": "LOCALHOST"}, 200, ""),
    ],
)
def test_headers(served: Make, headers: dict[str, str], status: int, message: str) -> None:
    answer = served().ask(body_of("x"), **headers)
    assert answer.status == status
    assert status == 200 or message in answer.error


@pytest.mark.parametrize("header", ["", "Bearer", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer é"])
def test_a_token_is_asked_for(served: Make, header: str) -> None:
    one = served(token=TOKEN)
    headers = {"authorization": header} if header else {}
    answer = one.ask(body_of("x"), **headers)
    assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer" and TOKEN not in answer.error
    assert one.ask(path="/metrics", method="GET", **headers).status == 401
    assert one.ask(path="/health", method="GET", **headers).content == {"ready": True}
    assert one.model.passes == []


def test_whoever_bears_the_token_is_answered_under_any_name(served: Make) -> None:
    one, headers = served(token=TOKEN, host="0.0.0.0"), {"authorization": f"bearer {TOKEN}", "host": "gpu7:80"}
    assert one.ask(body_of("x"), **headers).status == 200
    assert one.ask(path="/metrics", method="GET", **headers).status == 200
    assert one.ask(path="/health", method="GET", **headers).content["version"] == "tiny/reward:1"


def test_without_a_token_names_are_checked_on_this_machine_alone(served: Make) -> None:
    assert served(host="127.8.8.8").ask(body_of("x"), host="127.8.8.8:80").status == 200
    assert served(host="127.8.8.8").ask(path="/metrics", method="GET", host="127.9.9.9").status == 421
    assert served(host="0.0.0.0").ask(body_of("x"), host="gpu7").status == 200


def test_health(served: Make) -> None:
    one = served()
    expected = {"ready": True, "version": "tiny/reward:1", "digest": "sha256:abc", "queue": 0}
    answer = one.ask(path="/health", method="GET")
    assert answer.status == 200 and answer.content == expected
    one.worker.close()
    answer = one.ask(path="/health", method="GET")
    assert answer.status == 503 and answer.content == expected | {"ready": False}
    assert one.ask(body_of("x")).status == 500


def test_metrics(served: Make) -> None:
    one = served()
    one.ask(body_of("a", "four"))
    one.ask(b"{")
    page = one.ask(path="/metrics", method="GET")
    assert page.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert page.raw == one.metrics.text()
    assert one.sample("baton_reward_requests_total") == {"200": 1.0, "400": 1.0}
    for name, value in {
        "rows_total": 2.0,
        "tokens_total": 5.0,
        "failures_total": 0.0,
        "queue_length": 0.0,
        "request_seconds_count": 2.0,
        "scoring_seconds_count": 1.0,
    }.items():
        assert one.sample(f"baton_reward_{name}") == {"": value}, name
    assert (
        one.sample("baton_reward_info") == {"cpu,sha256:abc,float32,tiny/reward:1": 1.0}
        or len(one.sample("baton_reward_info")) == 1
    )


def test_other_pages_and_methods(served: Make) -> None:
    one = served()
    assert "there is POST /reward" in one.ask(path="/", method="GET").error
    answer = one.ask(method="GET")
    assert answer.status == 405 and answer.headers["allow"] == "POST" and answer.error


def test_a_model_that_fails_or_gives_no_number(served: Make, capsys: pytest.CaptureFixture[str]) -> None:
    one = served()
    one.model.score_of = lambda length: float("nan") if length > 3 else 1.0
    answer = one.ask(body_of("a", "four"))
    assert answer.status == 500 and answer.error == "samples.1: the model's reward is nan, which is no finite number"

    def fail(length: int) -> float:
        raise RuntimeError("out of memory")

    one.model.score_of = fail
    answer = one.ask(body_of("the reply"))
    assert answer.status == 500 and answer.error == "the server failed; its log says at what"
    log = capsys.readouterr().err
    assert "out of memory" in log and "RuntimeError at " in log and "the reply" not in log
    assert one.sample("baton_reward_failures_total") == {"": 2.0}


def test_a_line_a_request_in_the_log_and_no_text(served: Make, capsys: pytest.CaptureFixture[str]) -> None:
    one = served()
    one.ask(body_of("a secret", "another"))
    one.ask(json.dumps({"samples": [{"prompt": "my secret", "response": 1}]}).encode())
    one.ask(b'{"samples": "\xff secret"}')
    one.ask(b'{"a\\nsecret key": 1}')
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(" 127.0.0.1 " in line for line in lines)
    assert " 200 " in lines[0] and "2 rows" in lines[0] and "15 tokens" in lines[0]
    assert " 422 " in lines[1] and " 400 " in lines[2] and " 422 " in lines[3]
    assert "secret" not in "".join(lines)


def waiting(one: Served, *bodies: bytes) -> Any:
    """Requests that come while the model is busy with the first of them: all answers, in the order of asking."""

    async def run() -> list[Any]:
        tasks: list[asyncio.Task[Any]] = []
        for body in bodies:
            tasks.append(asyncio.create_task(talk(one.app, [body])))
            # in the model, in line, or refused: only then comes the next
            while not one.model.begun.is_set():
                await asyncio.sleep(0.001)
            while 1 + one.worker._jobs.qsize() + sum(task.done() for task in tasks) < len(tasks):
                await asyncio.sleep(0.001)
        one.model.gate.set()
        return await asyncio.gather(*tasks)

    return asyncio.run(run())


def test_a_full_queue_says_when_to_ask_again(served: Make) -> None:
    one = served(open=False, queue=2)
    answers = waiting(one, *(body_of("x" * length) for length in (1, 2, 3, 4)))
    assert [answer.status for answer in answers] == [200, 200, 503, 503]
    refused = answers[2]
    assert refused.headers["retry-after"] == "1" and "2 requests are waiting" in refused.error
    assert one.ask(body_of("x")).status == 200, "there is room again"


def test_requests_are_scored_one_by_one_or_joined(served: Make) -> None:
    bodies = [body_of("a"), body_of("bb", "ccc"), body_of("dddd"), body_of("unreadable"), body_of("f" * 9)]
    for join_tokens, passes in ((0, [1, 2, 1, 1]), (100, [1, 4]), (6, [1, 3, 1])):
        one = served(open=False, join_tokens=join_tokens)
        answers = waiting(one, *bodies)
        assert [answer.content.get("rewards") for answer in answers] == [[1], [2, 3], [4], None, [9]]
        assert one.model.passes == passes, join_tokens


def test_a_joined_request_does_not_fail_with_the_others(served: Make) -> None:
    one = served(open=False, join_tokens=100)

    def fail(length: int) -> float:
        if length == 4:
            raise RuntimeError("out of memory")
        return float(length)

    one.model.score_of = fail
    answers = waiting(one, body_of("a"), body_of("bb"), body_of("four"), body_of("ccc"))
    assert [answer.status for answer in answers] == [200, 200, 500, 200]
    assert one.model.passes == [1, 3, 1, 1, 1]


def test_rows_that_nobody_waits_for_are_not_scored(served: Make) -> None:
    one = served(open=False)

    async def run() -> None:
        first = asyncio.ensure_future(talk(one.app, [body_of("a")]))
        while not one.model.begun.is_set():
            await asyncio.sleep(0.001)
        leave = asyncio.Event()
        second = asyncio.ensure_future(talk(one.app, [body_of("bb")], leave=leave))
        while one.application._in_hand < 2:
            await asyncio.sleep(0.001)
        leave.set()
        assert (await second).status == 499
        one.model.gate.set()
        assert (await first).content == {"rewards": [1.0]}

    asyncio.run(run())
    assert one.ask(body_of("ccc")).content == {"rewards": [3.0]}
    assert one.model.passes == [1, 1] and one.application._in_hand == 0
    assert one.sample("baton_reward_rows_total") == {"": 2.0}


def test_a_body_that_does_not_come(served: Make) -> None:
    one = served(body_s=0.05)
    answer = asyncio.run(talk(one.app, [b'{"samples"'], whole=False))
    assert answer.status == 408 and answer.error == "the body was not complete after 0.05 s"
    refused = asyncio.run(talk(one.app, [b"x"], whole=False, headers=JSON | {"content-type": "text/plain"}))
    assert refused.status == 415, "reading the rest away ends too"


def test_a_client_that_leaves_before_its_body_is_there(served: Make) -> None:
    one = served()

    async def run() -> Any:
        leave = asyncio.Event()
        leave.set()
        return await talk(one.app, [b'{"samples"'], leave=leave, whole=False)

    assert asyncio.run(run()).status == 499 and one.application._in_hand == 0


def test_expect_continue_is_not_answered_by_reading(served: Make) -> None:
    """The client has not sent its body yet, and need not."""
    one = served(num_bytes=10)
    headers = JSON | {"content-length": "11", "expect": "100-continue"}
    assert asyncio.run(talk(one.app, [], headers=headers, whole=False)).status == 413
