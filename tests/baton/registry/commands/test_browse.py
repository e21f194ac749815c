"""list, show, log, diff and children: what they print, and that browsing reads no more than it must."""

import hashlib
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from typer.testing import CliRunner, Result

from baton.errors import UserError
from baton.registry import Registry, records
from baton.registry.commands import browse
from baton.registry.commands.browse_text import children_lines, diff_lines, facts, table, tree_lines
from baton.registry.history.children import Child
from baton.registry.history.diff import SECTIONS, Difference, Entry
from baton.registry.history.weights_diff import Change, WeightsDifference
from baton.registry.manifest import manifest_path

app = typer.Typer()
browse.register(app)


def run(registry: Registry, *arguments: str | Path, exit_code: int = 0) -> Result:
    words = [*map(str, arguments), "--registry", registry.location]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result


def delete(registry: Registry, name: str, number: int) -> None:
    folder = records.tombstones_folder(name)
    assert records.write(registry.store, folder, number, {"why": "bad data", "by": "ada", "time": "2026-02-01"})


def test_list(filled: Registry) -> None:
    filled.promote("team/base:1", "main", "x")
    lines = run(filled, "list").stdout.splitlines()
    digest = filled.resolve("team/base:1").digest
    assert lines[0].split() == ["latest", "kind", "aliases", "digest"]
    assert lines[2].split() == ["team/base:1", "base", "main→1", digest[:19] + "…"]
    rows = json.loads(run(filled, "list", "--json").stdout)
    assert [row["ref"] for row in rows] == [f"{name}:1" for name in filled.models()]
    (row,) = json.loads(run(filled, "list", "team/base", "--json").stdout)
    assert row == {"ref": "team/base:1", "kind": "base", "digest": digest, "aliases": {"main": 1}}
    with pytest.raises(UserError, match="no model 'team/bose'; nearest: team/base"):
        run(filled, "list", "team/bose")


def test_list_needs_no_manifest(filled: Registry) -> None:
    for name in filled.models():
        filled.store.delete(manifest_path(filled.resolve(f"{name}:1").digest))
    assert len(json.loads(run(filled, "list", "--json").stdout)) == 5
    assert "reward" in run(filled, "list", "team/reward").stdout


def test_list_deleted(filled: Registry) -> None:
    assert run(filled, "list", "--deleted").stdout.splitlines() == ["deleted  kind  by  time  why"]
    delete(filled, "team/other", 1)
    digest = filled.references() and records.read(filled.store, "models/team/other/versions", 1, "digest")["digest"]
    expected = [{"ref": "team/other:1", "kind": "base", "digest": digest}]
    expected[0] |= {"by": "ada", "time": "2026-02-01", "why": "bad data"}
    assert json.loads(run(filled, "list", "--deleted", "--json").stdout) == expected
    assert json.loads(run(filled, "list", "team/other", "--deleted", "--json").stdout) == expected
    assert json.loads(run(filled, "list", "team/base", "--deleted", "--json").stdout) == []
    text = run(filled, "list", "--deleted").stdout
    assert text.splitlines()[1].split() == ["team/other:1", "base", "ada", "2026-02-01", "bad", "data"]
    assert "team/other" not in run(filled, "list").stdout


def test_show_prints_the_manifest_as_it_is(filled: Registry) -> None:
    version = filled.resolve("team/reward:1")
    printed = run(filled, "show", "team/reward:1", "--json").stdout_bytes
    assert "sha256:" + hashlib.sha256(printed).hexdigest() == version.digest
    text = run(filled, "show", "team/reward:1").stdout
    assert version.digest in text and "adapter_model.safetensors" in text


def test_show_has_aliases_with_their_history_and_what_was_attested(registry: Registry, plant: Any) -> None:
    version = plant("team/m", licence="mit")
    plant("team/m", licence="cc0-1.0")
    registry.promote("team/m:1", "prod", "first", by="ada")
    registry.promote("team/m:2", "prod", "better", by="bob")
    registry.promote("team/m:2", "other", "not of version 1", by="bob")
    from baton.registry.trust.attestations import attest

    attest(registry, version.digest, "approval", {"note": "fine"}, by="cleo")
    lines = run(registry, "show", "team/m:1").stdout.splitlines()
    (first,) = [line for line in lines if "prod: none → 1  by ada: first" in line]
    assert first.startswith("moves")
    assert any("prod: 1 → 2  by bob: better" in line for line in lines)
    assert not any("not of version 1" in line for line in lines)
    assert any(line.startswith("attested") and "cleo" in line for line in lines)
    assert [line.split()[1:] for line in lines if line.startswith("aliases")] == [[]]
    assert "other, prod" in run(registry, "show", "team/m:2").stdout


