"""Bundles: the same bytes everywhere, nothing lost on the way, and no more sent than the receiver lacks."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.errors import UserError
from baton.registry import Registry
from baton.registry.travel import bundle, transfer
from baton.registry.trust import attestations, policy
from tests.baton.registry.conftest import overwrite, paths, store_kind_of
from tests.baton.registry.travel.made_up import FILES, TOKENIZER, add, add_family, weights

ROOT = Path(__file__).parents[4]


def names(file: Path) -> list[str]:
    with tarfile.open(file, "r:") as tar:
        return tar.getnames()


def same_in(registry: Registry, location: str) -> Registry:
    """A registry with the very same files, somewhere else."""
    copy = Registry(location, create=True)
    for path in paths(registry):
        overwrite(copy, path, registry.store.get(path))
    return Registry(location)


def test_there_and_back(filled: Registry, new_location: Callable[[str], str], tmp_path: Path) -> None:
    version = filled.resolve("team/reward:1")
    said = attestations.attest(filled, version.digest, "evaluation", {"metrics": {"accuracy": 0.9}})
    written = bundle.export(filled, version, tmp_path / "reward.tar")
    data = (tmp_path / "reward.tar").read_bytes()
    assert (written.size, written.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    first, *others = names(tmp_path / "reward.tar")
    assert first == "bundle.json" and written.num_files == len(others)
    receiver = Registry(new_location("folder"), create=True)
    seen: list[tuple[int, int]] = []
    versions = bundle.import_bundle(receiver, tmp_path / "reward.tar", lambda done, total: seen.append((done, total)))
    assert [found.ref for found in versions] == ["team/base:1", "team/adapter:1", "team/reward:1"]
    assert [found.digest for found in versions] == [filled.resolve(found.ref).digest for found in versions]
    assert receiver.verify_all(deep=True) == []  # replays the probes
    assert seen[-1][0] == seen[-1][1] and seen == sorted(seen)
    assert attestations.of(receiver, version.digest, "evaluation") == [said]
    (origin,) = attestations.of(receiver, version.digest, "origin")
    (record,) = filled.version_records("team/reward").values()
    assert origin.body == {
        "registry": filled.id,
        "bundle": f"sha256:{written.sha256}",
        "ref": "team/reward:1",
        "published_by": record["by"],
        "attestations": [said.digest],
    }
    before = paths(receiver)
    assert not [path for path in before if path.startswith(("tmp/", "leases/"))]
    assert bundle.import_bundle(receiver, io.BytesIO(data)) == versions and paths(receiver) == before


def test_equal_content_gives_equal_bytes(
    registry: Registry, new_location: Callable[[str], str], tmp_path: Path
) -> None:
    base, adapter = add_family(registry)
    for subject in (base.digest, adapter.digest):
        for number in range(3):
            attestations.attest(registry, subject, "evaluation", {"metrics": {"accuracy": number}})
    cloud = same_in(registry, new_location("s3"))
    bundle.export(registry, adapter, tmp_path / "1.tar")
    bundle.export(registry, adapter, tmp_path / "1.tar")  # over itself
    bundle.export(cloud, cloud.resolve("team/adapter:1"), tmp_path / "2.tar")
    stream = io.BytesIO()
    bundle.export(registry, adapter, stream)
    script = (
        "import os, sys, time; os.umask(0o077); time.tzset()\n"
        "from baton.registry import Registry; from baton.registry.travel import bundle; from pathlib import Path\n"
        "registry = Registry(sys.argv[1])\n"
        "bundle.export(registry, registry.resolve('team/adapter:1'), Path(sys.argv[2]))"
    )
    copied = new_location("folder")  # other times, inodes and order; and another store
    for path in paths(registry):
        place = Path(copied, path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(registry.store.get(path))
    environment = os.environ | {"TZ": "Pacific/Kiritimati", "LC_ALL": "C", "PYTHONHASHSEED": "7"}
    subprocess.run(
        [sys.executable, "-c", script, copied, str(tmp_path / "3.tar")], check=True, env=environment, cwd=ROOT
    )
    first = (tmp_path / "1.tar").read_bytes()
    assert first == (tmp_path / "2.tar").read_bytes() == (tmp_path / "3.tar").read_bytes() == stream.getvalue()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["1.tar", "2.tar", "3.tar"]
    assert len(names(tmp_path / "1.tar")) == 1 + 2 + 6 + 5


def test_without_what_the_receiver_has(folder_registry: Registry, registry: Registry, tmp_path: Path) -> None:
    base, adapter = add_family(folder_registry)
    other = add(folder_registry, "team/other", {"x": b"x"})
    file = tmp_path / "adapter.tar"
    bundle.export(folder_registry, adapter, file, [base])
    blobs = [name for name in names(file) if name.startswith("blobs/")]
    ours = {entry["sha256"] for entry in adapter.manifest["files"]} - {e["sha256"] for e in base.manifest["files"]}
    assert blobs == sorted(f"blobs/sha256/{sha256}" for sha256 in ours) and len(blobs) == 2
    before = paths(registry)
    with pytest.raises(UserError, match=r"exported without team/base:1\) and .* lacks: sha256:"):
        bundle.import_bundle(registry, file)
    assert paths(registry) == before
    transfer.push(folder_registry, base, registry)
    (version,) = bundle.import_bundle(registry, file)
    assert version.digest == adapter.digest and registry.verify_all() == []
    overwrite(registry, f"blobs/sha256/{base.manifest['files'][0]['sha256']}", b"cut")
    with pytest.raises(UserError, match="lacks: the blob"):
        bundle.import_bundle(registry, file)
    with pytest.raises(UserError, match="leaves nothing out: team/adapter:1 needs nothing of it"):
        bundle.export(folder_registry, adapter, file, [other])
    with pytest.raises(UserError, match="is itself left out"):
        bundle.export(folder_registry, base, file, [adapter])


def test_what_is_collected_during_an_import_is_missed(
    folder_registry: Registry, registry: Registry, tmp_path: Path
) -> None:
    base, adapter = add_family(folder_registry)
    bundle.export(folder_registry, adapter, tmp_path / "x.tar", [base])
    transfer.push(folder_registry, base, registry)

    def collect(done: int, total: int) -> None:
        registry.store.delete(f"blobs/sha256/{base.manifest['files'][0]['sha256']}")

    with pytest.raises(UserError, match="lacks: the blob"):
        bundle.import_bundle(registry, tmp_path / "x.tar", collect)
    assert registry.models() == ["team/base"]


def test_export_refuses_what_is_damaged_and_leaves_nothing(registry: Registry, tmp_path: Path) -> None:
    _, adapter = add_family(registry)
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "x.tar"
    bundle.export(registry, adapter, file)
    good = file.read_bytes()
    entry = adapter.manifest["files"][1]
    overwrite(registry, f"blobs/sha256/{entry['sha256']}", b"\3\0\0\0\0\0\0\0{}b")
    with pytest.raises(UserError, match=f"adapter_model.safetensors is damaged .*{entry['sha256']}"):
        bundle.export(registry, adapter, file)
    assert file.read_bytes() == good and os.listdir(tmp_path / "out") == ["x.tar"]
    with pytest.raises(UserError, match="absent is not a folder"):
        bundle.export(registry, adapter, tmp_path / "absent" / "x.tar")
    with pytest.raises(UserError, match="is not a regular file"):
        bundle.export(registry, adapter, tmp_path / "out")


def test_import_into_s3_is_as_strict(registry: Registry, folder_registry: Registry, tmp_path: Path) -> None:
    _, adapter = add_family(folder_registry)
    bundle.export(folder_registry, adapter, tmp_path / "x.tar")
    data = bytearray((tmp_path / "x.tar").read_bytes())
    for at in (600, len(data) // 2, len(data) - 1100):
        data[at] ^= 1
        with pytest.raises(UserError):
            bundle.import_bundle(registry, io.BytesIO(data))
        assert paths(registry) == ["registry.json"]
        data[at] ^= 1
    assert len(bundle.import_bundle(registry, io.BytesIO(data))) == 2


def test_the_policy_over_there_decides(folder_registry: Registry, registry: Registry, tmp_path: Path) -> None:
    _, adapter = add_family(folder_registry)
    bundle.export(folder_registry, adapter, tmp_path / "x.tar")
    (tmp_path / "policy.yaml").write_text("publish: {licences: [apache-2.0]}")
    policy.set_policy(registry, tmp_path / "policy.yaml")
    before = paths(registry)
    with pytest.raises(UserError, match="lets in only the licences apache-2.0"):
        bundle.import_bundle(registry, tmp_path / "x.tar")
    assert paths(registry) == before


def test_a_mistake_half_way_is_mended_by_the_same_command(
    folder_registry: Registry, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = add_family(folder_registry)
    bundle.export(folder_registry, adapter, tmp_path / "x.tar")
    calls: list[Any] = []
    put_blob = registry.store.put_blob

    def fail(file: Path, sha256: str) -> None:
        calls.append(sha256)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        put_blob(file, sha256)

    with monkeypatch.context() as patch:
        patch.setattr(registry.store, "put_blob", fail)
        with pytest.raises(UserError, match="importing into .* no space left"):
            bundle.import_bundle(registry, tmp_path / "x.tar")
    assert registry.models() == [] and registry.verify_all() == []
    assert len(bundle.import_bundle(registry, tmp_path / "x.tar")) == 2


def test_memory_stays_flat(registry: Registry, new_location: Callable[[str], str], tmp_path: Path) -> None:
    """96 MiB travel in a process that holds a few parts of them at a time."""
    size = 96 << 20
    small = add(registry, "team/small", FILES | TOKENIZER | {"model.safetensors": weights(bytes(16))})
    version = add(registry, "team/large", FILES | TOKENIZER | {"model.safetensors": weights(bytes(size))})
    script = (
        "import sys; from pathlib import Path\n"
        "from baton.registry import Registry; from baton.registry.travel import bundle, transfer\n"
        "source, file = Registry(sys.argv[1]), Path(sys.argv[2])\n"
        "imported, pushed = Registry(sys.argv[3], create=True), Registry(sys.argv[4], create=True)\n"
        "for ref in ('team/small:1', 'team/large:1'):\n"
        "    bundle.export(source, source.resolve(ref), file)\n"
        "    bundle.import_bundle(imported, file)\n"
        "    transfer.push(source, source.resolve(ref), pushed)\n"
        "    print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    )
    places = [str(tmp_path / "x.tar"), new_location("folder"), new_location("folder")]
    command = [sys.executable, "-c", script, registry.location, *places]
    said = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout
    before_kib, after_kib = map(int, said.split())
    most = {"folder": size / 6, "s3": size * 3 / 4}[store_kind_of(registry)]  # S3 is read eight ranges ahead
    assert (after_kib - before_kib) * 1024 < most
    for place in places[1:]:
        assert [Registry(place).resolve(ref).digest for ref in ("team/small:1", "team/large:1")] == [
            small.digest,
            version.digest,
        ]
