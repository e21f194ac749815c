"""Verify one version: its manifest, its files and all its ancestors. The whole registry is fsck.py's."""

from typing import TYPE_CHECKING, Any

from baton.errors import UserError
from baton.registry.stores import blob_path
from baton.registry.version import WHOLE_KINDS, Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry


class Verification:
    """One pass over a registry; what several versions share is read once."""

    def __init__(self, registry: "Registry") -> None:
        """registry: the one to verify."""
        self.registry = registry
        self.store = registry.store
        self.problems: list[str] = []
        self._manifests: dict[str, dict[str, Any] | None] = {}
        self._blobs: set[str] = set()

    def check_manifest(self, digest: str, role: str) -> dict[str, Any] | None:
        """Check a manifest, its files and its ancestors; `role` says in a message what it is to whom."""
        if digest in self._manifests:
            return self._manifests[digest]
        try:
            manifest = self.registry.read_manifest(digest)
        except UserError as error:
            self._manifests[digest] = None
            self.problems.append(f"{role}: {error}")
            return None
        self._manifests[digest] = manifest
        for entry in manifest["files"]:
            self.check_blob(entry["sha256"], f"{role}, file {entry['path']}", entry["size"])
        for parent_role, parent in manifest["parents"].items():
            self.check_manifest(parent, f"{parent_role} of {role}")
        if manifest["base"]:
            base = self.check_manifest(manifest["base"], f"base of {role}")
            if base and base["kind"] not in WHOLE_KINDS:
                self.problems.append(f"{role}: its base {manifest['base']} is of kind {base['kind']}")
        return manifest

    def check_blob(self, sha256: str, role: str, size: int | None = None) -> None:
        """Check that a blob is there and has its digest (and size)."""
        if sha256 in self._blobs:
            return
        self._blobs.add(sha256)
        path = self.store.describe(blob_path(sha256))
        try:
            found, found_size = self.store.hash_blob(sha256)
        except FileNotFoundError:
            self.problems.append(f"{role}: {path} is missing")
            return
        if found != sha256:
            self.problems.append(f"{role}: {path} is damaged: expected sha256:{sha256}, found sha256:{found}")
        elif size is not None and size != found_size:
            self.problems.append(f"{role}: the manifest says {size} bytes, {path} has {found_size}")

    def check_probe(self, version: Version) -> None:
        """Materialise a version and replay its probe."""
        try:
            self.registry.materialise(version, replay_probe=True)
        except UserError as error:
            self.problems.append(f"{version.ref}: {error}")
