"""The check of everything: what is damaged, what depends on it, and its repair from another registry."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from baton.registry import Registry, Version, records
from baton.registry import manifest as manifests
from baton.registry.care import tombstones
from baton.registry.care.fsck import check
from baton.registry.care.gc import collect
from baton.registry.care.repair import fsck
from baton.registry.stores import Entry, blob_path
from baton.registry.trust import attestations
from tests.baton.registry.care import small_models
from tests.baton.registry.conftest import overwrite, paths, remove


def fill(registry: Registry) -> tuple[Version, Version]:
    base = small_models.publish(registry, "team/base", {"a": b"base"})
    child = small_models.publish(registry, "team/child", {"a": b"child"}, base)
    small_models.publish(registry, "team/other", {"a": b"other"})
    registry.promote(child.ref, "prod", "x")
    attestations.attest(registry, base.digest, "evaluation", {"metrics": {"accuracy": 0.5}})
    return base, child


def blob_of(version: Version) -> str:
    return blob_path(version.manifest["files"][0]["sha256"])


def test_it_says_what_depends_on_the_damage(registry: Registry) -> None:
    base, child = fill(registry)
    registry = Registry(registry.location)
    (said,) = [path for path in paths(registry) if path.startswith("attestations/")]
    for path, dependants in (
        (blob_of(base), ["team/base:1", "team/child:1", "team/child:prod"]),
        (blob_of(child), ["team/child:1", "team/child:prod"]),
        (manifests.manifest_path(base.digest), ["team/base:1", "team/child:1", "team/child:prod"]),
        ("models/team/child/versions/0000001.json", ["team/child:1", "team/child:prod"]),
        ("models/team/child/aliases/prod/0000001.json", ["team/child:prod"]),
        (said, ["team/base:1"]),
    ):
        whole = registry.store.get(path)
        overwrite(registry, path, whole[:-1])
        (problem,) = check(registry).problems
        assert (problem.path, problem.dependants) == (path, dependants)
        assert str(problem).endswith(f" Depending on it: {', '.join(dependants)}.")
        remove(registry, path)
        if path == said:
            assert check(registry).problems == []  # nobody can know that it was there
        elif not path.startswith("models/"):
            (problem,) = check(registry).problems
            assert (problem.path, problem.dependants) == (path, dependants) and "is missing" in problem.message
        overwrite(registry, path, whole)
    assert check(registry).problems == []


def said_of_nothing() -> tuple[str, bytes]:
    """Path and bytes of an attestation of a manifest that is not there."""
    data = manifests.canonical(
        {"type": "approval", "subject": "sha256:" + "0" * 64, "by": "ann", "time": "2026-01-01T00:00:00Z", "body": {}}
    )
    return f"attestations/{'0' * 64}/{manifests.digest_of(data)[7:]}.json", data


def test_orphans_are_counted_and_no_damage(registry: Registry) -> None:
    fill(registry)
    files = {"a": b"orphan"}
    content = small_models.manifest(files, "base", None, {"init": "sha256:" + "0" * 64})
    small_models.store(registry, content, files)
    overwrite(registry, *said_of_nothing())
    report = check(registry)
    assert report.problems == [] and report.num_orphans == 3
    remove(registry, said_of_nothing()[0])
    report = check(registry)
    assert report.problems == [] and report.num_orphans == 2
    assert report.orphan_bytes == 6 + len(manifests.canonical(content))
    assert report.num_files == {
        **{"registry": 1, "blob": 4, "manifest": 4, "version": 3, "alias": 1, "attestation": 1},
        **({"work": 0} if "work" in report.num_files else {}),
    }


def test_what_was_collected_is_not_missed(registry: Registry) -> None:
    base, child = fill(registry)
    tombstones.delete(registry, "team/other:1", "x")
    tombstones.delete(registry, base.ref, "x")
    assert len(collect(registry, 0).deleted) == 2
    assert check(registry).problems == []
    remove(registry, blob_of(base))  # but what a live version is made of is
    (problem,) = check(registry).problems
    assert problem.dependants == ["team/child:1", "team/child:prod"]


@pytest.mark.parametrize(
    "path",
    [
        "notes.txt",
        "blobs/sha256/abc",
        "blobs/md5/" + "0" * 32,
        "manifests/sha256/" + "0" * 64,
        "models/team/base/versions/1.json",
        "models/team/base/versions/0000001.json~",
        "models/team/base/README.md",
        "models/team/BASE/versions/0000001.json",
        "models/team/base/aliases/7/0000001.json",
        "models/team/base/aliases/Prod/0000001.json",
        "attestations/" + "0" * 64 + "/x.json",
        "leases/x.json",
    ],
)
def test_strays_are_named(registry: Registry, path: str) -> None:
    fill(registry)
    overwrite(registry, path, b"x")
    (problem,) = check(registry).problems
    assert problem.path == path and repr(path.rpartition("/")[2]) in problem.message


def rewritten(registry: Registry, folder: str, number: int, change: Callable[[dict[str, Any]], object]) -> None:
    """A record that is whole and says something else, as a defect of Baton's would write it."""
    path = records.record_path(folder, number)
    record = records.unsealed(path, registry.store.get(path), path)
    change(record)
    overwrite(registry, path, records.sealed(path, record))


