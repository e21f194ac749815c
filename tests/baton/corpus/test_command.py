"""`baton prepare`: what it prints fits a terminal of 80 columns, and as data it is the manifest without its shards."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from baton.cli import app
from baton.corpus.prepare import prepare
from baton.corpus.table import corpus_table, count, size
from baton.errors import UserError


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0"),
        (9_999, "9,999"),
        (10_000, "10.0k"),
        (127_647, "128k"),
        (999_600, "1.00M"),
        (1_234_567_890_123, "1.23T"),
    ],
)
def test_counts_are_short(number: int, shown: str) -> None:
    assert count(number) == shown


def test_sizes_are_short() -> None:
    found = [size(number) for number in (12, 999, 1000, 910_400, 4_950_000, 5_000_000_000_000)]
    assert found == ["12 B", "999 B", "1.00 kB", "910 kB", "4.95 MB", "5.00 TB"]


def test_the_table_fits_80_columns(tmp_path: Path, make_recipe: Any, tokenizer_folder: Path) -> None:
    from rich.console import Console

    name = "a_rather_long_name_of_a_source_of_text.jsonl"
    rows = [{"text": f"{at} the fox " + "jumps " * at} for at in range(90)]
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[:3]]))
    (tmp_path / "b.txt").write_text("held out")
    data = {"train": [{"path": name, "language": "en"}, {"path": name, "rows": [90, 93]}], "eval": [{"path": "b.txt"}]}
    data["deduplicate"] = False  # type: ignore[assignment]
    data["train"][1]["language"] = "zh-Hant"
    table = corpus_table(prepare(make_recipe(data), tokenizer_folder, workers=1))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    lines = text.splitlines()
    assert lines[0].split() == ["source", "lang", "documents", "tokens", "bytes", "B/token", "median", "p99"]
    assert any(line.split()[1:3] == ["en", "93"] for line in lines if "en" in line.split()[1:2])
    assert any(line.startswith("to train on") and line.split()[3] == "96" for line in lines)
    assert any(line.startswith("held out: b") for line in lines)


def test_the_command_prepares_once_and_prints_data(tmp_path: Path, make_recipe: Any) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"the fox {at % 50}"}) + "\n" for at in range(60)))
    recipe = make_recipe({"train": [{"path": "a.jsonl", "language": "en"}]})
    arguments = ["prepare", str(recipe.path), f"data.prepared={tmp_path / 'out'}", "--workers", "1", "--json"]
    first = CliRunner().invoke(app, arguments, catch_exceptions=False)
    found = json.loads(first.stdout)
    assert first.exit_code == 0 and found["folder"] == str(tmp_path / "out")
    source = found["sources"][0]
    assert source["documents"] == 50 and source["dropped"]["duplicate"]["count"] == 10 and "shards" not in source
    shown = CliRunner().invoke(app, [*arguments[:-1], "--verify"], catch_exceptions=False).stdout
    assert "10 × duplicate left out, first at a.jsonl line 51" in shown and f"prepared in {tmp_path / 'out'}" in shown

    shard = next((tmp_path / "out" / "train-00").glob("*.tokens"))
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match="has changed since"):
        CliRunner().invoke(app, [*arguments, "--verify"], catch_exceptions=False)


def test_a_recipe_without_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("{stage: pretrain, mode: load, base: ./b, run_dir: r, publish: {name: a/b}}")
    with pytest.raises(UserError, match="mode: load has no data to prepare"):
        CliRunner().invoke(app, ["prepare", str(path)], catch_exceptions=False)
