"""Mend a registry from another one that has what is damaged or missing, whole."""

from typing import TYPE_CHECKING

from baton.errors import UserError
from baton.registry import manifest as manifests
from baton.registry import records
from baton.registry.care import layout
from baton.registry.care.fsck import Report, check
from baton.registry.stores import Store
from baton.registry.stores.files import storage_errors_are_user_errors
from baton.registry.trust import attestations

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry


def fsck(registry: "Registry", source: "Registry | None" = None, deep: bool = False) -> Report:
    """Check everything, and with a source mend from it what it can; the report says what is wrong after that."""
    report = check(registry, deep)
    repaired: list[str] = []
    # Round after round: a manifest that is back may show that blobs are missing.
    while source and report.problems:
        mended = _mend(registry, source, list(dict.fromkeys(problem.path for problem in report.problems)))
        mended = [path for path in mended if path not in repaired]
        if not mended:
            break
        repaired += mended
        report = check(registry, deep, report.whole_blobs)
    report.repaired = repaired
    return report


def _mend(registry: "Registry", source: "Registry", paths: list[str]) -> list[str]:
    # The numbers and aliases of another registry say nothing about this one's.
    is_copy = source.id == registry.id
    mended = []
    for path in paths:
        kind, said = layout.place(path)
        try:
            with storage_errors_are_user_errors(f"repairing {registry.location} failed"):
                if kind == "blob":
                    done = _mend_blob(registry.store, source.store, said["digest"], path)
                else:
                    done = _mend_small(registry.store, source.store, kind, said, path, is_copy)
        except FileNotFoundError:
            continue
        if done:
            mended.append(path)
    return mended


def _mend_blob(store: Store, source: Store, sha256: str, path: str) -> bool:
    with store.workspace() as folder:
        if source.fetch_blob(sha256, folder / sha256) != sha256:
            return False
        store.delete(path)  # an object store would take the damaged one's size and mark for the whole one
        store.put_blob(folder / sha256, sha256)
    return True


def _mend_small(store: Store, source: Store, kind: str, said: dict[str, str], path: str, is_copy: bool) -> bool:
    data = source.get(path)
    try:
        if kind == "manifest":
            manifests.parse(data, f"sha256:{said['digest']}", path)
        elif kind == "attestation":
            found = attestations.parse(data, f"sha256:{said['subject']}", path)
            if found.digest != f"sha256:{said['digest']}":
                return False
        elif kind in ("version", "tombstone", "alias", "policy") and is_copy:
            records.unsealed(path, data, path)
        else:
            return False
    except UserError:
        return False
    try:
        if store.get(path) == data:
            return False  # it is as in the source: what is wrong with it is wrong there too
    except FileNotFoundError:
        return store.put_if_absent(path, data)
    # In place: were it deleted first, a publisher could take its number in between.
    store.replace(path, data)
    return True