def test_records_that_contradict_each_other(registry: Registry) -> None:
    base, child = fill(registry)
    second = small_models.publish(registry, "team/child", {"a": b"second"}, base)
    registry.promote(second.ref, "prod", "x")
    prod, versions = "models/team/child/aliases/prod", "models/team/child/versions"
    for folder, number, change, message in (
        (prod, 2, {"previous": 2}, "record 2: says it replaced 2, but 1 was there"),
        (prod, 1, {"previous": 1}, "record 1: says it replaced 1, but None was there"),
        (prod, 2, {"to": 9}, "record 2: no version 9"),
        (prod, 2, {"reason": 3}, "reason is 3"),
        (versions, 2, {"number": 1}, "it is the record of number 1"),
        (versions, 2, {"digest": "sha256:0"}, "digest 'sha256:0'"),
        (versions, 2, {"kind": "reward"}, f"the manifest {second.digest} is adapter"),
        (versions, 2, {"identity": second.digest}, f"it says adapter {second.digest}"),
        (versions, 2, {"digest": "sha256:" + "0" * 64}, "is missing"),
    ):
        path = records.record_path(folder, number)
        whole = registry.store.get(path)
        rewritten(registry, folder, number, lambda record, change=change: record.update(change))
        problems = [str(problem) for problem in check(Registry(registry.location)).problems]
        assert any(message in problem for problem in problems), (message, problems)
        overwrite(registry, path, whole)
    assert check(Registry(registry.location)).problems == []
    remove(registry, f"{prod}/0000001.json")
    assert "aliases/prod/0000001.json is missing" in str(check(registry).problems[0])


