"""push, pull, export and import as people type them."""

import hashlib
import json
import os
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
from baton.registry.commands import handover
from baton.registry.trust import attestations
from baton.registry.trust.policy import set_policy
from tests.baton.registry.conftest import paths
from tests.baton.registry.travel.made_up import add, add_family

ROOT = Path(__file__).parents[4]
ADAPTER = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"\4\0\0\0\0\0\0\0{}  "}
app = typer.Typer()
handover.register(app)


def run(*arguments: Any) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def family(registry: Registry) -> Registry:
    """A registry, on either store, with team/base:1 and team/adapter:1."""
    add_family(registry)
    return registry


def test_push_and_pull(family: Registry, new_location: Callable[[str], str]) -> None:
    there, back = new_location("folder"), new_location("folder")
    pushed = run("push", "team/adapter:1", there, "--registry", family.location)
    assert pushed.stderr == f"made a new registry in {there}\n"
    text = pushed.stdout
    assert f"team/adapter:1 is in {there}: sent 5 files, 0.0 MB of 0.0 MB" in text
    again = run("push", "team/adapter:1", there, "--registry", family.location)
    assert again.stderr == "" and "every file was there already" in again.stdout
    said = json.loads(run("pull", "team/adapter:1", "--from", there, "--registry", back, "--json").stdout)
    digest = family.resolve("team/adapter:1").digest
    assert said.pop("bytes_sent") == said.pop("bytes_total") > 1000
    assert said == {"ref": "team/adapter:1", "digest": digest, "blobs_sent": 5, "blobs_present": 0, "registry": back}
    assert Registry(back).verify_all() == []
    assert len(attestations.of(Registry(back), digest, "origin")) == 2  # from there, and there from the first


