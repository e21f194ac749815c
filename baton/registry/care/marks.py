"""What a registry still needs: everything below its versions, its aliases and the leases of running programs."""

import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from baton.errors import UserError
from baton.registry import records
from baton.registry.care import leases, processes
from baton.registry.care.descent import Manifests
from baton.registry.stores import Store

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry


@dataclass
class Live:
    """What must stay (hex digests of manifests and blobs alike), and the leases of programs that have ended."""

    digests: set[str] = field(default_factory=set)
    dead_leases: list[str] = field(default_factory=list)  # paths


def store_clock(store: Store) -> float:
    """The time where the store's files get theirs (seconds since 1970): no clocks of two machines are compared."""
    path = f"tmp/{uuid.uuid4().hex}.clock"
    store.put_if_absent(path, b"")
    entry = store.stat(path)
    store.delete(path)
    assert entry is not None, path
    return entry.modified


class Marks:
    """Reads what is live, as often as it is asked; what never changes is read once."""

    def __init__(self, registry: "Registry", now: float, lease_age_s: float) -> None:
        """now: on the store's clock. lease_age_s: older leases of other machines are dead programs'."""
        self._registry = registry
        self._store = registry.store
        self._now = now
        self._lease_age_s = lease_age_s
        self._leases: dict[str, dict[str, Any]] = {}
        self.manifests = Manifests(registry.store)

    def read(self) -> Live:
        """What is live now; raises UserError when damage makes it impossible to know."""
        before = None
        while True:
            try:
                return self._read()
            except UserError as error:
                # Between two looks a version may have been deleted, or not after all, and been collected by another
                # collector. What a second look finds unchanged is damage.
                if str(error) == before:
                    raise UserError(
                        f"nothing is collected, because damage hides what is still needed: {error} "
                        "`baton fsck` says more, and mends."
                    ) from error
                before = str(error)

    def _read(self) -> Live:
        live = Live()
        # Leases first: a publisher lets go of its own only when its version is recorded.
        held = self._held(live)
        roots = {digest.removeprefix("sha256:") for digest in self._version_roots()}
        live.digests = held | self.manifests.closure(roots, must_exist=True)
        live.digests |= self.manifests.closure(held, must_exist=False)
        return live

    def _version_roots(self) -> set[str]:
        registry, store = self._registry, self._store
        roots: set[str] = set()
        store.see_latest("models")
        for team in store.list("models"):
            store.see_latest(f"models/{team}")
            for model in store.list(f"models/{team}"):
                name = f"{team}/{model}"
                folder = records.tombstones_folder(name)
                for path in (records.versions_folder(name), folder, f"models/{name}/aliases"):
                    store.see_latest(path)
                for alias in records.alias_names(store, name):
                    store.see_latest(records.alias_folder(name, alias))
                # A tombstone is believed only when it is whole.
                deleted = records.read_all(store, folder, registry.deleted_numbers(name), "why")
                found = registry.version_records(name, with_deleted=True)
                aliased = set(registry.aliases(name).values())
                roots |= {r["digest"] for number, r in found.items() if number not in deleted or number in aliased}
        return roots

    def _held(self, live: Live) -> set[str]:
        self._store.see_latest(leases.FOLDER)
        paths = [f"{leases.FOLDER}/{name}" for name in self._store.list(leases.FOLDER)]
        found = self._store.get_many([path for path in paths if path not in self._leases])
        for path, data in found.items():
            try:
                self._leases[path] = records.unsealed(path, data, self._store.describe(path))
            except UserError:
                if not self._is_old(path):
                    raise
                self._leases[path] = {"holds": [], "process": None}
        held: set[str] = set()
        for path in paths:
            if path not in self._leases:
                continue  # released between listing and reading
            record = self._leases[path]
            if processes.is_surely_dead(record.get("process")) or self._is_old(path):
                live.dead_leases.append(path)
            else:
                held.update(record["holds"])
        return held

    def _is_old(self, path: str) -> bool:
        entry = self._store.stat(path)
        return entry is not None and self._now - entry.modified >= self._lease_age_s
