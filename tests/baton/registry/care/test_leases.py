"""Leases: written before anything is looked up, renewed while they last, gone at the end whatever happens."""

import os
import time
from pathlib import Path

import pytest

from baton.errors import UserError
from baton.registry import Registry, records
from baton.registry.care import leases
from baton.registry.stores import Store

DIGEST = "a" * 64


def held(store: Store) -> list[list[str]]:
    paths = [f"leases/{name}" for name in store.list("leases")]
    return [records.unsealed(path, store.get(path), path)["holds"] for path in paths]


def test_it_holds_what_it_was_told_to(registry: Registry) -> None:
    store = registry.store
    with pytest.raises(ZeroDivisionError), leases.lease(store, "x", [f"sha256:{DIGEST}", DIGEST]) as lease:
        assert held(store) == [[DIGEST]]
        lease.add([DIGEST])  # held already
        lease.add(["b" * 64])
        assert sorted(held(store)) == [[DIGEST], ["b" * 64]]
        lease.renew()
        assert held(store) == [[DIGEST, "b" * 64]]
        _ = 1 / 0
    assert held(store) == []
    lease.renew()  # as the thread might, just then
    assert held(store) == []
    with leases.lease(store, "nothing", []):
        assert held(store) == []


def test_it_is_renewed_while_it_lasts(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    store = registry.store
    monkeypatch.setattr(leases, "RENEWED_S", 0.02)
    with leases.lease(store, "x", [DIGEST]):
        first = store.list("leases")
        until = time.monotonic() + 20
        while set(store.list("leases")) & set(first):
            assert time.monotonic() < until
            time.sleep(0.01)
    time.sleep(0.05)
    assert held(store) == []


def test_a_lease_that_cannot_be_removed_does_no_harm(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = registry.store

    def unreachable(path: str) -> None:
        raise UserError("cannot be reached")

    with leases.lease(store, "x", [DIGEST]):
        monkeypatch.setattr(store, "delete", unreachable)
    assert len(held(store)) == 1 and "cannot be reached" in caplog.text


def test_a_folder_is_touched_before_it_is_relied_upon(folder_registry: Registry) -> None:
    """An NFS client that remembers a listing forgets it when the folder changes."""
    store = folder_registry.store
    store.put_if_absent("leases/x", b"")
    folder = Path(folder_registry.location) / "leases"
    os.utime(folder, (1, 1))
    store.see_latest("leases")
    assert folder.stat().st_mtime > 1
    store.see_latest("absent")
    assert store.list("absent") == []
