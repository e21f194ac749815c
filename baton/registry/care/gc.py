"""Garbage collection: delete what no version, alias or running program needs. For the protocol see leases.py."""

import graphlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from baton.errors import UserError
from baton.registry import failpoints
from baton.registry.care import leases
from baton.registry.care.marks import Live, Marks, store_clock
from baton.registry.stores import Entry, Store

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry

BATCH_FILES = 1000
_FRUITLESS_ROUNDS = 3


@dataclass(frozen=True)
class Item:
    """A file to delete, and the hex digest of the manifest or blob with which it stays or goes."""

    entry: Entry
    digest: str

    @property
    def kind(self) -> str:
        """manifest, attestation or blob."""
        return self.entry.path.partition("/")[0].removesuffix("s")


@dataclass
class Report:
    """What was deleted, or would be."""

    dry_run: bool
    deleted: list[Entry] = field(default_factory=list)
    num_young: int = 0  # files that nothing needs, left because they are younger than was asked
    num_spared: int = 0  # files that a program began to use while they were being collected
    uploads: list[str] = field(default_factory=list)  # paths of blobs whose uploads nobody went on with
    not_seen: str | None = None  # why unfinished uploads could not be looked for

    @property
    def num_bytes(self) -> int:
        """Bytes of all deleted files."""
        return sum(entry.size for entry in self.deleted)

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Files and bytes by the folder that they lay in: blobs, manifests, attestations, leases, condemned, tmp."""
        found: dict[str, tuple[int, int]] = {}
        for entry in self.deleted:
            files, size = found.get(kind := entry.path.partition("/")[0], (0, 0))
            found[kind] = (files + 1, size + entry.size)
        return found


def collect(registry: "Registry", older_than_s: float, dry_run: bool = False) -> Report:
    """Delete what nothing needs and is at least this old; raises UserError when damage hides what is needed.

    Versions are kept until they are deleted (tombstones.py), and their ancestors as long as something descends from
    them. Records of versions, deletions, aliases and policies are never collected. Uploads to an object store that
    nobody finished are given up after a day, however little `older_than_s` is: somebody may still be at them.
    """
    store = registry.store
    now = time.time() if dry_run else store_clock(store)
    patience_s = max(older_than_s, leases.DEAD_AFTER_S)
    marks = Marks(registry, now, patience_s)
    live = marks.read()
    if not dry_run:
        failpoints.step("gc", "1-marked")
    report = Report(dry_run)
    items = _condemnable(store, marks, live, now - older_than_s, report)
    if dry_run:
        report.deleted += [item.entry for item in items]
    else:
        for start in range(0, len(items), BATCH_FILES):
            _delete(store, marks, items[start : start + BATCH_FILES], report)
    for entry in _leftovers(store, live, now - patience_s):
        if not dry_run:
            store.delete(entry.path)
        report.deleted.append(entry)
    try:
        report.uploads += store.abort_unfinished(patience_s, dry_run)
    except UserError as error:
        # Listing uploads takes a permission of its own, and not every store can: what was collected is collected.
        report.not_seen = str(error)
    if not dry_run:
        failpoints.step("gc", "5-finished")
    return report


def _condemnable(store: Store, marks: Marks, live: Live, before: float, report: Report) -> list[Item]:
    """What nothing needs and was written before then: manifests, descendants first, then blobs.

    Whatever is killed on the way, no manifest is left whose ancestors or files are gone and that was whole.
    """
    stored = {_digest_of(entry): entry for entry in store.walk("manifests/sha256")}
    said: dict[str, list[Entry]] = {}
    for entry in store.walk("attestations"):
        said.setdefault(entry.path.split("/")[1], []).append(entry)
    unneeded = stored.keys() - live.digests
    young = {digest for digest in unneeded if _newest([stored[digest], *said.get(digest, [])]) > before}
    kept = live.digests | marks.manifests.closure(young, must_exist=False)
    dead = unneeded - kept
    parents = marks.manifests.parents(dead)
    graph = {digest: [parent for parent in parents[digest] if parent in dead] for digest in sorted(dead)}
    items: list[Item] = []
    for digest in reversed(list(graphlib.TopologicalSorter(graph).static_order())):
        items += [Item(entry, digest) for entry in [*said.get(digest, []), stored[digest]]]
    # What was said of a manifest that is gone; one that is about to come is leased, or younger.
    orphaned = sorted(said.keys() - stored.keys() - kept)
    items += [Item(entry, digest) for digest in orphaned for entry in said[digest] if entry.modified <= before]
    for entry in store.walk("blobs/sha256"):
        if _digest_of(entry) not in kept:
            if entry.modified <= before:
                items.append(Item(entry, _digest_of(entry)))
            else:
                young.add(_digest_of(entry))
    report.num_young = len(young)
    return items


def _delete(store: Store, marks: Marks, items: list[Item], report: Report) -> None:
    """Condemn, look again who needs it, delete: in rounds, so that nobody waits long for a file."""
    fruitless = 0
    while items:
        path = leases.condemn(store, {item.digest for item in items})
        try:
            failpoints.step("gc", "2-condemned")
            live = marks.read()
            wanted = [item for item in items if item.digest in live.digests]
            report.num_spared += len(wanted)
            items = [item for item in items if item.digest not in live.digests]
            until = time.monotonic() + leases.DELETING_S
            num_before = len(items)
            while items and time.monotonic() < until and _stands(store, path):
                item = items.pop(0)
                store.delete(item.entry.path)
                report.deleted.append(item.entry)
                if item.kind != "attestation":
                    failpoints.step("gc", "3-manifest-deleted" if item.kind == "manifest" else "4-blob-deleted")
        finally:
            store.delete(path)
        fruitless = fruitless + 1 if len(items) == num_before else 0
        if items and fruitless == _FRUITLESS_ROUNDS:
            raise UserError(
                f"reading {store.location} takes longer than publishers wait, who have stopped the collection "
                f"{fruitless} times; {len(items)} files are left. Collect when less is published."
            )


def _stands(store: Store, path: str) -> bool:
    """Whether the list of the condemned is still there: a publisher who has waited too long takes it away."""
    store.see_latest(leases.CONDEMNED)
    return store.exists(path)


def _leftovers(store: Store, live: Live, before: float) -> list[Entry]:
    """Leases of programs that have ended, and what killed programs left: lists of the condemned, work in progress."""
    found = [entry for path in live.dead_leases if (entry := store.stat(path))]
    found += [entry for entry in store.walk(leases.CONDEMNED) if leases.is_left_behind(store, entry, before)]
    for name in store.list("tmp"):
        work = list(store.walk(f"tmp/{name}"))
        if file := store.stat(f"tmp/{name}"):
            work = [file]
        if work and _newest(work) <= before:
            found += work
    return found


def _newest(entries: list[Entry]) -> float:
    return max(entry.modified for entry in entries)


def _digest_of(entry: Entry) -> str:
    return entry.path.rpartition("/")[2].removesuffix(".json")
