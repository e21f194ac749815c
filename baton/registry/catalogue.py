"""The registry as programs see it: open, resolve, publish, materialise, promote, verify."""

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.errors import UserError, nearest
from baton.registry import manifest as manifests
from baton.registry import materialise, records, reference
from baton.registry.care.repair import fsck
from baton.registry.care.verify import Verification
from baton.registry.history.lineage import lineage
from baton.registry.stores import Store, is_url, open_store
from baton.registry.stores.files import storage_errors_are_user_errors
from baton.registry.travel import first_use
from baton.registry.trust import attestations, promotion
from baton.registry.trust.attestations import Attestation
from baton.registry.version import Version

if TYPE_CHECKING:
    from baton.registry.travel import bundle, transfer

FORMAT = "baton.registry/2"
_EARLIER = b'"format":"baton.registry/1"'
_SHOWN_RUNS = 8
_READ_AT_A_TIME = 500


class Registry:
    """A registry in a folder or an object store: `Registry("registry").resolve("team/name:prod").load()`."""

    def __init__(self, location: str | Path, create: bool = False) -> None:
        """location: a folder, or `s3://bucket/prefix`. create: make the registry where there is nothing.

        Raises UserError when there is no registry, or something else.
        """
        self.store: Store
        self.store, self.is_new = _open(location, create)  # is_new: it was made just now
        # Records and manifests never change: what was read once, and was whole, need not be read again.
        self._records: dict[tuple[str, int], dict[str, Any]] = {}
        self._manifests: dict[str, dict[str, Any]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # One rank opens a registry for all: what was read and the store's connections stay behind.
        return Registry, (self.store.describe("").rstrip("/"),)

    @property
    def location(self) -> str:
        """Where it lies, as it was named."""
        return self.store.location

    @property
    def id(self) -> str:
        """32 hex digits that this registry got when it was made."""
        return str(json.loads(self.store.get("registry.json"))["id"])

    def models(self, with_deleted: bool = False) -> list[str]:
        """The names of all models, sorted; with_deleted: those too whose every version was deleted."""
        found = records.listed(self.store)
        return [name for name, model in found.items() if with_deleted or set(model.given) - model.deleted]

    def numbers(self, name: str) -> list[int]:
        """The version numbers of a model, ascending, without those that were deleted and without reading any."""
        deleted = set(self.deleted_numbers(name))
        return [number for number in self.all_numbers(name) if number not in deleted]

    def all_numbers(self, name: str) -> list[int]:
        """The version numbers that were ever given, ascending: a number is never used again."""
        return records.numbers(self.store, records.versions_folder(name))

    def deleted_numbers(self, name: str) -> list[int]:
        """The numbers of the versions that were deleted, ascending."""
        return records.numbers(self.store, records.tombstones_folder(name))

    def versions(self, name: str) -> list[Version]:
        """All versions of a model, oldest first."""
        self._require_model(name)
        found = self.version_records(name)
        return [Version(name, number, record["digest"], self) for number, record in found.items()]

    def version_records(self, name: str, with_deleted: bool = False) -> dict[int, dict[str, Any]]:
        """The records of a model's versions by number: `{number, digest, kind, identity, by, time, nonce}`."""
        numbers = self.all_numbers(name) if with_deleted else self.numbers(name)
        unread = [number for number in numbers if (name, number) not in self._records]
        found = records.read_all(self.store, records.versions_folder(name), unread, "digest")
        self._records |= {(name, number): record for number, record in found.items()}
        return {number: self._records[name, number] for number in numbers}

    def every_record(self, with_deleted: bool = False) -> Iterator[tuple[str, int, dict[str, Any], bool]]:
        """(name, number, version record, whether it was deleted) of all models, sorted; reads as it goes on."""
        found = [
            (name, number, number in model.deleted)
            for name, model in records.listed(self.store).items()
            for number in model.given
            if with_deleted or number not in model.deleted
        ]
        for start in range(0, len(found), _READ_AT_A_TIME):
            some = found[start : start + _READ_AT_A_TIME]
            unread = [one[:2] for one in some if one[:2] not in self._records]
            self._records |= records.read_versions(self.store, unread)
            # One that is missing or damaged is refused when it is its turn.
            yield from ((name, number, self._record(name, number), is_deleted) for name, number, is_deleted in some)

    def aliases(self, name: str) -> dict[str, int]:
        """Each alias of a model with the version number that it means now; none that means nothing any more."""
        found = {}
        for alias in records.alias_names(self.store, name):
            folder = records.alias_folder(name, alias)
            if moves := records.numbers(self.store, folder):
                found[alias] = records.read(self.store, folder, moves[-1], "to")["to"]
        return {alias: number for alias, number in found.items() if number is not None}

    def alias_history(self, name: str, alias: str) -> list[dict[str, Any]]:
        """Every move of an alias that is there, oldest first: `{to, previous, reason, by, time, …}`."""
        reference.check_alias(alias)
        folder = records.alias_folder(name, alias)
        return list(records.read_all(self.store, folder, records.numbers(self.store, folder), "to").values())

    def resolve(self, ref: str) -> Version:
        """The version that a reference means now; raises UserError with near names, aliases or numbers."""
        parsed = reference.parse(ref)
        if parsed.number is not None:
            return self._by_number(parsed.name, parsed.number)
        if parsed.digest is not None:
            self._require_model(parsed.name)
            for number, record in self.version_records(parsed.name).items():
                if record["digest"] == parsed.digest:
                    return Version(parsed.name, number, parsed.digest, self)
            for number, record in self.version_records(parsed.name, with_deleted=True).items():
                if record["digest"] == parsed.digest:
                    raise UserError(self._deleted(parsed.name, number))
            raise UserError(f"no version of {parsed.name} has the digest {parsed.digest}.")
        assert parsed.alias is not None
        folder = records.alias_folder(parsed.name, parsed.alias)
        moves = records.numbers(self.store, folder)
        means: int | None = records.read(self.store, folder, moves[-1], "to")["to"] if moves else None
        if means is None:
            self._require_model(parsed.name)
            aliases = self.aliases(parsed.name)
            known = nearest(parsed.alias, list(aliases)) or sorted(aliases)[:10]
            listed = ", ".join(f"{parsed.name}:{alias}" for alias in known) or "none"
            raise UserError(
                f"{parsed.name} has no alias {parsed.alias!r}; aliases: {listed}; "
                f"versions: {_span(self.numbers(parsed.name))}."
            )
        return self._by_number(parsed.name, means)

    def by_digest(self, digest: str) -> Version:
        """A version with this manifest digest, the first by name and number; a deleted one when there is no other."""
        deleted: Version | None = None
        for name, number, record, is_deleted in self.every_record(with_deleted=True):
            if record["digest"] == digest:
                version = Version(name, number, digest, self)
                if not is_deleted:
                    return version
                deleted = deleted or version
        if deleted:
            return deleted
        raise UserError(f"no version in {self.location} has the digest {digest}.")

    def manifest(self, digest: str) -> dict[str, Any]:
        """The manifest with this digest, verified; raises UserError when it is missing or damaged."""
        if digest not in self._manifests:
            self._manifests[digest] = self.read_manifest(digest)
        return self._manifests[digest]

    def read_manifest(self, digest: str) -> dict[str, Any]:
        """As `manifest`, but from the store even if it was read before."""
        path = manifests.manifest_path(digest)
        try:
            data = self.store.get(path)
        except FileNotFoundError as error:
            raise UserError(
                f"{self.store.describe(path)} is missing. Copy it from a backup or the registry that has it."
            ) from error
        return manifests.parse(data, digest, self.store.describe(path))

    def references(self) -> dict[str, list[str]]:
        """Every manifest digest with the references that have it."""
        found: dict[str, list[str]] = {}
        for name, number, record, _ in self.every_record():
            found.setdefault(record["digest"], []).append(f"{name}:{number}")
        return found

    def publish(
        self,
        folder: str | Path,
        *,
        name: str,
        kind: str,
        base: Version | str | None = None,
        parents: Mapping[str, Version | str] | None = None,
        details: dict[str, Any] | None = None,
        allow_code: bool = False,
        allowed_licences: list[str] | None = None,
    ) -> Version:
        """Publish a folder written by save_pretrained; the same content again gives the version that exists.

        kind: base, adapter, reward, value or merged. base: of an adapter; a reward or value model
        without one is a whole classifier. parents: by role. Both as versions or as references.
        details: any of data, recipe, metrics, licence, build_key, code, packages, for the manifest.
        allow_code: publish although `auto_map` makes loading run Python files of the folder.
        allowed_licences: SPDX identifiers; another licence of it, its ancestors or its data is refused.
        """
        from baton.registry.publish import publish
        from baton.registry.trust import policy

        allowed = policy.allowed_licences(self, allowed_licences)
        found = {role: self._version_of(parent) for role, parent in (parents or {}).items()}
        on = None if base is None else self._version_of(base)
        return publish(self, Path(folder), name, kind, on, found, details or {}, allow_code, allowed)

    def materialise(self, version: Version, folder: Path | None = None, replay_probe: bool = False) -> Path:
        """A plain, verified folder of the version: in the cache, or in `folder`, absent or empty."""
        self._check_policy(version)

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

    def base_folder(self, version: Version) -> Path:
        """The cached folder of the base that an adapter is put on, or of the version, when it loads by itself.

        The base is held against the policy too; without one no name of it, which takes a search, is needed.
        """
        if self._has_policy():
            for one in [version, *([self.by_digest(version.base)] if version.base else [])]:
                self._check_policy(one)
        folder, base_folder = self._cached(version)
        return base_folder or folder

    def merge(self, version: Version, folder: str | Path) -> Path:
        """Merge an adapter, reward or value version into its base, as a plain model in `folder`."""
        from baton.registry.merge import merge

        if version.base is None:
            raise UserError(f"{version.ref} is of kind {version.kind}: nothing to merge. Get it without --merge.")
        self._check_policy(version)
        adapter, base = self._cached(version)
        assert base is not None
        return merge(self.store, version, adapter, base, Path(folder))

    def promote(
        self, ref: str, alias: str, reason: str, by: str | None = None, gate: Path | None = None
    ) -> dict[str, Any]:
        """Make `alias` mean the version, if the gates hold; returns the record, the last one if it meant it already."""
        return promotion.promote(self, ref, alias, reason, by, gate)

    def rollback(self, target: str, reason: str, by: str | None = None) -> dict[str, Any]:
        """Make `team/name:alias` mean what it meant before its last promotion; returns the record."""
        return promotion.rollback(self, target, reason, by)

    def push(self, version: Version, target: "Registry", allow_code: bool = False) -> "transfer.Report":
        """Copy a version and its ancestors to another registry, verified; only what is missing there moves."""
        from baton.registry.travel import transfer

        return transfer.push(self, version, target, allow_code=allow_code)

    def pull(self, source: "Registry", ref: str, allow_code: bool = False) -> "transfer.Report":
        """Copy a version of another registry, and its ancestors, into this one."""
        from baton.registry.travel import transfer

        return transfer.pull(self, source, ref, allow_code=allow_code)

    def export(self, version: Version, file: str | Path, without: Sequence[Version] = ()) -> "bundle.Exported":
        """Write a version and its ancestors, but those of `without`, into one file: the same bytes every time."""
        from baton.registry.travel import bundle

        return bundle.export(self, version, Path(file), without)

    def import_bundle(self, file: str | Path, allow_code: bool = False) -> list[Version]:
        """Register what a bundle holds, once all of it is verified; the last version is the one that was exported."""
        from baton.registry.travel import bundle

        return bundle.import_bundle(self, Path(file), allow_code=allow_code)

    def attestations(self, version: Version, kind: str | None = None) -> list[Attestation]:
        """What was said of a version since it was published, oldest first; kind: evaluation, approval, …"""
        return attestations.of(self, version.digest, kind)

    def verify(self, version: Version, deep: bool = False) -> list[str]:
        """Problems of a version, its files and all its ancestors; empty when there are none."""
        from baton.registry.trust import policy

        check = Verification(self)
        if check.check_manifest(version.digest, version.ref) and deep:
            check.check_probe(version)
        return list(dict.fromkeys([*check.problems, *policy.problems(self, version)]))

    def verify_all(self, deep: bool = False) -> list[str]:
        """Problems of everything in the registry; empty when there are none."""
        return [str(problem) for problem in fsck(self, deep=deep).problems]

    def lineage(self, version: Version) -> dict[str, Any]:
        """The version with its base, parents and theirs, nested."""
        return lineage(self, version)

    def find_same(self, name: str, content: dict[str, Any]) -> Version | None:
        """The version of `name` with this manifest; its probe's outputs need only agree within tolerance."""
        from baton.registry.probe import largest_difference

        identity = manifests.identity(content)
        numbers = self.numbers(name)
        unread = [number for number in numbers if (name, number) not in self._records]
        # A damaged version is not the same, and must not stop others from publishing.
        sound = records.read_sound(self.store, records.versions_folder(name), unread, "digest")
        self._records |= {(name, number): record for number, record in sound.items()}
        for number in reversed(numbers):
            record = self._records.get((name, number), {})
            if record.get("identity") != identity:
                continue
            try:
                version = Version(name, number, record["digest"], self)
                probe = version.manifest["probe"]
            except UserError:
                continue
            if probe["input_ids"] != content["probe"]["input_ids"]:
                continue
            if largest_difference(content["probe"]["expected"], probe) is None:
                return version
        return None

    def _record(self, name: str, number: int) -> dict[str, Any]:
        if (name, number) not in self._records:
            found = records.read(self.store, records.versions_folder(name), number, "digest")
            self._records[name, number] = found
        return self._records[name, number]

    def _version_of(self, given: Version | str) -> Version:
        return self.resolve(given) if isinstance(given, str) else given

    def _by_number(self, name: str, number: int) -> Version:
        if self.store.exists(records.record_path(records.tombstones_folder(name), number)):
            raise UserError(self._deleted(name, number))
        path = records.record_path(records.versions_folder(name), number)
        if (name, number) not in self._records and not self.store.exists(path):
            self._require_model(name)
            raise UserError(f"{name} has no version {number}; versions: {_span(self.numbers(name))}.")
        return Version(name, number, self._record(name, number)["digest"], self)

    def _deleted(self, name: str, number: int) -> str:
        record = records.read(self.store, records.tombstones_folder(name), number, "why")
        left = _span(self.numbers(name)) if self.numbers(name) else "none"
        return f"{name}:{number} was deleted by {record.get('by')}: {record['why']}. Versions left: {left}."

    def _cached(self, version: Version) -> tuple[Path, Path | None]:
        base_folder = None
        if version.base:
            base_folder = materialise.into_cache(self.store, version.base, self.manifest(version.base), None)
        folder = materialise.into_cache(self.store, version.digest, version.manifest, base_folder)
        first_use.prove_once(self, version, folder, base_folder)
        return folder, base_folder

    def _has_policy(self) -> bool:
        return bool(self.store.list("policies")) or "BATON_POLICY" in os.environ

    def _check_policy(self, version: Version) -> None:
        # Reading a policy takes pydantic: only where there is one, so that a second look at a version is instant.
        if self._has_policy():
            from baton.registry.trust import policy

            policy.check_loading(self, version)

    def _require_model(self, name: str) -> None:
        reference.check_name(name)
        if not self.numbers(name):
            known = self.models()
            listed = ", ".join(nearest(name, known) or known[:10]) or "none"
            raise UserError(f"{self.location} has no model {name!r}; nearest: {listed}.")


def _open(location: str | Path, create: bool) -> tuple[Store, bool]:
    store, is_new = open_store(location), False
    folder = Path(location).expanduser()
    with storage_errors_are_user_errors(f"opening the registry {location} failed"):
        if not is_url(str(location)) and folder.exists() and not folder.is_dir():
            raise UserError(f"{location} is not a registry but a file; name a folder.")
    names = store.list("")
    if "registry.json" not in names:
        if set(names) - {"tmp"}:  # tmp/ alone: another process is just making it
            raise UserError(
                f"{location} is not a registry: it holds files but no registry.json. Name another folder, "
                "or an empty one to make a registry there."
            )
        if not create:
            raise UserError(f"there is no registry at {location}. Publishing there makes one; or name another.")
        with storage_errors_are_user_errors(f"making the registry {location} failed"):
            store.require_conditional_writes()
            made = records.sealed("registry.json", {"format": FORMAT, "id": uuid.uuid4().hex})
            is_new = store.put_if_absent("registry.json", made)
    data = store.get("registry.json")
    if _EARLIER in data:
        raise UserError(
            f"{location} was made by an earlier Baton, whose records carried no digests; this one reads {FORMAT!r}. "
            "Get its models with the Baton that made it, and publish them in a new registry."
        )
    try:
        found = records.unsealed("registry.json", data, store.describe("registry.json"))["format"]
    except (UserError, KeyError) as error:
        raise UserError(f"{location} is not a registry: its registry.json is damaged ({error}). Restore it.") from error
    if found != FORMAT:
        raise UserError(f"{location} has registry format {found!r}; this Baton reads {FORMAT!r}. Update Baton.")
    return store, is_new


def _span(numbers: list[int]) -> str:
    """`1, 3 to 7, 9`: each run of numbers by its ends; of many runs the last ones."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    texts = [f"{run[0]} to {run[1]}" if len(run) == 2 else f"{run[0]}" for run in runs]
    return ", ".join(texts if len(texts) <= _SHOWN_RUNS else ["…", *texts[-_SHOWN_RUNS:]])