def test_log(filled: Registry) -> None:
    lines = run(filled, "log", "team/reward:1").stdout.splitlines()
    named = [line for line in lines if "team/" in line and "recipe" not in line]
    assert named[0] == "team/reward:1  reward  accuracy=0.75"
    assert named[1] == "├── base: team/base:1  base"
    assert named[2] == "└── init: team/adapter:1  adapter  accuracy=0.75"
    assert named[3] == "    └── pretrain: team/base:1  base  (above)"
    assert len(named) == 4
    assert "│    licence unknown; with ancestors and data: Apache-2.0" in lines
    assert "│        licence apache-2.0" in lines
    tree = json.loads(run(filled, "log", "team/reward:1", "--json").stdout)
    assert tree["parents"]["init"]["parents"]["pretrain"]["ref"] == "team/base:1"


def test_log_tells_recipe_data_and_licences(registry: Registry, plant: Any) -> None:
    base = plant("team/base", licence="apache-2.0", data=[{"path": "t.jsonl", "use": "train", "rows": 1200}])
    recipe = {"stage": "sft", "train": {"steps": 7, "learning_rate": 0.5, "seed": 3, "x": 1}}
    plant("team/sft", "adapter", base, {"pretrain": base}, licence="mit", recipe=recipe, metrics={"n": 3, "x": 0.12345})
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    assert run(registry, "log", "team/sft:1").stdout.splitlines() == [
        "team/sft:1  adapter  n=3  x=0.1235",
        "│    licence mit; with ancestors and data: Apache-2.0, unknown",
        "│    published 2026-01-01T00:00:00Z by ada",
        f"│    recipe sft  steps=7  learning_rate=0.5  seed=3  sha256:{digest[:12]}…",
        "└── pretrain: team/base:1  base",
        "         licence apache-2.0; with ancestors and data: unknown",
        "         published 2026-01-01T00:00:00Z by ada",
        "         data t.jsonl  (train)  1,200 rows  licence unknown",
    ]


def test_log_draws_a_graph(registry: Registry, plant: Any, tmp_path: Path) -> None:
    base = plant("team/base", licence="mit")
    plant("team/sft", "adapter", base, {"pretrain": base}, metrics={"loss": 1.5})
    svg, page = tmp_path / "l.svg", tmp_path / "l.html"
    assert run(registry, "log", "team/sft:1", "--graph", svg).stdout == f"{svg} shows team/sft:1 and 1 ancestor(s)\n"
    assert "team/base:1" in "".join(ElementTree.parse(svg).getroot().itertext())
    run(registry, "log", "team/sft:1", "--graph", page)
    assert page.read_text().startswith("<!doctype html>") and "team/base:1" in page.read_text()
    with pytest.raises(UserError, match="ends in .svg or .html"):
        run(registry, "log", "team/sft:1", "--graph", tmp_path / "l.png")
    with pytest.raises(UserError, match="cannot be written"):
        run(registry, "log", "team/sft:1", "--graph", tmp_path / "no" / "l.svg")
    with pytest.raises(UserError, match="without --json"):
        run(registry, "log", "team/sft:1", "--graph", svg, "--json")


def test_children(registry: Registry, plant: Any) -> None:
    base = plant("team/base", licence="mit")
    sft = plant("team/sft", "adapter", base, {"pretrain": base})
    plant("team/ppo", "merged", None, {"init": sft})
    registry.promote("team/ppo:1", "prod", "x")
    assert run(registry, "children", "team/base:1").stdout.splitlines() == [
        "version     kind     steps  team/base:1 is its  aliases",
        "team/sft:1  adapter  1      base, pretrain",
        "team/ppo:1  merged   2      init                team/ppo:prod",
        "",
        "2 version(s) descend from team/base:1; 1 alias(es) mean one of them",
    ]
    rows = json.loads(run(registry, "children", "team/base:1", "--json").stdout)
    assert [(row["ref"], row["depth"], row["aliases"]) for row in rows] == [
        ("team/sft:1", 1, []),
        ("team/ppo:1", 2, ["team/ppo:prod"]),
    ]
    assert run(registry, "children", "team/ppo:1").stdout == "nothing descends from team/ppo:1\n"