def test_an_alias_of_a_deleted_version_is_a_problem(folder_registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    _, child = fill(folder_registry)
    monkeypatch.setattr(tombstones, "_require_no_alias", lambda registry, version: None)
    tombstones.delete(folder_registry, child.ref, "x")
    (problem,) = check(folder_registry).problems
    assert "team/child:prod means team/child:1, which was deleted" in problem.message


def test_a_lost_record_is_missed_by_its_tombstone(registry: Registry) -> None:
    fill(registry)
    tombstones.delete(registry, "team/other:1", "x")
    remove(registry, "models/team/other/versions/0000001.json")
    (problem,) = check(registry).problems
    assert "versions/0000001.json is missing" in problem.message


@pytest.fixture
def copies(registry: Registry, new_location: Callable[[str], str]) -> tuple[Registry, Registry, list[str]]:
    """A registry and a whole copy of it in a folder, with what is in them."""
    fill(registry)
    copy = Path(new_location("folder"))
    for path in paths(registry):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes(registry.store.get(path))
    return registry, Registry(copy), paths(registry)


def test_everything_is_repaired_from_a_copy(copies: tuple[Registry, Registry, list[str]]) -> None:
    registry, copy, everything = copies
    whole = {path: registry.store.get(path) for path in everything}
    damaged = [path for path in everything if path != "registry.json"]
    for number, path in enumerate(damaged):
        # every other one lost, where the loss can be seen
        if number % 2 and path.startswith(("blobs/", "manifests/")):
            remove(registry, path)
        else:
            overwrite(registry, path, b"{" + whole[path][:-1])
    report = fsck(Registry(registry.location), copy)
    assert report.problems == [] and sorted(report.repaired) == sorted(damaged)
    assert {path: registry.store.get(path) for path in paths(registry)} == whole
    assert fsck(Registry(registry.location), copy).repaired == []


def test_another_registry_gives_content_but_no_records(registry: Registry, new_location: Callable[[str], str]) -> None:
    base, child = fill(registry)
    other = Registry(new_location("folder"), create=True)
    small_models.publish(other, "their/name", {"a": b"base"})
    record = "models/team/base/versions/0000001.json"
    blob, manifest = blob_of(base), manifests.manifest_path(base.digest)
    for path in (blob, manifest, blob_of(child), record):
        overwrite(registry, path, b"x")
    shutil.copytree(Path(other.location) / "models/their/name", Path(other.location) / "models/team/base")
    report = fsck(Registry(registry.location), other)
    assert set(report.repaired) == {blob, manifest}
    assert {problem.path for problem in report.problems} == {blob_of(child), record}
    assert Registry(registry.location).resolve(child.ref).manifest["base"] == base.digest


def test_a_damaged_source_repairs_nothing(copies: tuple[Registry, Registry, list[str]]) -> None:
    registry, copy, everything = copies
    for path in everything:
        if path != "registry.json":
            overwrite(registry, path, b"x")
            overwrite(copy, path, b"y")
    before = {path: registry.store.get(path) for path in everything}
    report = fsck(Registry(registry.location), copy)
    assert report.repaired == [] and {problem.path for problem in report.problems} == set(everything) - {
        "registry.json"
    }
    assert {path: registry.store.get(path) for path in everything} == before


def test_a_damaged_record_never_lacks_while_it_is_repaired(
    copies: tuple[Registry, Registry, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it deleted first, a publisher would take the number for another model."""
    registry, copy, _ = copies
    path = "models/team/other/versions/0000001.json"
    whole = registry.store.get(path)
    overwrite(registry, path, whole[:-5])
    delete = registry.store.delete

    def publisher_comes(deleted: str) -> None:
        delete(deleted)
        if deleted == path:
            small_models.publish(Registry(registry.location), "team/other", {"a": b"quite another"})

    monkeypatch.setattr(registry.store, "delete", publisher_comes)
    report = fsck(registry, copy)
    assert (report.problems, report.repaired) == ([], [path])
    assert registry.store.get(path) == whole


def test_what_is_deleted_and_collected_meanwhile_is_no_damage(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(registry)
    small_models.publish(registry, "team/other", {"a": b"better"})
    registry.promote("team/other:1", "prod", "x")
    walk = registry.store.walk

    def slowly(folder: str) -> Iterator[Entry]:
        monkeypatch.setattr(registry.store, "walk", walk)
        found = list(walk(folder))
        other = Registry(registry.location)
        other.promote("team/other:2", "prod", "better")
        tombstones.delete(other, "team/other:1", "worse")
        assert len(collect(other, 0).deleted) == 2
        yield from found

    monkeypatch.setattr(registry.store, "walk", slowly)
    assert check(registry).problems == []
    blob = blob_of(registry.resolve("team/child:1"))  # what is missing all the same, is
    remove(registry, blob)
    assert [problem.path for problem in check(registry).problems] == [blob]


def test_an_alias_moved_off_what_was_deleted_meanwhile_is_no_problem(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last record is listed before the move, the tombstone after it."""
    fill(registry)
    small_models.publish(registry, "team/other", {"a": b"better"})
    registry.promote("team/other:1", "prod", "x")
    store = registry.store
    listed = list(store.walk(""))
    other = Registry(registry.location)
    other.promote("team/other:2", "prod", "better")
    tombstones.delete(other, "team/other:1", "worse")
    listed += store.walk("models/team/other/tombstones")
    with monkeypatch.context() as patch:
        patch.setattr(store, "walk", lambda folder: iter(listed))
        assert check(registry).problems == []
