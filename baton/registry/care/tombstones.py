"""Deleting a version: a tombstone that keeps its number, so that no other model is ever taken for it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from baton.errors import UserError
from baton.registry import provenance, records
from baton.registry.care.descent import Manifests, descendants
from baton.registry.stores.files import storage_errors_are_user_errors
from baton.registry.version import Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry


@dataclass(frozen=True)
class Deletion:
    """What was deleted and why, and the references of what descends from it, which keeps its files."""

    ref: str
    digest: str
    why: str
    by: str
    time: str
    descendants: list[str]


def delete(registry: "Registry", ref: str, why: str, by: str | None = None) -> Deletion:
    """Delete a version: nobody can resolve it any more, and `baton gc` frees what nothing else needs.

    Raises UserError while an alias means it. What descends from it keeps working. For deletions and promotions of
    one version at the same moment see trust/promotion.py.
    """
    if not why.strip():
        raise UserError("a deletion needs a reason, for whoever asks for this version later (--why TEXT).")
    version = registry.resolve(ref)
    _require_no_alias(registry, version)
    record = {"why": why, "by": by or provenance.user(), "time": provenance.now()}
    folder = records.tombstones_folder(version.name)
    with storage_errors_are_user_errors(f"deleting {version.ref} in {registry.location} failed"):
        if not records.write(registry.store, folder, version.number, record):
            raise UserError(f"{version.ref} was deleted by somebody else meanwhile.")
    try:
        _require_no_alias(registry, version)  # somebody may have promoted it just now
    except UserError:
        registry.store.delete(records.record_path(folder, version.number))
        raise
    return Deletion(version.ref, version.digest, **record, descendants=_descendants(registry, version.digest))


def _require_no_alias(registry: "Registry", version: Version) -> None:
    registry.store.see_latest(f"models/{version.name}/aliases")
    for alias in records.alias_names(registry.store, version.name):
        registry.store.see_latest(records.alias_folder(version.name, alias))
    aliases = [alias for alias, number in registry.aliases(version.name).items() if number == version.number]
    if aliases:
        named = ", ".join(f"{version.name}:{alias}" for alias in aliases)
        moves = "; ".join(f"`baton promote {version.name}:N {alias} --reason TEXT`" for alias in aliases)
        raise UserError(
            f"{version.ref} is what {named} means now, and was not deleted. Make the alias mean another version "
            f"first: {moves}."
        )


def _descendants(registry: "Registry", digest: str) -> list[str]:
    """The references of all versions that have this manifest, or have it among their ancestors."""
    refs = registry.references()
    # Damaged manifests count for none: what they descend from cannot be known.
    parents = Manifests(registry.store).parents(one.removeprefix("sha256:") for one in refs)
    below = descendants(parents, digest.removeprefix("sha256:"))
    return sorted(ref for one in below for ref in refs.get(f"sha256:{one}", []))