def test_children_says_when_damage_may_hide_some(registry: Registry, plant: Any) -> None:
    base, other = plant("team/base", licence="mit"), plant("team/other", licence="cc0-1.0")
    plant("team/sft", "adapter", base, {"pretrain": base})
    registry.store.delete(manifest_path(other.digest))
    result = run(registry, "children", "team/base:1", exit_code=1)
    assert "team/sft:1" in result.stdout and "descendants may be missing" in result.stderr


def test_diff(registry: Registry, plant: Any) -> None:
    plant("team/m", recipe={"train": {"steps": 7}, "old": 1}, metrics={"loss": 2.0}, licence="mit")
    plant("team/m", recipe={"train": {"steps": 9}, "new": [1, 2]}, metrics={"loss": 1.5}, licence="mit")
    lines = run(registry, "diff", "team/m:1", "team/m:2", "--no-weights").stdout.splitlines()
    assert lines == [
        "team/m:1 → team/m:2",
        "",
        "recipe",
        "  + new: [1, 2]",
        "  - old: 1",
        "  ~ train.steps: 7 → 9  (+2)",
        "",
        "metrics",
        "  ~ loss: 2 → 1.5  (-0.5)",
    ]
    found = json.loads(run(registry, "diff", "team/m:1", "team/m:2", "--no-weights", "--json").stdout)
    assert found["metrics"] == [{"key": "loss", "change": "changed", "before": 2.0, "after": 1.5, "difference": -0.5}]
    assert set(found) == {"a", "b", "weights", *SECTIONS} and found["weights"] is None
    same = run(registry, "diff", "team/m:1", "team/m:1").stdout
    assert same.splitlines()[2:] == ["nothing that their manifests say differs", "", "weights: the same files"]


def test_weights_are_shown_with_bars() -> None:
    groups = [Change("score", 2, 1.0, 0.0, 1.0), Change("layers.0", 10, 1.0, 2.0, 2.0)]
    groups.append(Change("norm", 3, 0.5, 4.0, 4.0))
    shapes = [("wte", (3, 2), (4, 2))]
    weights = WeightsDifference("weights", groups, groups, ["lm_head"], [], shapes, ["a note"])
    lines = diff_lines(Difference("a", "b", {section: [] for section in SECTIONS}, weights))
    # all: sqrt(1 + 1 + 0.25) / sqrt(0 + 4 + 16); the longest bar has 24 cells, a quarter of it 6
    assert lines[4:] == [
        "weights: weights, ‖A−B‖/‖A‖ = 33.5% of 15 numbers",
        "  score           new  " + "█" * 24,
        "  layers.0        50%  " + "█" * 24,
        "  norm          12.5%  " + "█" * 6,
        "  only in a: lm_head",
        "  wte has shape (3, 2) in a and (4, 2) in b",
        "  a note",
    ]


def test_nothing_that_others_wrote_steers_the_terminal() -> None:
    evil = "\x1b[2J\x1b]0;x\x07\u202e\n"
    node = {"ref": "t/m:1", "digest": "d", "kind": "base", "is_deleted": False, "is_above": False, "by": evil}
    node |= {"time": evil, "licence": evil, "licences": {"models": [evil], "data": []}, "parents": {}}
    node |= {"data": [{"path": evil, "use": evil}], "recipe": {"stage": evil}, "metrics": {evil: 1.0}}
    tree = {**node, "parents": {evil: node}}
    child = Child("t/m:2", "d", "base", (evil,), 1, ("t/m:2",), (), False)
    sections = {section: [Entry(evil, "changed", evil, {evil: evil})] for section in SECTIONS}
    weights = WeightsDifference("weights", [Change(evil, 1, 1.0, 1.0, 1.0)], [], [evil], [evil], [(evil, (), ())], [])
    lines = tree_lines(tree) + children_lines("t/m:1", [child]) + diff_lines(Difference("a", "b", sections, weights))
    lines += table(["x"], [[evil]]) + facts({"x": {evil: evil}, "y": evil})
    assert len(lines) > 30
    for line in lines:
        assert not set(line) & set("\x1b\x07\u202e\n"), repr(line)


def test_wide_text_stays_aligned() -> None:
    assert table(["a", "b"], [["漢字", "x"], ["abc", "y"]]) == ["a     b", "漢字  x", "abc   y"]
