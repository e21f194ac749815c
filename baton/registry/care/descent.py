"""What manifests need, what they descend from and what descends from them, read many at a time."""

from collections.abc import Iterable
from dataclasses import dataclass

from baton.errors import UserError
from baton.registry import manifest as manifests
from baton.registry.stores import Store
from baton.registry.travel.closure import parents_of


@dataclass(frozen=True)
class Needs:
    """What one manifest needs, as hex digests."""

    parents: list[str]
    blobs: list[str]


class Manifests:
    """Manifests of a store by hex digest; each is read once, since it never changes."""

    def __init__(self, store: Store) -> None:
        """store: the registry's."""
        self._store = store
        self._needs: dict[str, Needs] = {}

    def closure(self, roots: Iterable[str], must_exist: bool) -> set[str]:
        """The digests of these manifests, all their ancestors and all their files.

        must_exist: raise UserError where one is missing or damaged; else what cannot be read needs nothing.
        """
        seen: set[str] = set()
        blobs: set[str] = set()
        pending = set(roots)
        while pending:
            self._load(pending, must_exist)
            seen |= pending
            found = [self._needs[digest] for digest in pending if digest in self._needs]
            for needs in found:
                blobs.update(needs.blobs)
            pending = {parent for needs in found for parent in needs.parents} - seen
        return seen | blobs

    def parents(self, roots: Iterable[str]) -> dict[str, list[str]]:
        """These manifests and all their ancestors, each with its parents; one that cannot be read has none."""
        seen: dict[str, list[str]] = {}
        pending = set(roots)
        while pending:
            self._load(pending, must_exist=False)
            seen |= {digest: self._needs[digest].parents if digest in self._needs else [] for digest in pending}
            pending = {parent for digest in pending for parent in seen[digest]} - seen.keys()
        return seen

    def _load(self, digests: set[str], must_exist: bool) -> None:
        wanted = {digest: manifests.manifest_path(digest) for digest in digests if digest not in self._needs}
        found = self._store.get_many(list(wanted.values()))
        for digest, path in wanted.items():
            try:
                if path not in found:
                    raise UserError(f"{self._store.describe(path)} is missing.")
                content = manifests.parse(found[path], f"sha256:{digest}", self._store.describe(path))
            except UserError:
                if must_exist:
                    raise
                continue
            parents = [parent.removeprefix("sha256:") for parent in parents_of(content)]
            self._needs[digest] = Needs(parents, [entry["sha256"] for entry in content["files"]])


def descendants(parents: dict[str, list[str]], digest: str) -> set[str]:
    """The digest itself and all that descend from it, given each manifest's parents."""
    children: dict[str, list[str]] = {}
    for child, its_parents in parents.items():
        for parent in its_parents:
            children.setdefault(parent, []).append(child)
    found: set[str] = set()
    pending = [digest]
    while pending:
        current = pending.pop()
        if current not in found:
            found.add(current)
            pending += children.get(current, [])
    return found
