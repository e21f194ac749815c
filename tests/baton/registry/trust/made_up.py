"""For tests: versions whose manifests say what a test wants, keys, and files of a team."""

from pathlib import Path
from typing import Any

from baton.registry import Registry, Version, provenance, records
from baton.registry import manifest as manifests


def variant(registry: Registry, changes: dict[str, Any], name: str = "team/base", by: str = "pat") -> Version:
    """A new version of `name`: version 1 of team/base with another manifest, published by `by`."""
    content = registry.resolve("team/base:1").manifest | changes
    data = manifests.canonical(content)
    digest = manifests.digest_of(data)
    registry.store.put_if_absent(manifests.manifest_path(digest), data)
    number = len(registry.all_numbers(name)) + 1
    record = {
        "number": number,
        "digest": digest,
        "kind": content["kind"],
        "identity": manifests.identity(content),
        "by": by,
        "time": provenance.now(),
    }
    assert records.write(registry.store, records.versions_folder(name), number, record)
    return Version(name, number, digest, registry)


def make_key(folder: Path, name: str, curve: str = "SECP256R1", password: bytes | None = None) -> tuple[Path, Path]:
    """(private, public): NAME.pem and NAME.pub in `folder`."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(getattr(ec, curve)())
    protection = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem, public = folder / f"{name}.pem", folder / f"{name}.pub"
    pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption_algorithm=protection
        )
    )
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
    return pem, public
