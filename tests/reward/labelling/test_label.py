"""`baton label`: what it says, what it refuses, what it needs, and what training makes of its file."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from baton.data import load
from baton.errors import UserError
from baton.recipe import Source
from reward.commands import label
from reward.labelling.judgements import make_line, read_line
from reward.labelling.questions import Asked, Question
from reward.labelling.server import Settings, serve
from reward.labelling.store import Store
from tests.reward.labelling.conftest import question, rows_of
from tests.reward.labelling.driving import Server, write_pairs


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "pairs.jsonl", 5)
    return tmp_path / "pairs.jsonl"


def settings(out: Path, **changed: Any) -> Settings:
    return Settings(**({"out": out, "host": "127.0.0.1", "port": 0, "seed": 0, "annotator": None} | changed))


def refused(*arguments: str) -> str:
    app = typer.Typer()
    label.register(app)
    result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_the_command_says_where_it_is_and_locks_its_file(pairs: Path, out: Path) -> None:
    import urllib.request

    with out.open("wb") as file:
        file.write(make_line(question(1), "ann", "first", False) + b'{"pair": "p2", "ann')
    server = Server(pairs, out)
    try:
        assert server.said[0] == "5 pairs to judge"
        assert "was cut off by a crash (19 bytes)" in server.said[1]
        assert server.said[2].endswith("holds 1 judgement by ann; they go on where they were")
        with urllib.request.urlopen(server.address + "/judge?annotator=ann", timeout=10) as answer:
            assert b"0 of 5" in answer.read() and "uvicorn" not in str(answer.headers)
        said = refused(str(pairs), "--out", str(out), "--port", "0")
        assert f"(process {server.process.pid}, at {server.address}/)" in said
        server.process.send_signal(signal.SIGINT)
        assert server.process.stdout is not None
        assert f"1 judgement in {out}" in server.process.stdout.read()
        assert server.process.wait() == 0
    finally:
        server.process.kill()


def test_wrong_arguments_are_messages(pairs: Path, out: Path, tmp_path: Path) -> None:
    assert "known are" in refused(str(pairs), "--format", "absent")
    assert "ends in .jsonl" in refused(str(pairs), "--out", str(tmp_path / "x.json"))
    assert "is the file of pairs itself" in refused(str(pairs), "--out", str(pairs))
    assert "there is no folder" in refused(str(pairs), "--out", str(tmp_path / "absent" / "x.jsonl"))
    assert "visible characters" in refused(str(pairs), "--out", str(out), "--annotator", "\u202e")
    assert "no data at" in refused(str(tmp_path / "absent.jsonl"), "--out", str(out))
    assert not out.exists()
    rejected = tmp_path / "rejected.jsonl"
    rejected.write_text('{"prompt": "?", "chosen": "a", "rejected": "b"}\n')
    assert "line 1 has no `pair`" in refused(str(pairs), "--out", str(rejected))


def test_the_same_ids_of_other_pairs_are_refused(out: Path) -> None:
    out.write_bytes(make_line(question(1), "ann", "first", False))
    other = question(1, a=question(2).a)
    with pytest.raises(UserError, match="already judges a pair p1, which has other texts"):
        serve(Asked([other], {}), settings(out), print)
    Store(out).close()  # the lock was given back


def test_a_taken_port_and_a_missing_library_are_messages(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="--port 0 takes a free port"):
        serve(Asked([question(1)], {}), settings(out, port=taken.getsockname()[1]), print)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"pip install 'baton\[ui\]'"):
        serve(Asked([question(1)], {}), settings(out), print)


def test_help_needs_none_of_the_libraries() -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from baton.cli import app\n"
        "result = CliRunner().invoke(app, ['label', '--help'])\n"
        "assert result.exit_code == 0 and '--annotator' in result.output, result.output\n"
        "bad = {'starlette', 'jinja2', 'uvicorn', 'torch', 'nltk'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize("choice", ["first", "second", "tie", "bad", "skip"])
@pytest.mark.parametrize("is_swapped", [False, True])
def test_a_line_says_what_was_chosen(choice: Any, is_swapped: bool) -> None:
    line = make_line(question(1), "ann", choice, is_swapped)
    found, row = read_line(line), json.loads(line)
    assert (found.pair, found.annotator, found.choice) == ("p1", "ann", choice)
    assert found.content == question(1).content
    winner = {("first", False): "a", ("second", True): "a", ("first", True): "b", ("second", False): "b"}
    assert found.outcome == winner.get((choice, is_swapped), choice)
    assert (row["chosen"][0]["content"] == "right 1") == (found.outcome == "b")
    assert (row["digests"]["chosen"] == "sha256:bb") == (found.outcome == "b")
    assert line.isascii() or json.loads(line) == row


def test_a_file_that_comes_back_with_its_replies_swapped_turns_no_verdict_round() -> None:
    asked = question(1)
    turned = Question(asked.id, asked.prompt, asked.b, asked.a)
    ann, bo = make_line(asked, "ann", "first", False), make_line(turned, "bo", "second", False)  # both prefer asked.a
    assert read_line(ann).outcome == read_line(bo).outcome == "a"
    assert read_line(make_line(turned, "bo", "first", False)).outcome == "b"


def test_training_reads_the_file_as_it_is(out: Path, tmp_path: Path) -> None:
    choices: list[Any] = ["skip", "first", "second", "tie", "bad", "first"]
    with out.open("wb") as file:
        for number, choice in enumerate(choices):
            for annotator in ("ann", "bo"):
                file.write(make_line(question(number), annotator, choice, number == 5))
    loaded = load(Source(path=out.name, format="preference"), tmp_path, "preference")
    assert [(drop.reason, drop.count) for drop in loaded.dropped] == [("skipped by the annotator", 2)]
    assert loaded.fingerprint["rows"] == len(loaded.rows) == 10
    by_pair = {row["pair"]: row for row in loaded.rows if row["annotator"] == "bo"}
    assert list(by_pair) == ["p1", "p2", "p3", "p4", "p5"]
    assert [by_pair[f"p{n}"]["chosen"][0]["content"].split()[0] for n in (1, 2, 5)] == ["left", "right", "right"]
    assert [row.get("is_tie", False) for row in by_pair.values()] == [False, False, True, True, False]
    assert load(Source(path=out.name), tmp_path, "preference").rows == loaded.rows  # and makes its format plain
    again = rows_of(out)
    assert all(set(row) >= {"prompt", "chosen", "rejected", "pair", "annotator"} for row in again)
    assert not re.search(rb"\n\n|[^\n]\Z", out.read_bytes())
