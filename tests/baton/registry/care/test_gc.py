"""Garbage collection: what nothing needs goes, what anybody needs stays, at whatever moment."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.errors import UserError
from baton.registry import Registry
from baton.registry import manifest as manifests
from baton.registry.care import leases, tombstones
from baton.registry.care.gc import collect
from baton.registry.care.repair import fsck
from baton.registry.stores import blob_path
from baton.registry.stores.cloud import CloudStore
from baton.registry.stores.local import LocalStore
from baton.registry.trust import attestations
from tests.baton.registry.care import small_models
from tests.baton.registry.conftest import make_older, overwrite, paths, process_on, remove, store_kind_of


def hex_of(data: bytes) -> str:
    return manifests.digest_of(data).removeprefix("sha256:")


def is_whole(registry: Registry) -> bool:
    return fsck(Registry(registry.location)).problems == []


def test_what_nothing_needs_goes_and_the_rest_stays(registry: Registry) -> None:
    base = small_models.publish(registry, "team/base", {"a": b"base", "shared": b"shared"})
    child = small_models.publish(registry, "team/child", {"a": b"child", "shared": b"shared"}, base, {"init": base})
    alone = small_models.publish(registry, "team/alone", {"a": b"alone", "shared": b"shared"})
    attestations.attest(registry, alone.digest, "evaluation", {"metrics": {"accuracy": 0.5}})
    attestations.attest(registry, base.digest, "evaluation", {"metrics": {"accuracy": 0.5}})
    orphan = small_models.store(registry, small_models.manifest({"a": b"orphan"}, "base", None, {}), {"a": b"orphan"})
    before = set(paths(registry))
    assert collect(registry, 0, dry_run=True).by_kind()["blobs"] == (1, 6)
    assert set(paths(registry)) == before
    # base is deleted, but child is made of it; nothing is made of alone
    assert tombstones.delete(registry, "team/base:1", "licence", "ann").descendants == ["team/child:1"]
    assert tombstones.delete(registry, "team/alone:1", "worse", "ann").descendants == []
    report = collect(registry, 0)
    said = {path for path in before if path.startswith(f"attestations/{alone.digest[7:]}/")}
    assert len(said) == 1
    gone = {manifests.manifest_path(d) for d in (orphan, alone.digest)} | said
    gone |= {blob_path(hex_of(data)) for data in (b"orphan", b"alone")}
    assert {entry.path for entry in report.deleted} == gone
    sizes = sum(len(data) for data in (b"orphan", b"alone"))
    assert report.by_kind()["blobs"] == (2, sizes) and report.num_bytes > sizes
    tombs = {f"models/team/{name}/tombstones/0000001.json" for name in ("base", "alone")}
    assert set(paths(registry)) == before - gone | tombs
    assert is_whole(registry)
    assert [e.path for e in collect(registry, 0).deleted] == []
    assert Registry(registry.location).manifest(child.digest)["kind"] == "adapter"


def test_what_is_young_stays(registry: Registry) -> None:
    files = {"a": b"orphan"}
    small_models.store(registry, small_models.manifest(files, "base", None, {}), files)
    report = collect(registry, 3600)
    assert report.deleted == [] and report.num_young == 1  # the manifest, which its blob is kept for
    remove(registry, next(path for path in paths(registry) if path.startswith("manifests/")))
    report = collect(registry, 3600)
    assert report.deleted == [] and report.num_young == 1
    assert len(collect(registry, 0).deleted) == 1


def test_a_lease_keeps_a_deleted_version_with_its_ancestors(registry: Registry) -> None:
    base = small_models.publish(registry, "team/base", {"a": b"base"})
    child = small_models.publish(registry, "team/child", {"a": b"child"}, base)
    with leases.lease(registry.store, "stage", [child.digest]) as held:
        for version in (child, base):
            tombstones.delete(registry, version.ref, "x")
        assert collect(registry, 0).deleted == []
        held.renew()
        assert collect(registry, 0).deleted == []
        assert len(registry.store.list("leases")) == 1
    assert registry.store.list("leases") == []
    assert len(collect(registry, 0).deleted) == 4
    assert is_whole(registry)


def test_an_alias_keeps_what_it_means(folder_registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    version = small_models.publish(folder_registry, "team/base", {"a": b"base"})
    folder_registry.promote(version.ref, "prod", "x")
    with pytest.raises(UserError, match="team/base:1 is what team/base:prod means now"):
        tombstones.delete(folder_registry, version.ref, "x")
    monkeypatch.setattr(tombstones, "_require_no_alias", lambda registry, version: None)
    tombstones.delete(folder_registry, version.ref, "x")
    assert collect(folder_registry, 0).deleted == []


@pytest.mark.parametrize("kind", ["models/team/base/versions", "models/team/gone/tombstones", "manifests", "leases"])
def test_damage_that_hides_what_is_needed_stops_it(registry: Registry, kind: str) -> None:
    small_models.publish(registry, "team/base", {"a": b"base"})
    small_models.publish(registry, "team/gone", {"a": b"gone"})
    tombstones.delete(registry, "team/gone:1", "x")
    orphan = {"a": b"orphan"}
    small_models.store(registry, small_models.manifest(orphan, "base", None, {}), orphan)
    with leases.lease(registry.store, "x", ["0" * 64]):
        wanted = [f"manifests/sha256/{registry.resolve('team/base:1').digest[7:]}.json"]
        if kind != "manifests":
            wanted = [path for path in paths(registry) if path.startswith(kind)]
        overwrite(registry, wanted[0], registry.store.get(wanted[0])[:-2] + b" }")
        before = paths(registry)
        with pytest.raises(UserError, match=f"nothing is collected.*{wanted[0]}.*fsck"):
            collect(Registry(registry.location), 0)
        assert paths(registry) == before


def _hold_and_wait(location: str, digest: str) -> None:
    with leases.lease(Registry(location).store, "killed", [digest]):
        time.sleep(60)


def test_a_killed_holders_lease_is_dead_at_once_here_and_after_a_day_elsewhere(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = small_models.publish(registry, "team/base", {"a": b"base"})
    tombstones.delete(registry, version.ref, "x")
    holder = process_on(store_kind_of(registry), _hold_and_wait, (registry.location, version.digest))
    holder.start()
    while not (held := registry.store.list("leases")):
        time.sleep(0.01)
    assert collect(registry, 0).deleted == []
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    while "Z" not in Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split():
        time.sleep(0.01)
    # As another machine sees it: the lease might be anybody's until it is a day old.
    with monkeypatch.context() as patch:
        patch.setattr(leases.processes, "_place", lambda: {"host": "elsewhere", "boot": "", "pids": "x"})
        assert collect(registry, 0).deleted == []
        make_older(registry, f"leases/{held[0]}", 23 * 3600)
        assert collect(registry, 0).deleted == []
    assert {entry.path.partition("/")[0] for entry in collect(registry, 0).deleted} == {
        "blobs",
        "manifests",
        "leases",
    }
    holder.join()


def test_old_leases_of_other_machines_are_dead(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    with leases.lease(registry.store, "x", ["0" * 64]):
        (name,) = registry.store.list("leases")
        monkeypatch.setattr(leases.processes, "_place", lambda: {"host": "elsewhere", "boot": "", "pids": "x"})
        make_older(registry, f"leases/{name}", 25 * 3600)
        assert collect(registry, 7 * 86400).deleted == []
        assert [entry.path for entry in collect(registry, 3600).deleted] == [f"leases/{name}"]


def test_work_in_progress_stays_for_a_day(folder_registry: Registry) -> None:
    """On an object store, work in progress lies on the writer's own disk."""
    registry, store = folder_registry, folder_registry.store
    assert isinstance(store, LocalStore)
    with store.workspace() as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_bytes(b"12345")
        (store.path("tmp") / "left").write_bytes(b"1")
        assert collect(registry, 0).deleted == []
        old = time.time() - 25 * 3600
        for path in (folder / "deep" / "file", store.path("tmp/left")):
            os.utime(path, (old, old))
        report = collect(registry, 0)
        assert [entry.path for entry in report.deleted] == [
            f"tmp/{folder.name}/deep/file" if name == folder.name else f"tmp/{name}"
            for name in sorted([folder.name, "left"])
        ]
        assert store.list("tmp") == []


