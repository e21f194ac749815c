"""The commands: what they print, and that the quick ones load no torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from baton.errors import UserError
from baton.registry import Registry
from baton.registry.commands import register
from baton.registry.stores import blob_path, open_store
from tests.baton.registry.conftest import overwrite

app = typer.Typer()
register(app)


def run(registry: Registry, *arguments: str | Path, exit_code: int = 0) -> Result:
    words = [*map(str, arguments), "--registry", registry.location]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result


def test_verify(filled: Registry) -> None:
    assert "no problem" in run(filled, "verify", "team/value:1").stdout
    assert json.loads(run(filled, "verify", "--all", "--json").stdout) == []
    for wrong in (["verify"], ["verify", "team/value:1", "--all"]):
        with pytest.raises(UserError, match="either a REF, or --all"):
            run(filled, *wrong)
    name = filled.store.list("blobs/sha256")[0]
    overwrite(filled, blob_path(name), b"x")
    assert name in run(filled, "verify", "--all", exit_code=1).stdout


def test_publish_promote_get(filled: Registry, folders: Any, tmp_path: Path) -> None:
    words = ["publish", folders.adapter, "--name", "team/new", "--kind", "adapter", "--base", "team/base:1"]
    words += ["--parent", "sft=team/adapter:1", "--licence", "mit", "--alias", "candidate", "--json"]
    printed = json.loads(run(filled, *words).stdout)
    version = filled.resolve("team/new:candidate")
    assert printed == {"ref": "team/new:1", "digest": version.digest}
    assert version.manifest["parents"] == {"sft": filled.resolve("team/adapter:1").digest}
    assert version.manifest["licence"] == "mit"
    words = ["promote", "team/new:candidate", "prod", "--reason", "it is better"]
    assert "team/new:prod → 1 (before: none)" in run(filled, *words).stdout
    assert filled.alias_history("team/new", "prod")[0]["reason"] == "it is better"
    run(filled, "get", "team/new:prod", tmp_path / "got")
    assert (tmp_path / "got" / "base" / "model.safetensors").exists()
    run(filled, "get", "team/new:prod", tmp_path / "merged", "--merge")
    assert (tmp_path / "merged" / "model.safetensors").exists()
    with pytest.raises(UserError, match="not an empty folder"):
        run(filled, "get", "team/new:prod", tmp_path / "got")
    with pytest.raises(UserError, match="not ROLE=REF"):
        run(filled, "publish", folders.base, "--name", "team/x", "--kind", "base", "--parent", "team/base:1")


def test_publishing_makes_a_registry_and_reading_does_not(
    folders: Any, new_location: Callable[[str], str], store_kind: str
) -> None:
    absent = new_location(store_kind)
    with pytest.raises(UserError, match="there is no registry"):
        CliRunner().invoke(app, ["list", "--registry", absent], catch_exceptions=False)
    assert open_store(absent).list("") == []
    words = ["publish", str(folders.base), "--name", "team/base", "--kind", "base", "--registry", absent]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    assert Registry(absent).resolve("team/base:1").kind == "base"


def test_the_registry_is_found_by_environment(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_REGISTRY", filled.location)
    result = CliRunner().invoke(app, ["list", "--json"], catch_exceptions=False)
    assert len(json.loads(result.stdout)) == 5


def test_quick_commands_load_no_torch(filled: Registry, tmp_path: Path) -> None:
    script = (
        "import sys, typer\n"
        "from baton.registry.commands import register\n"
        "app = typer.Typer(); register(app)\n"
        "for words in (['list'], ['show', 'team/base:1'], ['log', 'team/value:1'], ['verify', '--all'],\n"
        "              ['promote', 'team/base:1', 'prod', '--reason', 'x'], ['children', 'team/base:1'],\n"
        "              ['diff', 'team/base:1', 'team/value:1', '--no-weights'], ['list', 'team/base'],\n"
        "              ['log', 'team/value:1', '--graph', sys.argv[2]]):\n"
        "    try:\n"
        "        app([*words, '--registry', sys.argv[1]])\n"
        "    except SystemExit as stop:\n"
        "        assert not stop.code, words\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = Path(__file__).parents[3]
    words = [sys.executable, "-c", script, filled.location, str(tmp_path / "log.svg")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
