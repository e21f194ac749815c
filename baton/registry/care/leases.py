"""Leases: what running programs use, so that garbage collection leaves it alone.

A publisher says what it is going to need before it looks whether that is there; a collector says what it is going to
delete before it looks who needs it. One of the two always sees the other: the collector spares what is leased, and
the publisher waits until the collector has finished with it. A collector reads leases before versions, since a
publisher lets go only after its version is recorded. Ages are taken on the store's clock alone.
"""

import logging
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from baton.errors import UserError
from baton.registry import provenance, records
from baton.registry.care import processes
from baton.registry.stores import Entry, Store

FOLDER = "leases"
CONDEMNED = "condemned"
DELETING_S = 10.0
"""How long a collector goes on deleting after it has said what; then it must say it anew."""
WAITING_S = 3 * DELETING_S
"""Who has waited this long for a collector takes its list away, which stops it if it still lives."""
IN_FLIGHT_S = 2.0
"""After its list has been taken away, a collector may still be at the one file that it was just deleting."""
RENEWED_S = 6 * 3600.0
"""A lease is written anew this often, so that one from another machine is dead when it has long not been."""
DEAD_AFTER_S = 24 * 3600.0
"""A lease or work in progress of another machine is not taken for dead before this."""

_log = logging.getLogger(__name__)


@contextmanager
def lease(store: Store, what: str, holds: Iterable[str]) -> Iterator["Lease"]:
    """Keep manifests and blobs (hex digests or `sha256:<hex>`) from being collected while the block runs."""
    held = Lease(store, what)
    try:
        held.add(holds)
        yield held
    finally:
        held.release()


class Lease:
    """What one program uses, a manifest with all that it needs. Make it by `lease`, or release it by hand."""

    def __init__(self, store: Store, what: str) -> None:
        """what: for people, such as `publish team/name`."""
        self._store = store
        self._what = what
        self._paths: list[str] = []
        self._held: set[str] = set()
        self._changing = threading.Lock()
        self._released: threading.Event | None = None

    def add(self, holds: Iterable[str]) -> None:
        """Hold more; returns when no collector is about to delete any of it."""
        digests = {digest.removeprefix("sha256:") for digest in holds} - self._held
        if not digests:
            return
        with self._changing:
            self._paths.append(self._write(digests))
            self._held |= digests
        if self._released is None:
            self._released = threading.Event()
            threading.Thread(target=self._keep_alive, args=(self._released,), daemon=True).start()
        _wait_for_collectors(self._store, digests)
        # What a collector of another machine deleted a moment ago must not seem to be there.
        for folder in ("blobs/sha256", "manifests/sha256"):
            self._store.see_latest(folder)

    def release(self) -> None:
        """Let go of everything."""
        if self._released is not None:
            self._released.set()
            self._released = None
        with self._changing:
            self._held = set()
            self._remove()

    def renew(self) -> None:
        """Write it anew; a thread does so every few hours."""
        with self._changing:
            if self._held:
                new = self._write(self._held)
                self._remove()
                self._paths = [new]

    def _write(self, digests: set[str]) -> str:
        path = f"{FOLDER}/{uuid.uuid4().hex}.json"
        record: dict[str, Any] = {"what": self._what, "holds": sorted(digests), **_signed()}
        self._store.put_if_absent(path, records.sealed(path, record))
        return path

    def _remove(self) -> None:
        for path in self._paths:
            try:
                self._store.delete(path)
            except (OSError, UserError) as error:
                # What it was held for is done: a lease that stays is collected when this process has ended.
                _log.warning("could not remove %s: %s", self._store.describe(path), error)
        self._paths = []

    def _keep_alive(self, released: threading.Event) -> None:
        while not released.wait(RENEWED_S):
            try:
                self.renew()
            except (OSError, UserError) as error:
                _log.warning("could not renew the lease of %s: %s", self._what, error)


def condemn(store: Store, digests: Iterable[str]) -> str:
    """Say what a collector is going to delete (hex digests); returns the list's path, which it must delete after."""
    path = f"{CONDEMNED}/{uuid.uuid4().hex}.json"
    store.put_if_absent(path, records.sealed(path, {"condemned": sorted(digests), **_signed()}))
    return path


def _signed() -> dict[str, Any]:
    return {"by": provenance.user(), "time": provenance.now(), "process": processes.this_process()}


def _wait_for_collectors(store: Store, digests: set[str]) -> None:
    begun = time.monotonic()
    store.see_latest(CONDEMNED)
    while lists := [f"{CONDEMNED}/{name}" for name in store.list(CONDEMNED)]:
        found = store.get_many(lists)
        ours = [path for path, data in found.items() if _threatens(path, data, digests)]
        if not ours:
            return
        if time.monotonic() - begun > WAITING_S:
            for path in ours:
                store.delete(path)
            time.sleep(IN_FLIGHT_S)
            return
        time.sleep(0.2)


def _threatens(path: str, data: bytes, digests: set[str]) -> bool:
    # A plain search for each digest is exact, and works on a list that is damaged too.
    if not any(digest.encode() in data for digest in digests):
        return False
    try:
        return not processes.is_surely_dead(records.unsealed(path, data, path).get("process"))
    except UserError:
        return True


def is_left_behind(store: Store, entry: Entry, before: float) -> bool:
    """Whether a list of the condemned belongs to a collector that died, or is older than `before`."""
    if entry.modified <= before:
        return True
    try:
        return processes.is_surely_dead(records.unsealed(entry.path, store.get(entry.path), entry.path).get("process"))
    except (FileNotFoundError, UserError):
        return False
