"""Registries of models that hold a few bytes and load nowhere: all that housekeeping looks at, and no torch."""

from typing import Any

from baton.registry import Registry, Version, records
from baton.registry import manifest as manifests
from baton.registry.care.leases import lease
from baton.registry.stores.files import write_hashed
from tests.baton.registry.small_fields import PROBE, VOCABULARY


def manifest(files: dict[str, bytes], kind: str, base: str | None, parents: dict[str, str]) -> dict[str, Any]:
    """A manifest of some files."""
    entries = [
        {"path": path, "sha256": manifests.digest_of(data).removeprefix("sha256:"), "size": len(data)}
        for path, data in sorted(files.items())
    ]
    content: dict[str, Any] = {
        "format": manifests.FORMAT,
        "kind": kind,
        "files": entries,
        "architecture": {"class": None, "model_type": None},
        "dtype": "float32",
        "vocabulary": VOCABULARY,
        "tokenizer_digest": "sha256:" + "0" * 64,
        "chat_template_digest": None,
        "base": base,
        "parents": parents,
        "data": [],
        "recipe": {},
        "code": {},
        "packages": {},
        "metrics": {},
        "licence": None,
        "licences": {"models": [], "data": []},
        "build_key": None,
        "probe": PROBE,
    }
    manifests.parse(manifests.canonical(content), manifests.digest_of(manifests.canonical(content)), "the test's")
    return content


def store(registry: Registry, content: dict[str, Any], files: dict[str, bytes]) -> str:
    """Store blobs and manifest of something that has no version; returns the digest."""
    data = manifests.canonical(content)
    with registry.store.workspace() as folder:
        for entry in content["files"]:
            write_hashed(files[entry["path"]], folder / entry["sha256"])
            registry.store.put_blob(folder / entry["sha256"], entry["sha256"])
    digest = manifests.digest_of(data)
    registry.store.put_if_absent(manifests.manifest_path(digest), data)
    return digest


def publish(
    registry: Registry,
    name: str,
    files: dict[str, bytes],
    base: Version | None = None,
    parents: dict[str, Version] | None = None,
) -> Version:
    """The next version of `name`, in the order in which publish writes, under a lease."""
    kind = "adapter" if base else "base"
    needed = {role: parent.digest for role, parent in (parents or {}).items()}
    content = manifest(files, kind, base.digest if base else None, needed)
    digest = manifests.digest_of(manifests.canonical(content))
    with lease(registry.store, f"publish {name}", [digest, *(entry["sha256"] for entry in content["files"])]):
        assert store(registry, content, files) == digest
        return record(registry, name, content)


def record(registry: Registry, name: str, content: dict[str, Any]) -> Version:
    """The version record of a manifest that is stored."""
    number = max(registry.all_numbers(name), default=0) + 1
    digest = manifests.digest_of(manifests.canonical(content))
    written = {
        "number": number,
        "digest": digest,
        "kind": content["kind"],
        "identity": manifests.identity(content),
        "by": "ann",
        "time": "2026-01-01T00:00:00Z",
    }
    assert records.write(registry.store, records.versions_folder(name), number, written)
    return Version(name, number, digest, registry)