def test_a_publisher_waits_for_a_collector_and_outlasts_a_dead_one(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = "a" * 64
    slept: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(leases.time, "sleep", lambda seconds: (slept.append(seconds), sleep(seconds)))
    condemned = leases.condemn(registry.store, [digest])
    with leases.lease(registry.store, "x", ["b" * 64]):
        assert slept == []  # none of its files
    monkeypatch.setattr(leases, "WAITING_S", 0.5)
    monkeypatch.setattr(leases, "IN_FLIGHT_S", 0.1)
    begun = time.monotonic()
    with leases.lease(registry.store, "x", [digest]):
        assert time.monotonic() - begun > 0.5 and slept[-1] == 0.1
        assert not registry.store.exists(condemned)  # which stops the collector, if it lives
    condemned = leases.condemn(registry.store, [digest])
    monkeypatch.setattr(leases, "WAITING_S", 60)
    monkeypatch.setattr(leases.processes, "_started", lambda pid: None)  # it died
    slept.clear()
    with leases.lease(registry.store, "x", [digest]):
        assert slept == []
    assert [entry.path for entry in collect(registry, 0).deleted] == [condemned]


def test_a_collector_whose_list_was_taken_away_looks_again(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A publisher came while the collector was asleep between looking and deleting."""
    store = registry.store
    files = {"a": b"orphan"}
    small_models.store(registry, small_models.manifest(files, "base", None, {}), files)
    delete, held = store.delete, []

    def delete_slowly(path: str) -> None:
        if path.startswith("manifests/") and not held:
            for name in store.list("condemned"):
                delete(f"condemned/{name}")
            held.append(leases.Lease(store, "publisher"))
            held[0].add([hex_of(b"orphan")])
        delete(path)

    monkeypatch.setattr(store, "delete", delete_slowly)
    report = collect(registry, 0)
    assert [entry.path.partition("/")[0] for entry in report.deleted] == ["manifests"] and report.num_spared == 1
    assert store.exists(blob_path(hex_of(b"orphan")))
    held[0].release()


def test_a_publisher_who_finishes_between_the_two_looks_keeps_everything(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is seen before, the version after: whoever reads the other way round sees neither."""
    from baton.registry.care.marks import Marks

    files = {"a": b"new"}
    content = small_models.manifest(files, "base", None, {})
    digest = small_models.store(registry, content, files)
    held = leases.Lease(registry.store, "publish")
    held.add([digest, hex_of(b"new")])
    roots = Marks._version_roots

    def publisher_finishes_first(marks: Marks) -> set[str]:
        if registry.store.list("condemned"):
            small_models.record(registry, "team/new", content)
            held.release()
        return roots(marks)

    monkeypatch.setattr(Marks, "_version_roots", publisher_finishes_first)
    # as if the first look had seen nothing of the publisher
    monkeypatch.setattr("baton.registry.care.gc.Marks.read", _blind_at_first(Marks.read))
    assert collect(registry, 0).num_spared == 2
    assert is_whole(registry) and registry.resolve("team/new:1").digest == digest


def _blind_at_first(read):  # type: ignore[no-untyped-def]
    from baton.registry.care.marks import Live

    looked: list[int] = []

    def blind(marks):  # type: ignore[no-untyped-def]
        looked.append(1)
        return Live() if len(looked) == 1 else read(marks)

    return blind


def test_many_files_go_in_batches(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.registry.care.gc.BATCH_FILES", 3)
    lists = []
    condemn = leases.condemn

    def noting(store, digests):  # type: ignore[no-untyped-def]
        lists.append(sorted(digests))
        return condemn(store, lists[-1])

    monkeypatch.setattr(leases, "condemn", noting)
    for number in range(4):
        files = {"a": f"orphan {number}".encode()}
        small_models.store(registry, small_models.manifest(files, "base", None, {}), files)
    assert len(collect(registry, 0).deleted) == 8 and [len(found) for found in lists] == [3, 3, 2]
    assert registry.store.list("condemned") == []


def test_what_another_collector_took_meanwhile_is_no_damage(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version was deleted and its manifest collected between the look at versions and that at manifests."""
    from baton.registry.care.marks import Marks

    small_models.publish(registry, "team/base", {"a": b"base"})
    small_models.publish(registry, "team/gone", {"a": b"gone"})
    roots = Marks._version_roots

    def another_comes(marks: Marks) -> set[str]:
        found = roots(marks)
        monkeypatch.setattr(Marks, "_version_roots", roots)
        other = Registry(registry.location)
        tombstones.delete(other, "team/gone:1", "x")
        assert len(collect(other, 0).deleted) == 2
        return found

    monkeypatch.setattr(Marks, "_version_roots", another_comes)
    assert collect(registry, 0).deleted == []
    assert is_whole(registry)


def test_uploads_that_nobody_finished_are_given_up_after_a_day(
    make_filled: Callable[[str], Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make_filled("s3")
    store = registry.store
    assert isinstance(store, CloudStore)
    bucket, _, prefix = store.location.removeprefix("s3://").partition("/")
    blob = blob_path("a" * 64)
    store._connection.s3.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/{blob}")

    def unfinished() -> list[str]:
        return list(store.abort_unfinished(0, dry_run=True))

    asked = []
    abort = store.abort_unfinished
    monkeypatch.setattr(
        store, "abort_unfinished", lambda age, dry_run=False: (asked.append(age), abort(age, dry_run))[1]
    )
    # moto says of every upload that it was begun in 2010
    assert collect(registry, 0, dry_run=True).uploads == [blob] and unfinished() == [blob]
    assert collect(registry, 0).uploads == [blob] and unfinished() == []
    assert asked[0] == asked[2] == 24 * 3600
    assert collect(registry, 7 * 86400).uploads == [] and asked[-1] == 7 * 86400

    def denied(age: float, dry_run: bool = False) -> list[str]:
        raise UserError("denies access")

    monkeypatch.setattr(store, "abort_unfinished", denied)
    assert collect(registry, 0).not_seen == "denies access"
