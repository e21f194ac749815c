"""Check a whole registry: every file of it, what is damaged and what depends on that."""

import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from baton.errors import UserError
from baton.registry import manifest as manifests
from baton.registry import records
from baton.registry.care import layout
from baton.registry.care.descent import descendants
from baton.registry.stores import Entry, Store, blob_path
from baton.registry.travel.closure import parents_of
from baton.registry.trust import attestations
from baton.registry.version import KINDS, WHOLE_KINDS, Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry

_READ_AT_A_TIME = 500
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_TEXT, _COUNT = (str,), (int,)
_RECORD_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "version": {"number": _COUNT, "digest": _TEXT, "kind": _TEXT, "identity": _TEXT, "by": _TEXT, "time": _TEXT},
    "tombstone": {"why": _TEXT, "by": _TEXT, "time": _TEXT},
    "alias": {"to": (int, type(None)), "previous": (int, type(None)), "reason": _TEXT, "by": _TEXT, "time": _TEXT},
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the file, what is wrong with it, and the references that depend on it."""

    path: str
    message: str
    dependants: list[str]

    def __str__(self) -> str:
        """The message with what depends on it."""
        return f"{self.message} Depending on it: {', '.join(self.dependants)}." if self.dependants else self.message


@dataclass
class Report:
    """What a check found."""

    problems: list[Problem] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)  # paths
    num_files: dict[str, int] = field(default_factory=dict)  # by kind
    num_orphans: int = 0  # files that no version needs: no damage; `gc` collects them
    orphan_bytes: int = 0
    whole_blobs: set[str] = field(default_factory=set)


class _Facts(NamedTuple):
    """What the check keeps of a manifest."""

    kind: str
    identity: str
    base: str | None
    parents: list[str]
    files: list[tuple[str, str, int]]  # (hex digest, path, bytes)


def check(registry: "Registry", deep: bool = False, known_whole: Iterable[str] = ()) -> Report:
    """Check everything; deep: replay every version's probe as well. known_whole: blobs that need not be read again."""
    return _Check(registry, set(known_whole)).run(deep)


