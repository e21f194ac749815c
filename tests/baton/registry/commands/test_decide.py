"""The commands of decisions: what they print, their exit codes, and what they leave in the registry."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from baton.errors import UserError
from baton.registry import Registry
from baton.registry.commands import decide
from baton.registry.trust import attestations, policy, summary
from tests.baton.registry.trust.made_up import make_key, variant

app = typer.Typer()
decide.register(app)


def run(registry: Registry, *words: str | Path, exit_code: int = 0) -> Result:
    arguments = [*map(str, words), "--registry", registry.location]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result


def test_from_evaluation_to_promotion_and_back(filled: Registry, tmp_path: Path) -> None:
    gate = tmp_path / "GATE.yaml"
    gate.write_text("metrics: [eval/win >= 0.6]\napprovals: {at_least: 1, not_by_publisher: true}")
    version = variant(filled, {"licence": "mit"})
    words = ("gate", version.ref, "prod", gate)
    table = run(filled, *words, exit_code=1).stdout
    assert table.count("fails") == 2 and "team/base:2 has no metric eval/win" in table
    said = run(filled, "attest", version.ref, "eval/win=0.62", "kl=3", "--as", "eve", "--note", "200 pairs")
    assert "team/base:2: eval/win=0.62 kl=3, measured by eve" in said.stdout
    run(filled, "approve", version.ref, "--as", "ann")
    judged = json.loads(run(filled, *words, "--json").stdout)
    assert [outcome["holds"] for outcome in judged[0]["outcomes"]] == [True, True]
    assert filled.aliases("team/base") == {}  # a dry run
    run(filled, "promote", "team/base:1", "prod", "--reason", "first")
    moved = run(filled, "promote", version.ref, "prod", "--reason", "better", "--gate", gate)
    again = run(filled, "promote", version.ref, "prod", "--reason", "better still").stdout
    assert f"team/base:prod means {version.ref} already" in again
    assert len(filled.alias_history("team/base", "prod")) == 2
    assert moved.stdout == "team/base:prod → 2 (before: 1)\n"
    back = run(filled, "rollback", "team/base:prod", "--reason", "it swears")
    assert back.stdout == "team/base:prod → 1 (before: 2)\n"
    with pytest.raises(UserError, match="before it nothing"):
        run(filled, "rollback", "team/base:prod", "--reason", "again")
    with pytest.raises(UserError, match="no policy puts a gate before team/base:prod; name one"):
        run(filled, "gate", version.ref, "prod")


def test_who_and_why_are_asked_for(filled: Registry) -> None:
    for words in (["approve", "team/base:1"], ["attest", "team/base:1", "a=1"], ["rollback", "team/base:prod"]):
        assert "Missing option" in run(filled, *words, exit_code=2).output
    with pytest.raises(UserError, match="'a=x' is not METRIC=VALUE"):
        run(filled, "attest", "team/base:1", "a=x", "--as", "ann")


def test_signing(filled: Registry, tmp_path: Path) -> None:
    private, public = make_key(tmp_path, "ann")
    _, other = make_key(tmp_path, "bob")
    check = ("signatures", "team/base:1", "--key", public)
    assert "no signature(s)" in run(filled, *check, exit_code=1).stdout
    assert "is signed by ann, key sha256:" in run(filled, "sign", "team/base:1", "--key", private, "--as", "ann").stdout
    assert "holds, key sha256:" in run(filled, *check, "--write", tmp_path / "out").stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"manifest.json", "model.sig"}
    assert "is by another key" in run(filled, "signatures", "team/base:1", "--key", other, exit_code=1).stdout
    (fact,) = json.loads(run(filled, *check, "--json").stdout)
    assert fact["by"] == "ann" and fact["problem"] is None
    run(filled, "sign", "team/base:1", "--bundle", tmp_path / "out" / "model.sig", "--as", "bob")
    assert len(filled.attestations(filled.resolve("team/base:1"), "signature")) == 2
    for words in ([], ["--key", private, "--bundle", private]):
        with pytest.raises(UserError, match="say what signs it"):
            run(filled, "sign", "team/base:1", *words)


def test_policy(filled: Registry, tmp_path: Path) -> None:
    assert "has no policy: nothing is compulsory" in run(filled, "policy").stdout
    file = tmp_path / "policy.yaml"
    _, public = make_key(tmp_path, "team")
    file.write_text("aliases: {prod: {metrics: [win>.5], approvals: {from: [ann]}, signatures: {keys: [team.pub]}}}")
    assert run(filled, "policy", file, "--as", "ann").stdout.startswith("# policy 1, set by ann 20")
    shown = run(filled, "policy").stdout
    assert "win > 0.5" in shown and "from:" in shown and public.read_text().splitlines()[1] in shown
    (facts,) = json.loads(run(filled, "policy", "--json").stdout)
    assert facts["number"] == 1 and facts["rules"]["aliases"]["prod"]["approvals"] == {"from": ["ann"]}
    # what is shown can be set again, and says the same
    (tmp_path / "shown.yaml").write_text(shown)
    run(filled, "policy", tmp_path / "shown.yaml")
    assert len(policy.history(filled)) == 1
    assert run(filled, "gate", "team/base:1", "prod", exit_code=1).stdout.count("policy 1, prod") == 3
    with pytest.raises(UserError, match="--as says who sets a policy"):
        run(filled, "policy", "--as", "ann")


def test_what_was_said_is_shown(filled: Registry, tmp_path: Path) -> None:
    private, _ = make_key(tmp_path, "ann")
    version = filled.resolve("team/base:1")
    assert summary.lines(filled, version) == []
    run(filled, "approve", version.ref, "--as", "ann", "--note", "good", "--key", private)
    (line,) = summary.lines(filled, version)
    assert line.startswith("approved by ann, 20") and ", with a signature, key sha256:" in line
    assert line.endswith(" (unchecked): good")
    run(filled, "attest", version.ref, "win=0.5", "kl=2", "--as", "bob")
    run(filled, "sign", version.ref, "--key", private, "--as", "eve")
    attestations.attest(filled, version.digest, "evaluation", {"note": "\x1b[2Jhello"}, "mal")
    shown = "\n".join(summary.lines(filled, version))
    assert "kl=2.0 win=0.5 measured by bob" in shown and "signature by eve, key sha256:" in shown
    assert "\x1b" not in shown and "�[2Jhello" in shown


def test_no_decision_loads_torch(filled: Registry, tmp_path: Path) -> None:
    private, public = make_key(tmp_path, "ann")
    (tmp_path / "policy.yaml").write_text("aliases: {prod: {metrics: [win > current], lineage: {verified: true}}}")
    ref = "team/base:1"
    commands = [
        ["policy", str(tmp_path / "policy.yaml")],
        ["attest", ref, "win=1", "--as", "ann"],
        ["approve", ref, "--as", "ann", "--key", str(private)],
        ["sign", ref, "--key", str(private)],
        ["signatures", ref, "--key", str(public)],
        ["gate", ref, "prod"],
        ["promote", ref, "prod", "--reason", "x"],
    ]
    script = (
        "import json, sys, typer\n"
        "from baton.registry.commands import decide\n"
        "app = typer.Typer(); decide.register(app)\n"
        "light = set(sys.modules)\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        app([*words, '--registry', sys.argv[2]])\n"
        "    except SystemExit as stop:\n"
        "        assert not stop.code, words\n"
        "assert not {'pydantic', 'omegaconf', 'model_signing'} & light, 'for --help, nothing of this is needed'\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    words = [sys.executable, "-c", script, json.dumps(commands), filled.location]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[4])
    assert done.returncode == 0, done.stdout + done.stderr
