"""Damage: for every file of a registry, a flipped bit, a cut and a swap are found, before anything is loaded."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton.errors import UserError
from baton.registry import Registry
from baton.registry.care import leases, tombstones
from baton.registry.care.fsck import check
from baton.registry.care.layout import place
from baton.registry.trust import attestations, policy
from tests.baton.registry.care import small_models
from tests.baton.registry.conftest import overwrite, paths

NUMBER_OF_DAMAGES = 246
"""How many the test below makes: where a kind of file is added, so are damages of it."""


def fill(registry: Registry, tmp_path: Path) -> None:
    """At least two files of every kind, but for registry.json."""
    base = small_models.publish(registry, "team/base", {"model.safetensors": b"base weights", "config.json": b"{}"})
    other = small_models.publish(registry, "team/base", {"model.safetensors": b"other weights", "config.json": b"{}"})
    adapter = {"adapter_model.safetensors": b"adapter weights", "adapter_config.json": b'{"r": 2}'}
    small_models.publish(registry, "team/adapter", adapter, base, {"init": base})
    for number in (3, 4):
        gone = small_models.publish(registry, "team/base", {"model.safetensors": b"bad weights %d" % number})
        tombstones.delete(registry, gone.ref, f"bad {number}", "ann")
    for version, alias in ((base, "prod"), (other, "prod"), (base, "candidate")):
        registry.promote(version.ref, alias, "better", by="ann")
    for version, kind, body in (
        (base, "evaluation", {"metrics": {"accuracy": 0.75}}),
        (base, "evaluation", {"metrics": {"accuracy": 0.5}}),
        (other, "origin", {"registry": "0" * 32, "location": "elsewhere", "ref": "team/base:9"}),
    ):
        attestations.attest(registry, version.digest, kind, body, by="ann")
    for licence in ("apache-2.0", "mit"):
        (tmp_path / "policy.yaml").write_text(f"publish: {{licences: [{licence}]}}\n")
        policy.set_policy(registry, tmp_path / "policy.yaml", by="ann")
    for digest in (base.digest, other.digest):
        leases.Lease(registry.store, "somebody").add([digest])
        leases.condemn(registry.store, [digest])


def flips(data: bytes, path: str) -> Iterator[tuple[str, bytes]]:
    """One bit: the first, the last, and one in the middle that differs from file to file."""
    num_bits = 8 * len(data)
    for bit in (0, 1 + sum(path.encode()) * 7919 % (num_bits - 2), num_bits - 1):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", bytes(damaged)


def damages(path: str, whole: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """What can have happened to a file: (what, its bytes now)."""
    data = whole[path]
    yield from flips(data, path)
    yield "cut by a byte", data[:-1]
    yield "cut in half", data[: len(data) // 2]
    yield "emptied", b""
    kind, _ = place(path)
    swapped = [other for other in whole if place(other)[0] == kind and whole[other] != data]
    if swapped:
        yield f"swapped with {swapped[0]}", whole[swapped[0]]
        if swapped[-1] != swapped[0]:
            yield f"swapped with {swapped[-1]}", whole[swapped[-1]]


def readers(registry: Registry, path: str) -> list[Callable[[Registry], object]]:
    """What is used of a registry that has to do with a file: all of it must refuse, not only fsck."""
    kind, said = place(path)
    if kind == "manifest":
        refs = registry.references().get(f"sha256:{said['digest']}", [])
        return [lambda fresh, ref=ref: fresh.resolve(ref).folder() for ref in refs]
    if kind == "blob":
        using = [
            version.ref
            for name in registry.models()
            for version in registry.versions(name)
            if said["digest"] in {entry["sha256"] for entry in version.manifest["files"]}
        ]
        return [lambda fresh, ref=ref: fresh.resolve(ref).folder() for ref in using]
    if kind == "version" and int(said["number"]) in registry.deleted_numbers(said["name"]):
        return []
    if kind in ("version", "tombstone"):
        return [lambda fresh: fresh.resolve(f"{said['name']}:{said['number']}")]
    if kind == "alias":
        last = registry.alias_history(said["name"], said["alias"])
        reading = [lambda fresh: fresh.alias_history(said["name"], said["alias"])]
        if int(said["number"]) == len(last):
            reading.append(lambda fresh: fresh.resolve(f"{said['name']}:{said['alias']}"))
        return reading
    if kind == "attestation":
        return [lambda fresh: attestations.of(fresh, f"sha256:{said['subject']}")]
    if kind == "policy":
        return [policy.history]
    return []


def test_every_damage_is_found_before_anything_is_loaded(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_wait_for_collectors", lambda store, digests: None)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # nothing here survives a power cut anyway
    fill(registry, tmp_path)
    assert check(registry).problems == []
    whole = {path: registry.store.get(path) for path in paths(registry)}
    kinds = Counter(place(path)[0] for path in whole)
    assert kinds.keys() == {
        *("registry", "blob", "manifest", "version", "alias", "tombstone", "attestation", "policy"),
        *("lease", "condemned"),
    }
    assert all(count >= 2 for kind, count in kinds.items() if kind != "registry")
    made = 0
    for number, path in enumerate(sorted(whole)):
        kind, said = place(path)
        refusing = readers(registry, path)
        assert refusing or kind in ("registry", "lease", "condemned") or is_of_a_deleted(path, registry)
        where = registry.store.describe(path)
        for what, data in damages(path, whole):
            overwrite(registry, path, data)
            made += 1
            monkeypatch.setenv("BATON_CACHE", str(tmp_path / f"cache-{number}-{made}"))
            if kind == "registry":
                with pytest.raises(UserError, match="registry.json is damaged"):
                    Registry(registry.location)
                continue
            problems = [problem for problem in check(Registry(registry.location)).problems if problem.path == path]
            assert problems and where in problems[0].message, (path, what)
            if kind in ("blob", "manifest", "attestation"):
                found = small_models.manifests.digest_of(data)
                if kind != "attestation":
                    assert f"expected sha256:{said['digest']}, found {found}" in problems[0].message, (path, what)
            for read in refusing:
                with pytest.raises(UserError) as caught:
                    read(Registry(registry.location))
                if kind == "tombstone" and "was deleted" in str(caught.value):
                    continue
                assert where in str(caught.value), (path, what)
        overwrite(registry, path, whole[path])
    assert check(Registry(registry.location)).problems == []
    assert made == NUMBER_OF_DAMAGES


def is_of_a_deleted(path: str, registry: Registry) -> bool:
    """Whether a record, blob or manifest belongs to deleted versions, and so to nothing that can be resolved."""
    kind, said = place(path)
    live = {digest.removeprefix("sha256:") for digest in registry.references()}
    if kind == "manifest":
        return said["digest"] not in live
    files = {entry["sha256"] for digest in live for entry in registry.manifest(f"sha256:{digest}")["files"]}
    if kind == "version":
        return int(said["number"]) in registry.deleted_numbers(said["name"])
    return kind == "blob" and said["digest"] not in files


def test_a_record_put_elsewhere_is_not_believed(registry: Registry) -> None:
    """It is whole in itself: an old alias record as the newest would be a silent rollback."""
    store = registry.store
    for content in (b"1", b"2"):
        version = small_models.publish(registry, "team/base", {"a": content})
        registry.promote(version.ref, "prod", "x")
    first = store.get("models/team/base/aliases/prod/0000001.json")
    overwrite(registry, "models/team/base/aliases/prod/0000003.json", first)
    with pytest.raises(UserError, match="0000003.json is damaged, or belongs elsewhere: expected sha256:.*, found"):
        Registry(registry.location).resolve("team/base:prod")