class _Check:
    """One pass over a registry."""

    def __init__(self, registry: "Registry", known_whole: set[str]) -> None:
        self.registry = registry
        self.store: Store = registry.store
        self.report = Report(whole_blobs=known_whole)
        self.found: list[tuple[str, str]] = []  # (path, message)
        self.missed: set[str] = set()  # paths of manifests and blobs that were not there
        self.stored: dict[str, dict[str, Entry]] = {}  # by kind and path
        self.manifests: dict[str, _Facts | None] = {}  # by hex digest; None: damaged
        self.versions: dict[str, dict[int, dict[str, Any]]] = {}
        self.deleted: dict[str, set[int]] = {}
        self.aliases: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}

    def run(self, deep: bool) -> Report:
        """Everything, in the order in which one thing explains another."""
        for entry in self.store.walk(""):
            kind, _ = layout.place(entry.path)
            self.stored.setdefault(kind, {})[entry.path] = entry
        self.report.num_files = {kind: len(entries) for kind, entries in sorted(self.stored.items())}
        for path in self.stored.get("stray", {}):
            folder, _, name = path.rpartition("/")
            self._add(path, f"{self.store.describe(folder)}: {name!r} is not a record, nor another file of a registry")
        self._read("manifest", self._check_manifest)
        for kind in _RECORD_FIELDS:
            self._read(kind, self._check_record)
        for kind in ("registry", "policy", "lease", "condemned"):
            self._read(kind, self._check_sealed)
        self._read("attestation", self._check_attestation)
        self._check_gaps("policies", self._numbers("policy", "policies/"))
        for name in sorted(self.versions.keys() | self.deleted.keys() | self.aliases.keys()):
            self._check_model(name)
        needed = self._check_ancestors()
        self._check_blobs(needed)
        self._count_orphans(needed)
        if deep:
            self._replay_probes()
        self._forget_collected()
        self.report.problems = [Problem(path, message, self._dependants(path)) for path, message in self.found]
        return self.report

    def _add(self, path: str, message: str) -> None:
        self.found.append((path, message.rstrip(".") + "."))

    def _read(self, kind: str, examine: Callable[[str, bytes], None]) -> None:
        paths = list(self.stored.get(kind, {}))
        for start in range(0, len(paths), _READ_AT_A_TIME):
            for path, data in self.store.get_many(paths[start : start + _READ_AT_A_TIME]).items():
                try:
                    examine(path, data)
                except UserError as error:
                    self._add(path, str(error))

    def _check_manifest(self, path: str, data: bytes) -> None:
        digest = layout.place(path)[1]["digest"]
        self.manifests[digest] = None
        content = manifests.parse(data, f"sha256:{digest}", self.store.describe(path))
        parents = [parent.removeprefix("sha256:") for parent in parents_of(content)]
        files = [(entry["sha256"], entry["path"], entry["size"]) for entry in content["files"]]
        base = content["base"].removeprefix("sha256:") if content["base"] else None
        self.manifests[digest] = _Facts(content["kind"], manifests.identity(content), base, parents, files)

    def _check_sealed(self, path: str, data: bytes) -> None:
        records.unsealed(path, data, self.store.describe(path))

    def _check_record(self, path: str, data: bytes) -> None:
        kind, said = layout.place(path)
        name, number = said["name"], int(said["number"])
        if kind == "tombstone":  # deleted all the same: what it says of why is lost, not that it is
            self.deleted.setdefault(name, set()).add(number)
        elif kind == "alias":
            self.aliases.setdefault(name, {}).setdefault(said["alias"], {})
        else:
            self.versions.setdefault(name, {})
        where = self.store.describe(path)
        record = records.unsealed(path, data, where)
        for key, types in _RECORD_FIELDS[kind].items():
            if type(record.get(key)) not in types:
                raise UserError(f"{where} is damaged: {key} is {record.get(key)!r}.")
        if kind == "alias":
            self.aliases[name][said["alias"]][number] = record
        if kind == "version":
            if record["number"] != number:
                raise UserError(f"{where} is damaged: it is the record of number {record['number']}.")
            if not _DIGEST.fullmatch(record["digest"]) or record["kind"] not in KINDS:
                raise UserError(f"{where} is damaged: digest {record['digest']!r}, kind {record['kind']!r}.")
            self.versions[name][number] = record

    def _check_attestation(self, path: str, data: bytes) -> None:
        said = layout.place(path)[1]
        where = self.store.describe(path)
        parsed = attestations.parse(data, f"sha256:{said['subject']}", where)
        if parsed.digest != f"sha256:{said['digest']}":
            raise UserError(f"{where} is damaged: expected sha256:{said['digest']}, found {parsed.digest}.")

    def _numbers(self, kind: str, prefix: str) -> list[int]:
        return [int(path[-12:-5]) for path in self.stored.get(kind, {}) if path.startswith(prefix)]

    def _check_gaps(self, folder: str, numbers: Iterable[int]) -> None:
        present = set(numbers)
        for number in sorted(set(range(1, max(present, default=0) + 1)) - present):
            path = records.record_path(folder, number)
            self._add(path, f"{self.store.describe(path)} is missing")

    def _check_model(self, name: str) -> None:
        folder = records.versions_folder(name)
        versions, deleted = self.versions.get(name, {}), self.deleted.get(name, set())
        # A tombstone proves that there was a version, should the last ones have been lost.
        present = set(self._numbers("version", f"{folder}/"))
        for number in sorted({*range(1, max(present | deleted, default=0) + 1)} - present):
            path = records.record_path(folder, number)
            self._add(path, f"{self.store.describe(path)} is missing")
        for number, record in versions.items():
            facts = self.manifests.get(record["digest"].removeprefix("sha256:"))
            said = (record["kind"], record["identity"])
            if facts and said != (facts.kind, facts.identity):
                path = records.record_path(folder, number)
                self._add(
                    path,
                    f"{self.store.describe(path)} is damaged: it says {' '.join(said)}, "
                    f"the manifest {record['digest']} is {facts.kind} {facts.identity}",
                )
        for alias, moves in self.aliases.get(name, {}).items():
            self._check_alias(name, alias, moves, present)

    def _check_alias(self, name: str, alias: str, moves: dict[int, dict[str, Any]], versions: set[int]) -> None:
        folder = records.alias_folder(name, alias)
        numbers = self._numbers("alias", f"{folder}/")
        self._check_gaps(folder, numbers)
        for number, record in sorted(moves.items()):
            path = records.record_path(folder, number)
            if record["to"] is not None and record["to"] not in versions:
                self._add(path, f"{name}:{alias}, record {number}: no version {record['to']}")
            before = moves.get(number - 1, {}).get("to")
            if (number == 1 or number - 1 in moves) and record["previous"] != before:
                self._add(
                    path,
                    f"{name}:{alias}, record {number}: says it replaced {record['previous']}, but {before} was there",
                )
        last = moves.get(max(numbers, default=0))
        if last and last["to"] in self.deleted.get(name, set()) and self._means(name, alias, last["to"]):
            path = records.record_path(folder, max(numbers))
            self._add(
                path,
                f"{name}:{alias} means {name}:{last['to']}, which was deleted. Make it mean another version: "
                f"`baton promote {name}:N {alias} --reason TEXT`",
            )

    def _means(self, name: str, alias: str, number: int) -> bool:
        """Whether an alias means this version now: it may have been moved before the version was deleted."""
        try:
            return self.registry.aliases(name).get(alias) == number
        except UserError:
            return True

    def _forget_collected(self) -> None:
        """Take back what was missed and only a version needed that has been deleted since its model was listed."""
        if not self.missed:
            return
        for name in self.versions:
            deleted = set(self.registry.deleted_numbers(name))
            self.deleted[name] = self.deleted.get(name, set()) | deleted
        self.__dict__.pop("_live", None)
        needed: set[str] = set()
        pending = list(self._live)
        while pending:
            digest = pending.pop()
            if digest not in needed and (facts := self.manifests.get(digest)):
                needed.update(sha256 for sha256, _, _ in facts.files)
                pending += facts.parents
            needed.add(digest)
        self.found = [
            (path, message)
            for path, message in self.found
            if path not in self.missed or layout.place(path)[1]["digest"] in needed
        ]

    @cached_property
    def _live(self) -> dict[str, list[str]]:
        """The hex digests of manifests that versions mean, with their references; once all records are read."""
        live: dict[str, list[str]] = {}
        for name, versions in self.versions.items():
            for number, record in versions.items():
                if number not in self.deleted.get(name, set()):
                    live.setdefault(record["digest"].removeprefix("sha256:"), []).append(f"{name}:{number}")
        return live

    def _check_ancestors(self) -> set[str]:
        """That every version's manifest and ancestors are there; returns the hex digests of what versions need."""
        roles = {digest: refs[0] for digest, refs in self._live.items()}
        needed: set[str] = set()
        pending = list(roles)
        while pending:
            digest = pending.pop()
            if digest in needed:
                continue
            needed.add(digest)
            path = manifests.manifest_path(digest)
            if digest not in self.manifests:
                try:
                    # It may have been written after its folder was listed.
                    self._check_manifest(path, self.store.get(path))
                except FileNotFoundError:
                    self.missed.add(path)
                    self._add(path, f"{roles[digest]}: {self.store.describe(path)} is missing")
                except UserError as error:
                    self._add(path, f"{roles[digest]}: {error}")
            if facts := self.manifests.get(digest):
                needed.update(sha256 for sha256, _, _ in facts.files)
                for parent in facts.parents:
                    roles.setdefault(parent, f"an ancestor of {roles[digest]}")
                pending += facts.parents
                base = self.manifests.get(facts.base or "")
                if base and base.kind not in WHOLE_KINDS:
                    self._add(path, f"{roles[digest]}: its base sha256:{facts.base} is of kind {base.kind}")
        return needed

    def _check_blobs(self, needed: set[str]) -> None:
        named = self._files_by_blob()
        stored = {layout.place(path)[1]["digest"] for path in self.stored.get("blob", {})}
        wanted = sorted((stored | (needed & named.keys())) - self.report.whole_blobs)
        # Two at a time even on one core: while one is hashed, another is read.
        with ThreadPoolExecutor(min(8, max(2, os.cpu_count() or 1))) as pool:
            for sha256, found in zip(wanted, pool.map(self._hash, wanted), strict=True):
                path = blob_path(sha256)
                where, files = self.store.describe(path), named.get(sha256, [])
                of = f" ({files[0][0]} of {self._name_of(files[0][2])})" if files else ""
                if found is None:
                    if sha256 in needed:
                        self.missed.add(path)
                        self._add(path, f"{where} is missing{of}")
                elif found[0] != sha256:
                    self._add(path, f"{where} is damaged: expected sha256:{sha256}, found sha256:{found[0]}{of}")
                else:
                    self.report.whole_blobs.add(sha256)
                    for file, size, digest in files:
                        if size != found[1]:
                            self._add(
                                manifests.manifest_path(digest),
                                f"{self._name_of(digest)} says that {file} has {size} bytes; {where} has {found[1]}",
                            )

    def _hash(self, sha256: str) -> tuple[str, int] | None:
        try:
            return self.store.hash_blob(sha256)
        except FileNotFoundError:
            return None

    def _files_by_blob(self) -> dict[str, list[tuple[str, int, str]]]:
        """By hex digest of a blob: path and size of the file in a manifest, and that manifest's digest."""
        found: dict[str, list[tuple[str, int, str]]] = {}
        for digest, facts in self.manifests.items():
            for sha256, path, size in facts.files if facts else ():
                found.setdefault(sha256, []).append((path, size, digest))
        return found

    def _name_of(self, digest: str) -> str:
        return self._live.get(digest, [f"the manifest sha256:{digest}"])[0]

    def _count_orphans(self, needed: set[str]) -> None:
        for kind in ("manifest", "blob"):
            for path, entry in self.stored.get(kind, {}).items():
                if layout.place(path)[1]["digest"] not in needed:
                    self._count_orphan(entry)
        for path, entry in self.stored.get("attestation", {}).items():
            subject = layout.place(path)[1]["subject"]
            # Of a manifest that is gone; were it needed, it would be missed.
            if subject not in self.manifests and subject not in needed:
                self._count_orphan(entry)

    def _count_orphan(self, entry: Entry) -> None:
        self.report.num_orphans += 1
        self.report.orphan_bytes += entry.size

    def _replay_probes(self) -> None:
        for digest, refs in sorted(self._live.items()):
            name, _, number = refs[0].rpartition(":")
            try:
                version = Version(name, int(number), f"sha256:{digest}", self.registry)
                self.registry.materialise(version, replay_probe=True)
            except UserError as error:
                self._add(manifests.manifest_path(digest), f"{refs[0]}: {error}")

    def _dependants(self, path: str) -> list[str]:
        """The references that cannot be had, or not trusted, while this file is wrong."""
        kind, said = layout.place(path)
        if kind == "registry":
            return ["the whole registry"]
        if kind in ("tombstone", "version"):
            return self._with_aliases({f"{said['name']}:{int(said['number'])}"})
        if kind == "alias":
            return [f"{said['name']}:{said['alias']}"]
        digests: set[str] = set()
        if kind == "attestation":
            digests = {said["subject"]}
        elif kind in ("manifest", "blob"):
            parents = {digest: facts.parents if facts else [] for digest, facts in self.manifests.items()}
            for digest in [said["digest"]] if kind == "manifest" else self._users(said["digest"]):
                digests |= descendants(parents, digest)
        live = self._live
        return self._with_aliases({ref for digest in digests for ref in live.get(digest, [])})

    def _users(self, sha256: str) -> list[str]:
        named = self._files_by_blob().get(sha256, [])
        return [digest for _, _, digest in named]

    def _with_aliases(self, refs: set[str]) -> list[str]:
        found = sorted(refs)
        for name, aliases in sorted(self.aliases.items()):
            for alias, moves in sorted(aliases.items()):
                if moves and f"{name}:{moves[max(moves)]['to']}" in refs:
                    found.append(f"{name}:{alias}")
        return found
