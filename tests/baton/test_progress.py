"""The progress line: what it says, and that it leaves the terminal alone when it is over."""

import io
import sys
from typing import Any

import pytest

from baton import progress
from baton.progress import Progress, shares


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        ({"rollout": 3.5, "score": 2.0, "update": 4.5}, "r/s/u 35/20/45%"),
        ({"rollout": 1.0, "score": 1.0, "update": 1.0}, "r/s/u 34/33/33%"),
        ({"rollout": 0.0, "score": 0.0, "update": 0.0}, "r/s/u 0/0/0%"),
        ({"rollout": 995.0, "score": 4.0, "update": 1.0}, "r/s/u 100/0/0%"),  # 99.5, 0.4 and 0.1
    ],
)
def test_shares_add_up(seconds: dict[str, float], text: str) -> None:
    assert shares(seconds) == text


def test_the_plain_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 20.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Progress("ppo", 12, "episodes", start=9) as shown:
        figures = {"reward": 0.123456, "kl": 1.5, "length": 41.25}
        shown.update(10, 8, figures)
        shown.update(11, 8, figures, {"rollout": 2.0, "score": 1.0, "update": 1.0})
        shown.update(12, 8000, figures)
    assert capsys.readouterr().out.splitlines() == [  # nothing in the first ten seconds
        "ppo 11/12  reward 0.1235  kl 1.5  length 41.25  0.8 episodes/s  r/s/u 50/25/25%  10 s left",
        "ppo 12/12  reward 0.1235  kl 1.5  length 41.25  200 episodes/s  0 s left",
    ]


def test_hidden_it_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("ppo", 1, "episodes", shown=False) as shown:
        shown.update(1, 8, {"reward": 1.0})
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_stopped_by_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("BATON_PROGRESS", raising=False)
    before: tuple[Any, Any] = (sys.stdout, sys.stderr)
    with pytest.raises(KeyboardInterrupt), Progress("ppo", 2, "episodes") as shown:
        shown.update(1, 8, {"reward": 1.0}, {"rollout": 1.0, "score": 1.0, "update": 2.0})
        assert sys.stdout is before[0]  # which is no terminal here: what is printed must not end up on stderr
        raise KeyboardInterrupt
    assert (sys.stdout, sys.stderr) == before
    text = screen.getvalue()
    assert "r/s/u 25/25/50%" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor was hidden, and is back
