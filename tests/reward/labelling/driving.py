"""People at the page: a server that can be killed, and annotators who press keys in a browser."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
# fewer imports than the whole command, for servers that start often
_PROGRAM = """import sys, typer
from reward.commands import label
app = typer.Typer()
label.register(app)
app()
"""
_OF_KEY = {"1": "first", "2": "second", "3": "tie", "4": "bad", "s": "skip"}


def write_pairs(path: Path, count: int) -> None:
    """Pairs whose replies all differ, so that a page tells which pair it shows."""
    rows = [
        {
            "pair": f"{number:04d}",
            "prompt": [{"role": "user", "content": f"Question {number}?"}],
            "replies": [
                {"model": f"team/{model}:1", "digest": f"sha256:{model}", "text": f"{model}-{number}", "ended": True}
                for model in ("mine", "theirs")
            ],
        }
        for number in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


class Server:
    """`baton label` as a process of its own, on one port through all its lives."""

    def __init__(self, pairs: Path, out: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        arguments = ["label", str(pairs), "--out", str(out), "--port", str(port)]
        # typer takes a program with one command to be that command
        self._command = [sys.executable, "-c", _PROGRAM, *arguments[1:]]
        self.said: list[str] = []
        self.start()

    def start(self) -> None:
        """Returns when the page answers."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.strip())
            if re.match(r"http://127\.0\.0\.1:\d+/ ", line):
                return
        raise AssertionError(f"the server did not start: {self.said}")

    def kill(self) -> None:
        """As the power does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Killer(threading.Thread):
    """Kills the server and starts it again, at any moment within a second of each of so many lines in its file."""

    def __init__(self, server: Server, out: Path, after: list[int], chance: random.Random, down: float) -> None:
        super().__init__(daemon=True)
        self.server, self.out, self.after, self.down, self.kills = server, out, after, down, 0
        self._pauses = [chance.random() for _ in after]

    def run(self) -> None:
        for lines, pause in zip(self.after, self._pauses, strict=True):
            while not self.out.exists() or self.out.read_bytes().count(b"\n") < lines:
                time.sleep(0.01)
            time.sleep(pause)
            self.server.kill()
            self.kills += 1
            time.sleep(self.down)
            self.server.start()


@dataclass
class Annotator:
    """Somebody at a page: what they were shown and what they said of it, as they remember it."""

    page: Any
    name: str
    said: list[dict[str, str]] = field(default_factory=list)  # that stand, in order
    undone: int = 0
    waited: int = 0  # judgements that the page kept until the server was there again

    def open(self, address: str) -> None:
        self.page.goto(address + "/?stay")
        self.page.fill("#annotator", self.name)
        self.page.keyboard.press("Enter")
        self.page.wait_for_selector("#choices")

    def press(self, key: str) -> None:
        """Read the page and press a key, once; `settle` waits for what comes of it."""
        self.before = self.page.inner_text("#count")
        shown = self.page.evaluate(
            "() => ({first: document.querySelector('#reply-1 .text')?.innerText, "
            "second: document.querySelector('#reply-2 .text')?.innerText})"
        )
        self.page.wait_for_timeout(160)  # sooner, the key would be taken for one that bounced
        self.page.keyboard.press(key)
        if key == "u":
            self.said.pop()
            self.undone += 1
        else:
            self.said.append({**shown, "choice": _OF_KEY[key]})

    def settle(self) -> None:
        """Wait until the server has answered, whether or not it was killed meanwhile."""
        changed = "before => document.querySelector('#count')?.innerText !== before"
        try:
            self.page.wait_for_function(changed, arg=self.before, timeout=600)
        except Exception:
            self.waited += self.page.is_visible("#notice")
            self.page.wait_for_function(changed, arg=self.before, timeout=60_000)


def judge_all(annotators: list[Annotator], count: int, chance: random.Random, undo: float) -> None:
    """Everybody judges `count` pairs, side by side, and now and then takes one back."""
    while any(len(each.said) < count for each in annotators):
        busy = [each for each in annotators if len(each.said) < count]
        for each in busy:
            each.press("u" if each.said and chance.random() < undo else chance.choice("1212121234s"))
        for each in busy:
            each.settle()


def check(out: Path, annotators: list[Annotator], count: int) -> list[dict[str, Any]]:
    """That the file holds what was judged, each once, with the texts as they were shown; its rows."""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    pairs = [(row["annotator"], row["pair"]) for row in rows]
    assert len(rows) == count * len(annotators), "lost, or too many"
    assert len(set(pairs)) == len(pairs), "doubled"
    for annotator in annotators:
        found = []
        for row in rows:
            if row["annotator"] == annotator.name:
                texts = [row[side][0]["content"] for side in ("chosen", "rejected")]
                is_turned = row["choice"] == "second" or (row["choice"] != "first" and row["shown"] == "ba")
                first, second = reversed(texts) if is_turned else texts
                found.append({"first": first, "second": second, "choice": row["choice"]})
                for side, text in zip(("chosen", "rejected"), texts, strict=True):
                    assert row["models"][side] == f"team/{text.partition('-')[0]}:1"
        assert found == annotator.said
    return rows
