"""Verify what a registry holds: every record, manifest and blob, and that no ancestor is missing."""

from typing import TYPE_CHECKING, Any

from baton.errors import UserError
from baton.registry import manifest as manifests
from baton.registry import records
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

    def check_model(self, name: str, deep: bool) -> None:
        """Check every version and alias record of a model."""
        versions = self._check_records(records.versions_folder(name), "digest")
        for number, record in versions.items():
            manifest = self.check_manifest(record["digest"], f"{name}:{number}")
            if deep and manifest:
                self.check_probe(Version(name, number, record["digest"], self.registry))
        for alias in self.store.list(f"models/{name}/aliases"):
            if not records.is_alias(alias):
                self.problems.append(f"{name}: {alias!r} among the aliases is none")
                continue
            moves = self._check_records(records.alias_folder(name, alias), "to")
            previous = None
            for number, record in moves.items():
                if record["to"] not in versions:
                    self.problems.append(f"{name}:{alias}, record {number}: no version {record['to']}")
                if record.get("previous") != previous:
                    self.problems.append(
                        f"{name}:{alias}, record {number}: says it replaced {record.get('previous')}, "
                        f"but {previous} was there"
                    )
                previous = record["to"]

    def _check_records(self, folder: str, field: str) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        present = records.numbers(self.store, folder)
        stray = set(self.store.list(folder)) - {f"{number:07d}.json" for number in present}
        self.problems += [f"{self.store.describe(folder)}: {name!r} is not a record" for name in sorted(stray)]
        missing = sorted(set(range(1, max(present, default=0) + 1)) - set(present))
        gaps = [records.record_path(folder, number) for number in missing]
        self.problems += [f"{self.store.describe(path)} is missing" for path in gaps]
        for number in present:
            try:
                found[number] = records.read(self.store, folder, number, field)
            except UserError as error:
                self.problems.append(str(error))
        return found

    def check_everything(self, deep: bool) -> None:
        """Check all models, then what no version names: a killed publish may leave manifests and blobs."""
        for team in self.store.list("models"):
            # Not `registry.models()`: a model that has lost its versions may still have aliases.
            for name in self.store.list(f"models/{team}"):
                self.check_model(f"{team}/{name}", deep)
        for file in self.store.list("manifests/sha256"):
            digest = "sha256:" + file.removesuffix(".json")
            if manifests.manifest_path(digest) != f"manifests/sha256/{file}":
                self.problems.append(f"manifests/sha256/{file} is not a manifest's name")
            elif digest not in self._manifests:
                try:
                    self.registry.read_manifest(digest)
                except UserError as error:
                    self.problems.append(f"a manifest that no version names: {error}")
        for sha256 in self.store.list("blobs/sha256"):
            self.check_blob(sha256, "a blob that no version names")