def test_a_bundle_that_is_not_there_makes_no_registry(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent.tar cannot be read: No such file"):
        CliRunner().invoke(
            app, ["import", str(tmp_path / "absent.tar"), "--registry", str(tmp_path / "new")], catch_exceptions=False
        )
    assert not (tmp_path / "new").exists()


def test_export_and_import(family: Registry, new_location: Callable[[str], str], tmp_path: Path) -> None:
    file, there = tmp_path / "x.tar", new_location("folder")
    said = json.loads(run("export", "team/adapter:1", file, "--registry", family.location, "--json").stdout)
    data = file.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert said == {
        "ref": "team/adapter:1",
        "file": str(file),
        "sha256": digest,
        "size": len(data),
        "num_files": 7,
    }
    text = run("export", "team/adapter:1", file, "--registry", family.location).stdout
    assert f"team/adapter:1 is in {file}: 0.0 MB, sha256:{digest}" in text
    versions = json.loads(run("import", file, "--registry", there, "--json").stdout)
    assert versions == [
        {"ref": f"{name}:1", "digest": family.resolve(f"{name}:1").digest} for name in ("team/base", "team/adapter")
    ]
    second = add(family, "team/adapter", ADAPTER, "adapter", base=versions[0]["digest"])
    words = ["export", "team/adapter:2", tmp_path / "2.tar", "--without", "team/base:1"]
    run(*words, "--registry", family.location)
    assert (tmp_path / "2.tar").stat().st_size < len(data)
    assert f"team/adapter:2 {second.digest}" in run("import", tmp_path / "2.tar", "--registry", there).stdout


def test_through_a_pipe(registry: Registry, tmp_path: Path) -> None:
    add_family(registry)
    baton = f"{sys.executable} -m baton.cli"
    environment = os.environ | {"BATON_REGISTRY": registry.location}
    subprocess.run(
        f"{baton} export team/adapter:1 - | {baton} import - --registry {tmp_path / 'there'}",
        shell=True,
        check=True,
        cwd=ROOT,
        env=environment,
    )
    assert Registry(tmp_path / "there").verify_all() == []
    done = subprocess.run(
        f"{baton} export team/adapter:1 - | head -c 3000 | {baton} import - --registry {tmp_path / 'cut'}",
        shell=True,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "error: the bundle is cut off at byte 3000" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert paths(Registry(tmp_path / "cut")) == ["registry.json"]


def test_the_hub_is_named_by_its_scheme(
    folder_registry: Registry, monkeypatch: pytest.MonkeyPatch, new_location: Callable[[str], str]
) -> None:
    from baton.registry.travel import hub

    base, adapter = add_family(folder_registry)
    calls: list[Any] = []

    def push(registry: Registry, version: Any, repo_id: str, **options: Any) -> str:
        calls.append((version.ref, repo_id, options))
        return "https://hub/commit/1"

    def pull(registry: Registry, repo_id: str, revision: str, name: str, kind: str, **options: Any) -> Any:
        calls.append((repo_id, revision, name, kind, options))
        return base

    monkeypatch.setattr(hub, "push", push)
    monkeypatch.setattr(hub, "pull", pull)
    where = ["--registry", folder_registry.location]
    said = json.loads(run("push", "team/adapter:1", "hf://org/name", "--merge", "--json", *where).stdout)
    assert said == {"ref": "team/adapter:1", "url": "https://hub/commit/1"}
    words = ["--public", "--base-repo", "org/base@1", "--message", "A new one"]
    run("push", "team/adapter:1", "hf://org/name", *words, *where)
    words = ["pull", "hf://org/name@v1", "--name", "team/x", "--kind", "adapter", "--base", "team/base:1"]
    assert run(*words, "--allow-code", *where).stdout.split() == [base.ref, base.digest]
    assert calls == [
        ("team/adapter:1", "org/name", {"private": True, "merge": True, "base_repo": None, "message": None}),
        (
            "team/adapter:1",
            "org/name",
            {"private": False, "merge": False, "base_repo": "org/base@1", "message": "A new one"},
        ),
        ("org/name", "v1", "team/x", "adapter", {"base": base, "allow_code": True}),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["push", "team/adapter:1", "THERE", "--merge"], "--merge is for the Hub"),
        (["push", "team/adapter:1", "THERE", "--public"], "--public is for the Hub"),
        (["push", "team/adapter:1", "THERE", "--message", "x"], "--message is for the Hub"),
        (["push", "team/adapter:1", "hf://org/name", "--allow-code"], "--allow-code is for a registry"),
        (["push", "team/adapter:1", "THERE", "--base-repo", "a/b@c"], "--base-repo is for the Hub"),
        (["push", "team/adapter:1", "hf://org/name@v1"], "a push makes a new one"),
        (["push", "team/adapter:9", "THERE"], "no version 9"),
        (["pull", "team/adapter:1"], "say which registry has team/adapter:1: --from PATH"),
        (["pull", "team/adapter:1", "--from", "THERE"], "there is no registry at"),
        (["pull", "team/adapter:1", "--from", "THERE", "--name", "a/b"], "--name is for models of the Hub"),
        (["pull", "hf://org/name@v1", "--from", "THERE"], "leave out --from"),
        (["pull", "hf://org/name", "--name", "a/b", "--kind", "base"], "says no revision"),
        (["pull", "hf://org/name@v1", "--kind", "base"], "--name team/name --kind base"),
        (["export", "team/adapter:1", "-", "--json"], "--json would go into the bundle"),
        (["export", "team/adapter:1", "x.tar", "--without", "team/adapter:9"], "no version 9"),
        (["import", "absent.tar"], "absent.tar cannot be read: No such file"),
    ],
)
def test_mistakes(
    words: list[str],
    message: str,
    registry: Registry,
    tmp_path: Path,
    new_location: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add_family(registry)
    monkeypatch.chdir(tmp_path)
    there = new_location("folder")
    before = paths(registry)
    with pytest.raises(UserError, match=message):
        run(*[there if word == "THERE" else word for word in words], "--registry", registry.location)
    assert paths(registry) == before and not Path(there).exists() and not Path("x.tar").exists()


def test_publish_passes_on_that_code_is_allowed(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = add_family(registry)
    seen: list[bool] = []

    def publish(self: Registry, folder: Path, *, allow_code: bool, **options: Any) -> Any:
        seen.append(allow_code)
        return base

    monkeypatch.setattr(Registry, "publish", publish)
    words = ["publish", "somewhere", "--name", "a/b", "--kind", "base", "--registry", registry.location]
    run(*words)
    run(*words, "--allow-code")
    assert seen == [False, True]


def test_bytes_on_their_way_are_shown_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BATON_PROGRESS", "plain")
    for is_terminal, is_quiet in ((False, False), (True, True), (True, False)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda shown=is_terminal: shown)
        with handover.Bar("push team/x:1", is_quiet) as bar:
            bar(2_000_000, 2_500_000)
            bar(2_500_000, 2_500_000)
        shown = capsys.readouterr()
        assert ("push team/x:1 3/3" in shown.out + shown.err) == (is_terminal and not is_quiet)


def test_a_refused_alias_does_not_hide_the_version(filled: Registry, folders: Any, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text("aliases: {prod: {approvals: {at_least: 1}}}")
    set_policy(filled, tmp_path / "policy.yaml", "ann")
    words = ["publish", str(folders.base), "--name", "team/new", "--kind", "base", "--alias", "prod"]
    with pytest.raises(UserError, match=r"team/new:1 is published \(sha256:.*\), but prod stays as it was: "):
        run(*words, "--registry", filled.location)
    assert filled.resolve("team/new:1").kind == "base" and filled.aliases("team/new") == {}
