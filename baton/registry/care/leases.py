"""Leases: what running programs use, so that garbage collection leaves it alone.

A publisher says what it is going to need before it looks whether that is there; a collector says what it is going to
delete before it looks who needs it. One of the two always sees the other: the collector spares what is leased, and
the publisher waits until the collector has finished with it. No clocks are compared between machines.
"""

import os
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from baton.registry import manifest as manifests
from baton.registry import provenance
from baton.registry.stores import Store

FOLDER = "leases"
CONDEMNED = "condemned"
DELETING_S = 10.0
"""How long a collector goes on deleting after it has said what; then it must say it anew."""
WAITING_S = 3 * DELETING_S
"""A list of condemned files that is still there after this long belongs to a collector that died."""


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
    """What one program uses. Make it by `lease`, or release it by hand."""

    def __init__(self, store: Store, what: str) -> None:
        """what: for people, such as `publish team/name`."""
        self._store = store
        self._what = what
        self._paths: list[str] = []

    def add(self, holds: Iterable[str]) -> None:
        """Hold more; returns when no collector is about to delete any of it."""
        digests = sorted({digest.removeprefix("sha256:") for digest in holds})
        if not digests:
            return
        path = f"{FOLDER}/{uuid.uuid4().hex}.json"
        record: dict[str, Any] = {
            "what": self._what,
            "holds": digests,
            "by": provenance.user(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": provenance.now(),
        }
        self._store.put_if_absent(path, manifests.canonical(record))
        self._paths.append(path)
        _wait_for_collectors(self._store, set(digests))

    def release(self) -> None:
        """Let go of everything."""
        for path in self._paths:
            self._store.delete(path)
        self._paths = []


def _wait_for_collectors(store: Store, digests: set[str]) -> None:
    begun = time.monotonic()
    while lists := store.list(CONDEMNED):
        found = store.get_many([f"{CONDEMNED}/{name}" for name in lists])
        # The names are the collector's own canonical JSON: a plain search for each digest is exact.
        if not any(digest.encode() in data for data in found.values() for digest in digests):
            return
        if time.monotonic() - begun > WAITING_S:
            return
        time.sleep(0.2)
