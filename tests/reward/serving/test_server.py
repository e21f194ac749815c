"""Servers in processes of their own: the same rewards as in process, killed and stopped in mid-request."""

import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.errors import UserError
from baton.ppo_sections import RewardSource
from reward.endpoint import EndpointSource
from reward.sample import RewardError, Sample
from reward.serving.server import Settings, serve
from reward.sources import checked
from tests.conftest import ROOT
from tests.reward.conftest import ROWS, opened
from tests.reward.serving.conftest import Server

Start = Callable[..., Server]
TOKEN = "0123456789abcdef"
MANY = [Sample(ROWS[at % 3].prompt, [], [], "x" * (at % 20), {}) for at in range(200)]


class Asking(threading.Thread):
    """A trainer that waits for its rewards."""

    def __init__(self, url: str, retries: int) -> None:
        super().__init__(daemon=True)
        # one request: a batch as large as all there is
        setting = RewardSource(url=url, batch_size=len(MANY), timeout_s=100, retries=retries, token_env="THE_TOKEN")
        self.source, self.rewards, self.error = EndpointSource(setting), [0.0], None
        self.start()

    def run(self) -> None:
        """Ask once."""
        try:
            self.rewards = checked(self.source, MANY)
        except RewardError as error:
            self.error = error


def in_process(tmp_path: Path, registry: Any, rows: list[Sample]) -> list[float]:
    folder = registry.materialise(registry.resolve("other/judge:1"), tmp_path / "judge")
    return checked(opened(classifier=str(folder or tmp_path / "judge")), rows)


def until_it_scores(server: Server) -> None:
    while server.health(TOKEN)["queue"] == 0:
        time.sleep(0.005)


def test_killed_in_mid_request_and_stopped_in_mid_request(
    started: Start, judge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass a row, so that a request takes a while. The second server has the first one's port."""
    monkeypatch.setenv("THE_TOKEN", TOKEN)
    options = ("--dtype", "float32", "--device", "cpu", "--tokens-per-batch", "1", "--max-bytes", "100000")
    first = started(judge, "other/judge:1", "--port", "0", *options, BATON_REWARD_TOKEN=TOKEN)
    digest = judge.resolve("other/judge:1").digest
    assert f"other/judge:1 ({digest})" in first.line and "float32 on cpu" in first.line and TOKEN not in first.line
    asking = Asking(first.url, retries=8)
    until_it_scores(first)
    first.process.kill()
    assert first.process.wait() == -signal.SIGKILL
    assert not asking.error and asking.is_alive()

    port = first.url.split(":")[2].split("/")[0]
    second = started(judge, "other/judge:1", "--port", port, *options, BATON_REWARD_TOKEN=TOKEN)
    assert second.url == first.url
    asking.join(60)
    assert asking.error is None
    assert asking.rewards == pytest.approx(in_process(tmp_path, judge, MANY), abs=1e-5)
    assert len({round(reward, 4) for reward in asking.rewards}) > 20

    assert second.health() == {"ready": True} and second.health(TOKEN)["digest"] == digest
    with pytest.raises(RewardError, match="answered 401"):
        checked(EndpointSource(RewardSource(url=second.url)), ROWS)
    with pytest.raises(RewardError, match=r"answered 422 .*samples.0: prompt and response are .* 64 tokens"):
        checked(asking.source, [Sample(ROWS[0].prompt, [], [], "y" * 70, {})])
    with pytest.raises(RewardError, match=r"answered 413 .*a body of \d+ bytes; this server takes at most 100000"):
        checked(asking.source, [Sample(ROWS[0].prompt, [], [], "z" * 3_000_000, {})])

    again = Asking(second.url, retries=0)
    until_it_scores(second)
    second.process.send_signal(signal.SIGTERM)
    again.join(60)
    assert again.error is None, "what it had begun is finished"
    assert again.rewards == asking.rewards, "to the bit: a kill leaves no trace"
    assert second.process.wait(30) == 0
    with pytest.raises(urllib.error.URLError, match="refused"):
        second.health()
    log = second.log.read_text()
    assert (
        log.count("  200  ") == 2
        and log.count("200 rows") == 2
        and " 401 " in log
        and " 422 " in log
        and " 413 " in log
    )
    assert "xxx" not in log and "yyy" not in log and TOKEN not in log


@pytest.mark.parametrize(
    ("settings", "token", "message"),
    [
        ({"host": "0.0.0.0"}, None, "lets other machines ask .*--token-file FILE or .*--without-token"),
        ({"without_token": True}, TOKEN, "--without-token, but a token is set"),
        ({}, "short", "BATON_REWARD_TOKEN holds 5 characters; expected one token of at least 16"),
        ({}, "a b" * 9, "expected one token"),
        ({"token_file": Path("nowhere")}, None, "--token-file nowhere cannot be read"),
        ({"ref": "other/nothing:1"}, None, "nothing"),
        ({"device": "cuda:99"}, None, "--device cuda:99: this machine has none such"),
        ({"device": "abacus"}, None, "--device abacus: this machine has none such"),
    ],
)
def test_what_is_refused_at_the_start(
    judge: Any, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], token: str | None, message: str
) -> None:
    monkeypatch.delenv("BATON_REWARD_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("BATON_REWARD_TOKEN", token)
    with pytest.raises(UserError, match=message):
        serve(judge, Settings(**{"ref": "other/judge:1", "port": 0} | settings), print)


def test_the_token_of_a_file_goes_before_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reward.serving.access import read_token

    monkeypatch.delenv("BATON_REWARD_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("BATON_REWARD_TOKEN", TOKEN)
    (tmp_path / "token").write_text("another-of-enough-length\n")
    assert (read_token(None), read_token(tmp_path / "token")) == (TOKEN, "another-of-enough-length")


def test_a_taken_port_is_told_before_the_model_is_loaded(judge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward.serving.model.open_model", None)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="--port 0 takes a free port"):
        serve(judge, Settings("other/judge:1", port=taken.getsockname()[1]), print)


def test_the_command_alone_needs_none_of_the_libraries() -> None:
    program = (
        "import sys\nimport reward.commands.serve\n"
        "bad = {'torch', 'starlette', 'uvicorn', 'prometheus_client'} & set(sys.modules)\nassert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_a_missing_library_is_a_message(judge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"pip install 'baton\[ui\]'"):
        serve(judge, Settings("other/judge:1"), print)


def test_a_model_that_is_no_reward(judge: Any, tmp_path: Path) -> None:
    from tests.reward.conftest import save_classifier

    judge.publish(save_classifier(tmp_path / "value", pad="<pad>"), name="other/value", kind="value")
    with pytest.raises(UserError, match="other/value:1 is a value version; what is served is a reward model"):
        serve(judge, Settings("other/value:1", port=0), print)
