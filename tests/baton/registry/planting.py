"""Versions without files: lineage reads manifests and records alone, so that a test can have many of them."""

from collections.abc import Callable
from typing import Any

import pytest

from baton.registry import Registry, Version, records
from baton.registry import manifest as manifests
from baton.registry.history.licences import gather
from tests.baton.registry.small_fields import PROBE, VOCABULARY

Plant = Callable[..., Version]


@pytest.fixture
def plant(registry: Registry) -> Plant:
    """`plant("team/name", kind="base", base=…, parents={role: version}, **fields)` writes the next version."""

    def write(
        name: str,
        kind: str = "base",
        base: Version | None = None,
        parents: dict[str, Version] | None = None,
        **fields: Any,
    ) -> Version:
        parents = parents or {}
        content: dict[str, Any] = {
            "format": manifests.FORMAT,
            "kind": kind,
            "files": [],
            "architecture": {"class": "LlamaForCausalLM", "num_layers": 2},
            "dtype": "bfloat16",
            "vocabulary": VOCABULARY | {"size": 300, "embedding_rows": 304},
            "tokenizer_digest": "sha256:" + "a" * 64,
            "chat_template_digest": None,
            "base": base.digest if base else None,
            "parents": {role: version.digest for role, version in parents.items()},
            "data": [],
            "recipe": {},
            "code": {"baton": "1.0", "commit": None, "dirty": None},
            "packages": {},
            "metrics": {},
            "licence": None,
            "build_key": None,
            "probe": PROBE,
            **fields,
        }
        ancestors = [version.manifest for version in [*parents.values(), *([base] if base else [])]]
        content["licences"] = gather(content["licence"], ancestors, content["data"])
        data = manifests.canonical(content)
        digest = manifests.digest_of(data)
        registry.store.put_if_absent(manifests.manifest_path(digest), data)
        number = max([0, *registry.all_numbers(name)]) + 1
        record = {"number": number, "digest": digest, "kind": kind, "identity": manifests.identity(content)}
        record |= {"by": "ada", "time": f"2026-01-{number:02d}T00:00:00Z"}
        assert records.write(registry.store, records.versions_folder(name), number, record)
        return Version(name, number, digest, registry)

    return write
