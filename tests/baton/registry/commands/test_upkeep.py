"""The commands that keep a registry whole: what they print, and their exit codes."""

import json

import pytest
import typer
from typer.testing import CliRunner, Result

from baton.errors import UserError
from baton.registry import Registry
from baton.registry.care.leases import lease
from baton.registry.commands import upkeep
from baton.registry.manifest import manifest_path
from tests.baton.registry.care import small_models
from tests.baton.registry.conftest import Folders, overwrite, paths, remove

app = typer.Typer()
upkeep.register(app)


def run(registry: Registry, *words: str, exit_code: int = 0) -> Result:
    result = CliRunner().invoke(app, [*words, "--registry", registry.location], catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result


@pytest.fixture
def small(registry: Registry) -> Registry:
    """team/base:1, an adapter of it, and team/gone:1."""
    base = small_models.publish(registry, "team/base", {"a": b"base"})
    small_models.publish(registry, "team/child", {"a": b"child"}, base)
    small_models.publish(registry, "team/gone", {"a": b"gone!"})
    return registry


def test_delete_and_gc(small: Registry) -> None:
    assert "these are made of it: team/child:1" in run(small, "delete", "team/base:1", "--reason", "licence").stdout
    deleted = json.loads(run(small, "delete", "team/gone:1", "--why", "bad", "--json").stdout)
    assert deleted["ref"] == "team/gone:1" and deleted["why"] == "bad" and deleted["descendants"] == []
    before = paths(small)
    assert "0 files" not in run(small, "gc", "--older-than", "0", "--dry-run").stdout
    found = json.loads(run(small, "gc", "--older-than", "0", "--dry-run", "--json").stdout)
    assert found["dry_run"] and len(found["files"]) == 2 and paths(small) == before
    assert found["bytes"] == sum(entry["bytes"] for entry in found["files"]) > 5
    assert "0 bytes removed" in run(small, "gc").stdout and "younger than 7d" in run(small, "gc").stdout
    text = run(small, "gc", "--older-than", "0").stdout
    assert "blobs: 1 file(s), 5 bytes" in text and f"{found['bytes']:,} bytes removed" in text
    assert len(paths(small)) == len(before) - 2
    assert run(small, "fsck").stdout.endswith("no problem(s)\n")


def test_a_dry_run_writes_nothing(small: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("written")

    with lease(small.store, "x", ["0" * 64]):
        for name in ("put_if_absent", "delete"):
            monkeypatch.setattr(type(small.store), name, refuse)
        run(small, "gc", "--older-than", "0", "--dry-run")
        monkeypatch.undo()


@pytest.mark.parametrize(("text", "seconds"), [("0", 0), ("90s", 90), ("30m", 1800), ("12h", 43200), ("7d", 604800)])
def test_ages(text: str, seconds: float) -> None:
    assert upkeep.duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "7 d", "-1d", "1w", "1.5h", "d", "1d12h", "٧d"])
def test_what_is_no_age_is_refused(small: Registry, text: str) -> None:
    with pytest.raises(UserError, match="is not an age; expected a number with a unit: 30m, 12h or 7d"):
        upkeep.duration_s(text)


def test_fsck_says_what_depends_and_repairs(small: Registry, new_location) -> None:  # type: ignore[no-untyped-def]
    other = Registry(new_location("folder"), create=True)
    small_models.publish(other, "team/copy", {"a": b"base"})
    blob = small.resolve("team/base:1").manifest["files"][0]["sha256"]
    overwrite(small, f"blobs/sha256/{blob}", b"basf")
    result = run(small, "fsck", exit_code=1)
    assert f"{blob} is damaged: expected sha256:{blob}" in result.stdout
    assert "Depending on it: team/base:1, team/child:1." in result.stdout and "1 problem(s)" in result.stdout
    (problem,) = json.loads(run(small, "fsck", "--json", exit_code=1).stdout)["problems"]
    assert problem["path"] == f"blobs/sha256/{blob}" and problem["dependants"] == ["team/base:1", "team/child:1"]
    assert json.loads(run(small, "verify", "--all", "--json", exit_code=1).stdout)
    assert f"repaired blobs/sha256/{blob}" in run(small, "fsck", "--from", other.location).stdout
    assert run(small, "fsck").exit_code == 0


def test_verify_with_a_reward_model_compares_what_they_read(filled: Registry, folders: Folders) -> None:
    assert "no problem" in run(filled, "verify", "team/adapter:1", "--with", "team/reward:1").stdout
    (folders.reward / "chat_template.jinja").write_text("{{ messages }}")
    base = filled.resolve("team/base:1")
    other = filled.publish(folders.reward, name="team/other-reward", kind="reward", base=base)
    said = run(filled, "verify", "team/adapter:1", "--with", other.ref, exit_code=1).stdout
    assert "different chat templates" in said and "1 problem(s)" in said
    with pytest.raises(UserError, match="name the version too"):
        run(filled, "verify", "--all", "--with", other.ref)


def test_children_say_nothing_of_what_was_deleted_and_collected(small: Registry) -> None:
    from baton.registry.history.children import survey

    run(small, "delete", "team/gone:1", "--why", "never used")
    run(small, "gc", "--older-than", "0")
    found = survey(Registry(small.location), small.resolve("team/base:1"))
    assert [child.ref for child in found.children] == ["team/child:1"] and found.unreadable == []
    live = small.resolve("team/child:1")
    remove(small, manifest_path(live.digest))
    assert "is missing" in survey(Registry(small.location), small.resolve("team/base:1")).unreadable[0]
