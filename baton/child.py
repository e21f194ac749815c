"""One child process whose output goes to the terminal, live, and to a log that people can read; signals pass on."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import BinaryIO

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
ESCAPE = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
CURSOR_UP = re.compile(rb"\x1b\[(\d*)A")
DRAIN_S = 1.0  # how long the output of a dead child's own children is waited for


def run_child(command: list[str], environment: dict[str, str], log_path: Path) -> int:
    """Run `command` to its end; returns its exit code, or 128 + N where signal N ended it (the shell's convention).

    Where our own output is a terminal, the child gets one too, so that it draws its progress bars; the log then holds
    what was left standing on the screen. SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed to the child's process group,
    which is waited for; a second SIGINT (Ctrl-C pressed twice) kills it with all its descendants. The exit code is then
    128 + the first signal's number.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    ours, theirs = _terminal() if sys.stdout.isatty() else os.pipe()
    with log_path.open("ab") as file:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        with _forwarding(process) as received:
            try:
                _pump(process, ours, Log(file))
            finally:
                os.close(ours)
            code = process.wait()
    if code:
        with suppress(ProcessLookupError):  # a launcher that was killed leaves its workers behind
            os.killpg(process.pid, signal.SIGKILL)
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


class Log:
    """Terminal output as plain lines: what a carriage return or a cursor movement overwrote is not kept."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._line = b""
        self._starts: deque[int] = deque(maxlen=100)  # where the last lines begin in the file

    def feed(self, output: bytes) -> None:
        """Take the next piece of output; whole lines are written at once."""
        *lines, self._line = (self._line + output).split(b"\n")
        for line in lines:
            self._write(line)
        if self._line.count(b"\r") > 1:  # a progress bar that redraws one line for hours is not kept in memory
            head, last = self._line.rstrip(b"\r").rsplit(b"\r", 1)
            self._line = b"".join(match[0] for match in CURSOR_UP.finditer(head)) + b"\r" + last + b"\r"

    def close(self) -> None:
        """Write the line that no newline ended."""
        if self._line:
            self._write(self._line)
            self._line = b""

    def _write(self, line: bytes) -> None:
        for match in CURSOR_UP.finditer(line):
            for _ in range(int(match[1] or 1)):
                if self._starts:
                    self._file.truncate(self._starts.pop())
        plain = ESCAPE.sub(b"", line).rstrip(b"\r").rsplit(b"\r", 1)[-1].rstrip()
        self._file.seek(0, os.SEEK_END)
        self._starts.append(self._file.tell())
        self._file.write(plain + b"\n")
        self._file.flush()


def _terminal() -> tuple[int, int]:
    """(our end, the child's end) of a new pseudo-terminal of our own terminal's size."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    columns, lines = shutil.get_terminal_size()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    return ours, theirs


def _pump(process: subprocess.Popen[bytes], source: int, log: Log) -> None:
    screen = sys.stdout.buffer
    died_at: float | None = None
    while True:
        # a grandchild may hold the other end open after the child has gone: then its end is not waited for
        if died_at is None and process.poll() is not None:
            died_at = time.monotonic()
        if died_at is not None and time.monotonic() - died_at > DRAIN_S:
            break
        if not select.select([source], [], [], 0.2)[0]:
            continue
        try:
            output = os.read(source, 65536)
        except OSError:  # Linux: every holder of a pseudo-terminal's other end has closed it
            break
        if not output:
            break
        log.feed(output)
        with suppress(BrokenPipeError):  # `baton run … | head`: the run goes on, and its log with it
            screen.write(output)
            screen.flush()
    log.close()


@contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """While inside, signals to us go to the child's group; yields the list of those received."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if received.count(signal.SIGINT) > 1:
            _kill_tree(process.pid)
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill_tree(pid: int) -> None:
    """SIGKILL for a process and all below it: torch's launcher starts each worker in a process group of its own."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
