"""Push and pull: only what is missing moves, everything is hashed on its way, what was said travels along."""

import hashlib
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.errors import UserError
from baton.registry import Registry, Version, records
from baton.registry.manifest import canonical, manifest_path
from baton.registry.stores import blob_path
from baton.registry.travel import transfer
from baton.registry.travel.arrival import without_credentials
from baton.registry.travel.closure import closure, manifests_below, names_of
from baton.registry.trust import attestations, policy
from tests.baton.registry.conftest import flip, overwrite, paths, remove
from tests.baton.registry.travel.made_up import NO_DIGEST, add, add_family


@pytest.fixture(params=["folder→folder", "folder→s3", "s3→folder", "s3→s3"])
def two(request: pytest.FixtureRequest, new_location: Callable[[str], str]) -> tuple[Registry, Registry]:
    """Two empty registries, in each combination of stores."""
    first, second = request.param.split("→")
    return Registry(new_location(first), create=True), Registry(new_location(second), create=True)


def recorded(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The digests of the blobs that are sent to a registry from now on."""
    sent: list[str] = []
    put_blob = registry.store.put_blob

    def record(file: Path, sha256: str) -> None:
        sent.append(sha256)
        put_blob(file, sha256)

    monkeypatch.setattr(registry.store, "put_blob", record)
    return sent


def test_closure_has_ancestors_first(registry: Registry) -> None:
    base, adapter = add_family(registry)
    ppo = add(
        registry,
        "team/ppo",
        {"a": b"1"},
        "adapter",
        base=base.digest,
        parents={"reward": adapter.digest, "init": base.digest},
    )
    assert closure(registry, ppo) == [base.digest, adapter.digest, ppo.digest]
    assert closure(registry, base) == [base.digest]
    names = names_of(registry, [base.digest, ppo.digest, NO_DIGEST])
    assert {digest: one.ref for digest, one in names.items()} == {base.digest: "team/base:1", ppo.digest: "team/ppo:1"}


def test_a_chain_deeper_than_the_stack() -> None:
    manifests: dict[str, Any] = {
        str(i): {"base": None, "parents": {"a": str(i - 1), "b": str(max(i - 2, 0))} if i else {}} for i in range(5000)
    }
    assert list(manifests_below("4999", manifests.__getitem__)) == [str(i) for i in range(5000)]


def test_push_moves_everything_once(two: tuple[Registry, Registry], monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = two
    add(target, "team/base", {"x": b"another team's"})
    base, adapter = add_family(source)
    assert source.id != target.id
    sent = recorded(target, monkeypatch)
    report = transfer.push(source, adapter, target)
    blobs = {entry["sha256"]: entry["size"] for v in (base, adapter) for entry in v.manifest["files"]}
    assert sorted(sent) == sorted(blobs) and len(blobs) == 5  # the tokenizer, which both have, once
    total = sum(blobs.values())
    assert report == transfer.Report("team/adapter:1", adapter.digest, 5, 0, total, total)
    # The name was taken by another model: the base gets the next number, and is found by its digest.
    assert target.references()[base.digest] == ["team/base:2"]
    assert target.resolve("team/adapter:1").base == base.digest
    assert target.verify_all() == [] and not [path for path in paths(target) if path.startswith(("tmp", "leases"))]

    sent.clear()
    before = paths(target)
    again = transfer.push(source, adapter, target)
    assert sent == [] and again == transfer.Report("team/adapter:1", adapter.digest, 0, 5, 0, total)
    assert paths(target) == before
    assert not [path for path in paths(source) if path.startswith("leases/")]

    new = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"\4\0\0\0\0\0\0\0{}  "}
    second = add(source, "team/adapter", new, "adapter", base=base.digest)
    report = transfer.push(source, second, target)
    assert (report.ref, report.bytes_sent) == ("team/adapter:2", 12)
    assert sent == [hashlib.sha256(new["adapter_model.safetensors"]).hexdigest()]


def test_what_was_said_travels_and_where_it_came_from_is_said(two: tuple[Registry, Registry]) -> None:
    source, target = two
    base, adapter = add_family(source)
    evaluation = attestations.attest(source, adapter.digest, "evaluation", {"metrics": {"accuracy": 0.9}})
    signature = attestations.attest(source, base.digest, "signature", {"of": base.digest, "bundle": {}})
    transfer.push(source, adapter, target)
    for found, said in ((adapter, evaluation), (base, signature)):
        (origin,) = attestations.of(target, found.digest, "origin")
        location = source.location if "://" in source.location else f"…/{Path(source.location).name}"
        assert origin.body == {
            "registry": source.id,
            "location": location,
            "ref": found.ref,
            "published_by": "someone",
            "attestations": [said.digest],
        }
        assert attestations.of(target, found.digest, said.type) == [said]
    approval = attestations.attest(source, adapter.digest, "approval", {"comment": "yes"})
    transfer.push(source, adapter, target)
    assert attestations.of(target, adapter.digest, "approval") == [approval]
    # It came later, and is marked as theirs too.
    assert len(attestations.of(target, adapter.digest)) == 4
    assert attestations.arrived(target, adapter.digest) == {evaluation.digest, approval.digest}
    # Back again: it was here first, so neither registry now says that it came from the other.
    before = paths(source)
    transfer.push(target, target.resolve("team/adapter:1"), source)
    assert paths(source) == before


def test_real_models_load_where_they_arrive(make_filled: Callable[[str], Registry], new_location: Any) -> None:
    source = make_filled("folder")
    target = Registry(new_location("s3"), create=True)
    report = transfer.pull(target, source, "team/reward:1")
    assert target.models() == ["team/adapter", "team/base", "team/reward"]  # its base, and its parent
    assert target.verify(target.resolve(report.ref), deep=True) == []
    assert target.resolve(report.ref).digest == source.resolve("team/reward:1").digest


@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_a_damaged_blob_does_not_travel(two: tuple[Registry, Registry], how: str) -> None:
    source, target = two
    base, adapter = add_family(source)
    transfer.push(source, base, target)
    before = paths(target)
    sha256 = adapter.manifest["files"][1]["sha256"]
    data = source.store.get(blob_path(sha256))
    if how == "missing":
        remove(source, blob_path(sha256))
    else:
        overwrite(source, blob_path(sha256), data[:-1] if how == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=f"adapter_model.safetensors.*{sha256}|{sha256}.*adapter_model.safetensors"):
        transfer.push(source, adapter, target)
    # Other blobs may have arrived; nothing names them.
    new = set(paths(target)) - set(before)
    assert all(path.startswith("blobs/") for path in new) and target.verify_all() == []
    overwrite(source, blob_path(sha256), data)
    assert transfer.push(source, adapter, target).ref == "team/adapter:1"


def test_a_damaged_manifest_or_attestation_does_not_travel(folder_registry: Registry, registry: Registry) -> None:
    source, target = folder_registry, registry
    base, adapter = add_family(source)
    said = attestations.attest(source, base.digest, "approval", {"comment": "yes"})
    for path in (manifest_path(base.digest), attestations.path_of(said)):
        data = source.store.get(path)
        overwrite(source, path, data.replace(b"e", b"f"))
        with pytest.raises(UserError, match="damaged"):
            transfer.push(source, adapter, target)  # which has read the manifest before, when it was whole
        overwrite(source, path, data)
        assert target.models() == [] and target.verify_all() == []


def test_a_damaged_manifest_over_there_is_mended(folder_registry: Registry, registry: Registry) -> None:
    base, adapter = add_family(folder_registry)
    transfer.push(folder_registry, base, registry)
    flip(registry, manifest_path(base.digest))
    assert registry.verify_all() != []
    transfer.push(folder_registry, adapter, Registry(registry.location))
    assert registry.verify_all() == []


def test_a_cut_blob_over_there_is_sent_again(folder_registry: Registry, registry: Registry) -> None:
    source, target = folder_registry, registry
    base, _ = add_family(source)
    transfer.push(source, base, target)
    entry = base.manifest["files"][0]
    overwrite(target, blob_path(entry["sha256"]), b"x")
    assert transfer.push(source, base, target).bytes_sent == entry["size"]
    assert target.verify_all() == []


def test_a_pickle_that_someone_smuggled_in_does_not_travel(two: tuple[Registry, Registry]) -> None:

    source, target = two
    evil = add(source, "team/evil", {"model.safetensors": pickle.dumps({"a": 1})})
    with pytest.raises(UserError, match="the file model.safetensors is a pickle"):
        transfer.push(source, evil, target)
    assert paths(target) == ["registry.json"]


def test_a_manifest_that_lies_about_a_size_does_not_travel(folder_registry: Registry, registry: Registry) -> None:
    entry = {"path": "a", "sha256": hashlib.sha256(b"1").hexdigest(), "size": 2}
    liar = add(folder_registry, "team/liar", {"a": b"1"}, files=[entry])
    with pytest.raises(UserError, match="the file a is damaged: expected .* and 2 bytes, found .* and 1"):
        transfer.push(folder_registry, liar, registry)
    assert registry.models() == []


def test_an_adapter_on_what_is_no_base_does_not_travel(folder_registry: Registry, registry: Registry) -> None:
    head = add(folder_registry, "team/reward", {"a": b"1"}, "reward")
    adapter = add(folder_registry, "team/adapter", {"b": b"2"}, "adapter", base=head.digest)
    with pytest.raises(UserError, match="has a base of kind reward; expected base or merged"):
        transfer.push(folder_registry, adapter, registry)
    assert paths(registry) == ["registry.json"]


def test_the_origin_is_said_once_even_if_the_first_push_broke_off(
    folder_registry: Registry, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = add_family(folder_registry)

    def fail(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(records, "write", fail)
        with pytest.raises(UserError, match="pushing team/base:1 to .* failed: no space left"):
            transfer.push(folder_registry, base, registry)
    assert registry.models() == []
    transfer.push(folder_registry, base, registry)
    assert len(attestations.of(registry, base.digest)) == 1


def test_what_was_deleted_over_there_comes_back_only_when_asked_for(
    folder_registry: Registry, registry: Registry
) -> None:
    base, adapter = add_family(folder_registry)
    transfer.push(folder_registry, adapter, registry)
    record = {"why": "wrong data", "by": "ann", "time": "t"}
    for name in ("team/base", "team/adapter"):
        assert records.write(registry.store, records.tombstones_folder(name), 1, record)
    assert transfer.push(folder_registry, adapter, registry).ref == "team/adapter:2"
    assert registry.numbers("team/base") == []
    assert transfer.push(folder_registry, base, registry).ref == "team/base:2"


def test_an_ancestor_that_was_deleted_keeps_its_name_on_the_way(folder_registry: Registry, registry: Registry) -> None:
    base, adapter = add_family(folder_registry)
    record = {"why": "wrong data", "by": "ann", "time": "t"}
    assert records.write(folder_registry.store, records.tombstones_folder("team/base"), 1, record)
    transfer.push(folder_registry, adapter, registry)
    assert registry.by_digest(base.digest).ref == "team/base:1"


def test_the_policy_over_there_decides(folder_registry: Registry, registry: Registry, tmp_path: Path) -> None:
    _, adapter = add_family(folder_registry)
    (tmp_path / "policy.yaml").write_text("publish: {licences: [apache-2.0]}")
    policy.set_policy(registry, tmp_path / "policy.yaml")
    before = paths(registry)
    with pytest.raises(UserError, match="lets in only the licences apache-2.0"):
        transfer.push(folder_registry, adapter, registry)
    assert paths(registry) == before
    (tmp_path / "policy.yaml").write_text("publish: {licences: [mit]}")
    policy.set_policy(registry, tmp_path / "policy.yaml")
    assert transfer.push(folder_registry, adapter, registry).blobs_sent == 5


def test_a_source_that_one_may_only_read(folder_registry: Registry, registry: Registry, monkeypatch: Any) -> None:
    _, adapter = add_family(folder_registry)

    def refuse(*arguments: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    for method in ("put_if_absent", "put_blob", "workspace"):
        monkeypatch.setattr(folder_registry.store, method, refuse)
    assert transfer.push(folder_registry, adapter, registry).blobs_sent == 5


def test_both_sides_are_leased_meanwhile(folder_registry: Registry, registry: Registry, monkeypatch: Any) -> None:
    _, adapter = add_family(folder_registry)
    seen = []
    put_blob = registry.store.put_blob

    def look(file: Path, sha256: str) -> None:
        for side in (folder_registry, registry):
            (name,) = side.store.list("leases")
            seen.append(sha256.encode() in side.store.get(f"leases/{name}"))
        put_blob(file, sha256)

    monkeypatch.setattr(registry.store, "put_blob", look)
    transfer.push(folder_registry, adapter, registry)
    assert len(seen) == 10 and all(seen)


def test_many_pushes_of_one_version_register_it_once(folder_registry: Registry, registry: Registry) -> None:
    _, adapter = add_family(folder_registry)
    found: list[str] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(
                transfer.push(Registry(folder_registry.location), adapter, Registry(registry.location)).ref
            )
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["team/adapter:1"] * 4
    assert registry.numbers("team/base") == registry.numbers("team/adapter") == [1]


def test_a_damaged_record_of_another_version_stops_no_push(folder_registry: Registry, registry: Registry) -> None:
    base, adapter = add_family(folder_registry)
    for side in (folder_registry, registry):
        add(side, "team/adapter", {"x": b"another"})
        overwrite(side, f"models/team/adapter/versions/{len(side.numbers('team/adapter')):07d}.json", b"{}")
    assert transfer.push(folder_registry, base, registry).ref == "team/base:1"
    assert transfer.push(folder_registry, adapter, registry).ref == "team/adapter:2"


def test_one_that_is_watched_says_how_many_bytes_are_done(folder_registry: Registry, registry: Registry) -> None:
    _, adapter = add_family(folder_registry)
    seen: list[tuple[int, int]] = []
    report = transfer.push(folder_registry, adapter, registry, lambda done, total: seen.append((done, total)))
    total = report.bytes_total
    assert len(seen) == 5 and seen[-1] == (total, total) and seen == sorted(seen)


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("s3://key:secret@bucket/prefix", "s3://bucket/prefix"),
        ("s3://bucket/prefix?access_key=a&secret=b#c", "s3://bucket/prefix"),
        ("az://container/x", "az://container/x"),
        ("/home/ann/team registry", "…/team registry"),
        ("registry", "…/registry"),
    ],
)
def test_locations_as_others_may_read_them(location: str, shown: str) -> None:
    assert without_credentials(location) == shown


def test_the_made_up_versions_are_in_order(registry: Registry) -> None:
    base, adapter = add_family(registry)
    assert registry.verify_all() == [] and isinstance(adapter, Version)
    assert registry.store.get(manifest_path(base.digest)) == canonical(base.manifest)
