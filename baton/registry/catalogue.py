"""The registry as programs see it: open, resolve, publish, materialise, promote, verify."""

import json
import uuid
from pathlib import Path
from typing import Any

from baton.errors import UserError, nearest
from baton.registry import manifest as manifests
from baton.registry import materialise, provenance, records, reference
from baton.registry.lineage import lineage
from baton.registry.store import LocalStore, full_disk_is_user_error
from baton.registry.verify import Verification
from baton.registry.version import Version

FORMAT = "baton.registry/1"


class Registry:
    """A registry in a folder. Make one with `Registry.open`."""

    def __init__(self, store: LocalStore) -> None:
        """store: of a registry that exists."""
        self.store = store
        self._seen: dict[str, str] = {}  # manifest digest -> identity; manifests never change

    @classmethod
    def open(cls, path: str | Path, create: bool = False) -> "Registry":
        """Open the registry at `path`; with `create`, make it when the folder is absent or empty."""
        folder = Path(path).expanduser()
        store = LocalStore(folder)
        names = store.list("")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{path} is not a registry but a file; name a folder.")
        if "registry.json" not in names:
            if set(names) - {"tmp"}:  # tmp/ alone: another process is just making it
                raise UserError(
                    f"{path} is not a registry: it holds files but no registry.json. Name another folder, "
                    "or an empty one to make a registry there."
                )
            if not create:
                raise UserError(f"there is no registry at {path}. Publishing there makes one; or name another.")
            with full_disk_is_user_error(f"making the registry {path} failed"):
                store.root.mkdir(parents=True, exist_ok=True)
                made = {"format": FORMAT, "id": uuid.uuid4().hex}
                store.put_if_absent("registry.json", manifests.canonical(made))
        try:
            found = json.loads(store.get("registry.json"))["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a registry: its registry.json is damaged. Restore it.") from error
        if found != FORMAT:
            raise UserError(f"{path} has registry format {found!r}; this Baton reads {FORMAT!r}. Update Baton.")
        return cls(store)

    def models(self) -> list[str]:
        """The names of all models, sorted."""
        teams = self.store.list("models")
        names = [f"{team}/{name}" for team in teams for name in self.store.list(f"models/{team}")]
        return [name for name in names if self.numbers(name)]

    def numbers(self, name: str) -> list[int]:
        """The version numbers of a model, ascending, without reading the versions."""
        return records.numbers(self.store, records.versions_folder(name))

    def versions(self, name: str) -> list[Version]:
        """All versions of a model, oldest first."""
        self._require_model(name)
        return [self._version(name, number) for number in self.numbers(name)]

    def aliases(self, name: str) -> dict[str, int]:
        """Each alias of a model with the version number that it means now."""
        found = {alias: self.alias_history(name, alias) for alias in records.alias_names(self.store, name)}
        return {alias: history[-1]["to"] for alias, history in found.items() if history}

    def alias_history(self, name: str, alias: str) -> list[dict[str, Any]]:
        """Every move of an alias, oldest first: `{to, previous, reason, by, time}`."""
        reference.check_alias(alias)
        folder = records.alias_folder(name, alias)
        moves = records.numbers(self.store, folder)
        return [records.read(self.store, folder, number, "to") for number in moves]

    def resolve(self, ref: str) -> Version:
        """The version that a reference means now; raises UserError with near names, aliases or numbers."""
        parsed = reference.parse(ref)
        self._require_model(parsed.name)
        numbers = self.numbers(parsed.name)
        if parsed.digest is not None:
            for number in numbers:
                if self._digest(parsed.name, number) == parsed.digest:
                    return self._version(parsed.name, number)
            raise UserError(f"no version of {parsed.name} has the digest {parsed.digest}.")
        if parsed.alias is not None:
            aliases = self.aliases(parsed.name)
            if parsed.alias not in aliases:
                known = nearest(parsed.alias, list(aliases)) or sorted(aliases)[:10]
                listed = ", ".join(f"{parsed.name}:{alias}" for alias in known) or "none"
                raise UserError(
                    f"{parsed.name} has no alias {parsed.alias!r}; aliases: {listed}; versions: {_span(numbers)}."
                )
            return self._version(parsed.name, aliases[parsed.alias])
        assert parsed.number is not None
        if parsed.number not in numbers:
            raise UserError(f"{parsed.name} has no version {parsed.number}; versions: {_span(numbers)}.")
        return self._version(parsed.name, parsed.number)

    def by_digest(self, digest: str) -> Version:
        """A version with this manifest digest, the first by name and number."""
        for name in self.models():
            for number in self.numbers(name):
                if self._digest(name, number) == digest:
                    return self._version(name, number)
        raise UserError(f"no version in {self.store.root} has the digest {digest}.")

    def manifest(self, digest: str) -> dict[str, Any]:
        """The manifest with this digest, verified; raises UserError when it is missing or damaged."""
        path = manifests.manifest_path(digest)
        try:
            data = self.store.get(path)
        except FileNotFoundError as error:
            raise UserError(
                f"{self.store.path(path)} is missing. Copy it from a backup or the registry that has it."
            ) from error
        return manifests.parse(data, digest, str(self.store.path(path)))

    def references(self) -> dict[str, list[str]]:
        """Every manifest digest with the references that have it."""
        found: dict[str, list[str]] = {}
        for name in self.models():
            for number in self.numbers(name):
                found.setdefault(self._digest(name, number), []).append(f"{name}:{number}")
        return found

    def publish(
        self,
        folder: str | Path,
        *,
        name: str,
        kind: str,
        base: Version | None = None,
        parents: dict[str, Version] | None = None,
        details: dict[str, Any] | None = None,
    ) -> Version:
        """Publish a folder written by save_pretrained; the same content again gives the version that exists.

        kind: base, adapter, reward, value or merged. base: of an adapter; a reward or value model
        without one is a whole classifier. parents: by role.
        details: any of data, recipe, metrics, licence, build_key, code, packages, for the manifest.
        """
        from baton.registry.publish import publish

        return publish(self, Path(folder), name, kind, base, parents or {}, details or {})

    def materialise(self, version: Version, folder: Path | None = None, replay_probe: bool = False) -> Path:
        """A plain, verified folder of the version: in the cache, or in `folder`, absent or empty."""

        def replay(found: Path, base_folder: Path | None) -> None:
            if replay_probe:
                from baton.registry import probe

                probe.replay(found, base_folder, version.manifest)

        if folder is not None:
            base = self.manifest(version.base) if version.base else None
            return materialise.into_folder(self.store, version.manifest, folder, base, replay)
        found, base_folder = self._cached(version)
        replay(found, base_folder)
        return found

    def merge(self, version: Version, folder: str | Path) -> Path:
        """Merge an adapter, reward or value version into its base, as a plain model in `folder`."""
        from baton.registry.merge import merge

        if version.base is None:
            raise UserError(f"{version.ref} is of kind {version.kind}: nothing to merge. Get it without --merge.")
        adapter, base = self._cached(version)
        assert base is not None
        return merge(self.store, version, adapter, base, Path(folder))

    def promote(self, ref: str, alias: str, reason: str, by: str | None = None) -> dict[str, Any]:
        """Make `alias` mean the version; returns the record, which is the last one if it meant it already."""
        reference.check_alias(alias)
        if not reason.strip():
            raise UserError("a promotion needs a reason: say why this version (--reason TEXT).")
        version = self.resolve(ref)
        history = self.alias_history(version.name, alias)
        if history and history[-1]["to"] == version.number:
            return history[-1]
        folder = records.alias_folder(version.name, alias)
        record = {
            "to": version.number,
            "previous": history[-1]["to"] if history else None,
            "reason": reason,
            "by": by or provenance.user(),
            "time": provenance.now(),
        }
        with full_disk_is_user_error(f"promoting in {self.store.root} failed"):
            if not records.write(self.store, folder, len(history) + 1, record):
                raise UserError(
                    f"someone moved {version.name}:{alias} meanwhile; look again: `baton show {version.name}:{alias}`."
                )
        return record

    def verify(self, version: Version, deep: bool = False) -> list[str]:
        """Problems of a version, its files and all its ancestors; empty when there are none."""
        check = Verification(self)
        found = check.check_manifest(version.digest, version.ref)
        if deep and found:
            check.check_probe(Version(version.name, version.number, version.digest, found))
        return check.problems

    def verify_all(self, deep: bool = False) -> list[str]:
        """Problems of everything in the registry; empty when there are none."""
        check = Verification(self)
        check.check_everything(deep)
        return check.problems

    def lineage(self, version: Version) -> dict[str, Any]:
        """The version with its base, parents and theirs, nested."""
        return lineage(self, version)

    def find_same(self, name: str, content: dict[str, Any]) -> Version | None:
        """The version of `name` with this manifest; its probe's outputs need only agree within tolerance."""
        from baton.registry.probe import largest_difference

        identity = manifests.identity(content)
        for number in reversed(self.numbers(name)):
            try:
                digest = self._digest(name, number)
                if digest not in self._seen:
                    self._seen[digest] = manifests.identity(self.manifest(digest))
                if self._seen[digest] != identity:
                    continue
                version = self._version(name, number)
            except UserError:
                continue  # a damaged version is not the same, and must not stop others from publishing
            probe = version.manifest["probe"]
            if probe["input_ids"] != content["probe"]["input_ids"]:
                continue
            if largest_difference(content["probe"]["expected"], probe) is None:
                return version
        return None

    def _version(self, name: str, number: int) -> Version:
        digest = self._digest(name, number)
        return Version(name, number, digest, self.manifest(digest))

    def _digest(self, name: str, number: int) -> str:
        record = records.read(self.store, records.versions_folder(name), number, "digest")
        return str(record["digest"])

    def _cached(self, version: Version) -> tuple[Path, Path | None]:
        base_folder = None
        if version.base:
            base_folder = materialise.into_cache(self.store, version.base, self.manifest(version.base), None)
        folder = materialise.into_cache(self.store, version.digest, version.manifest, base_folder)
        return folder, base_folder

    def _require_model(self, name: str) -> None:
        reference.check_name(name)
        if not self.numbers(name):
            known = self.models()
            listed = ", ".join(nearest(name, known) or known[:10]) or "none"
            raise UserError(f"{self.store.root} has no model {name!r}; nearest: {listed}.")


def _span(numbers: list[int]) -> str:
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
