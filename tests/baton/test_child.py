"""A child's output reaches the terminal and a readable log; its exit code and our signals pass on."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from baton.child import Log, run_child


def logged(*pieces: str) -> str:
    file = io.BytesIO()
    log = Log(file)
    for piece in pieces:
        log.feed(piece.encode())
    log.close()
    return file.getvalue().decode()


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (("one\ntwo\n",), "one\ntwo\n"),
        (("one\r\ntwo\r\n",), "one\ntwo\n"),
        (
            (
                "on",
                "e\nno newline at the end",
            ),
            "one\nno newline at the end\n",
        ),
        (
            (
                "\r10%",
                "\r20%",
                "\r100%\n",
            ),
            "100%\n",
        ),
        (("10%\r", "20%\r", "100%\r", "\n"), "100%\n"),
        (("\x1b[31mred\x1b[0m \x1b]0;title\x07text\n",), "red text\n"),
        (("町の", "パン\n"), "町のパン\n"),
        # two progress lines, drawn again from the first: only the last drawing stands
        (("a 1\nb 1", "\r\x1b[2K\x1b[1A\x1b[2Ka 2\nb 2", "\r\x1b[2K\x1b[1A\x1b[2Ka 3\nb 3\nend\n"), "a 3\nb 3\nend\n"),
    ],
)
def test_log_keeps_what_was_left_standing(pieces: tuple[str, ...], expected: str) -> None:
    assert logged(*pieces) == expected


def test_log_does_not_grow_with_a_progress_bar(tmp_path: Path) -> None:
    with (tmp_path / "log.txt").open("ab") as file:
        log = Log(file)
        for percent in range(10_000):
            log.feed(b"\r\x1b[2Kstep %d of 10000" % percent)
            assert len(log._line) < 100
        log.feed(b"\ndone\n")
        log.close()
    assert (tmp_path / "log.txt").read_text() == "step 9999 of 10000\ndone\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_output_goes_to_screen_and_log(
    terminal: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    script = "import sys; print(sys.stdout.isatty()); print('oh', file=sys.stderr); sys.exit(7)"
    code = run_child([sys.executable, "-u", "-c", script], dict(os.environ), tmp_path / "run" / "log.txt")
    assert code == 7
    assert (tmp_path / "run" / "log.txt").read_text() == f"{terminal}\noh\n"
    assert capfd.readouterr().out.replace("\r", "") == f"{terminal}\noh\n"


def test_log_is_appended_to(tmp_path: Path) -> None:
    for word in ("first", "second"):
        run_child([sys.executable, "-c", f"print('{word}')"], dict(os.environ), tmp_path / "log.txt")
    assert (tmp_path / "log.txt").read_text() == "first\nsecond\n"


def test_death_by_signal_is_told_apart(tmp_path: Path) -> None:
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_child([sys.executable, "-c", script], dict(os.environ), tmp_path / "log.txt") == 128 + 9


def test_a_grandchild_that_keeps_the_output_open_is_not_waited_for(tmp_path: Path) -> None:
    sleeper = "import time; time.sleep(300)"
    script = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {sleeper!r}]).pid)"
    assert run_child([sys.executable, "-c", script], dict(os.environ), tmp_path / "log.txt") == 0
    os.kill(int((tmp_path / "log.txt").read_text()), signal.SIGKILL)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_reach_the_whole_group(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """The child and its own child both see the signal, may clean up, and are waited for."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import pathlib, signal, subprocess, sys, time\n"
        "name = pathlib.Path(sys.argv[1])\n"
        "def stop(number, frame):\n"
        "    name.with_suffix('.stopped').write_text(str(number)); sys.exit(0)\n"
        "signal.signal(signal.SIGINT, stop); signal.signal(signal.SIGTERM, stop)\n"
        "inner = subprocess.Popen([sys.executable, *sys.argv[:1], *sys.argv[2:]]) if len(sys.argv) > 2 else None\n"
        "name.with_suffix('.ready').write_text('')\n"
        "inner.wait() if inner else time.sleep(60)\n"
    )
    outer, inner = tmp_path / "outer", tmp_path / "inner"
    program = (
        "import os, pathlib, sys; from baton.child import run_child\n"
        f"sys.exit(run_child([sys.executable, {str(worker)!r}, {str(outer)!r}, {str(inner)!r}], dict(os.environ), "
        f"pathlib.Path({str(tmp_path / 'log.txt')!r})))"
    )
    chain = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    while not (outer.with_suffix(".ready").exists() and inner.with_suffix(".ready").exists()):
        assert chain.poll() is None
        time.sleep(0.02)
    chain.send_signal(number)
    assert chain.wait(timeout=30) == code
    assert outer.with_suffix(".stopped").read_text() == str(int(number))
    assert inner.with_suffix(".stopped").read_text() == str(int(number))
