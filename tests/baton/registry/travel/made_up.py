"""Versions of a few bytes for tests of what travels: no model that loads, but manifests, blobs and records in order."""

import hashlib
from pathlib import Path
from typing import Any

from baton.registry import Registry, Version, records
from baton.registry import manifest as manifests
from tests.baton.registry.small_fields import PROBE, VOCABULARY


def weights(data: bytes) -> bytes:
    """A safetensors file of one embedding: four rows of these float32 numbers."""
    size = len(data)
    header = f'{{"embed_tokens.weight":{{"dtype":"F32","shape":[4,{size // 16}],"data_offsets":[0,{size}]}}}}'.encode()
    return len(header).to_bytes(8, "little") + header + data


FILES = {
    "config.json": b'{"model_type": "made-up", "vocab_size": 4}',
    "model.safetensors": weights(bytes(range(256)) * 5),
}
TOKENIZER = {"tokenizer.json": b'{"version": "1.0", "model": {"vocab": {"a": 0, "b": 1, "c": 2, "d": 3}}}'}
NO_DIGEST = "sha256:" + "0" * 64


def manifest(files: dict[str, bytes], kind: str = "base", /, **changes: Any) -> dict[str, Any]:
    """A manifest of some files, as `publish` would write it; `changes` replace fields."""
    entries = [
        {"path": path, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for path, data in sorted(files.items())
    ]
    return {
        "format": manifests.FORMAT,
        "kind": kind,
        "files": entries,
        "architecture": {"class": None, "model_type": "made-up"},
        "dtype": "float32",
        "vocabulary": VOCABULARY,
        "tokenizer_digest": NO_DIGEST,
        "chat_template_digest": None,
        "base": None,
        "parents": {},
        "data": [],
        "recipe": {},
        "code": {},
        "packages": {},
        "metrics": {},
        "licence": "mit",
        "licences": {"models": ["mit"], "data": []},
        "build_key": None,
        "probe": PROBE,
    } | changes


def add(registry: Registry, name: str, files: dict[str, bytes], kind: str = "base", /, **changes: Any) -> Version:
    """Register a made-up version as the next one of `name`."""
    content = manifest(files, kind, **changes)
    with registry.store.workspace() as folder:
        for data in files.values():
            sha256 = hashlib.sha256(data).hexdigest()
            Path(folder, sha256).write_bytes(data)
            registry.store.put_blob(folder / sha256, sha256)
    data = manifests.canonical(content)
    digest = manifests.digest_of(data)
    registry.store.put_if_absent(manifests.manifest_path(digest), data)
    number = max([0, *registry.all_numbers(name)]) + 1
    record = {
        "number": number,
        "digest": digest,
        "kind": kind,
        "identity": manifests.identity(content),
        "by": "someone",
        "time": "2026-01-02T03:04:05Z",
    }
    assert records.write(registry.store, records.versions_folder(name), number, record)
    return Version(name, number, digest, registry)


def add_family(registry: Registry) -> tuple[Version, Version]:
    """A base and an adapter on it that shares its tokenizer file."""
    base = add(registry, "team/base", FILES | TOKENIZER)
    no_tensors = b"\3\0\0\0\0\0\0\0{} "
    weights = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": no_tensors}
    adapter = add(
        registry, "team/adapter", weights | TOKENIZER, "adapter", base=base.digest, parents={"pretrain": base.digest}
    )
    return base, adapter
