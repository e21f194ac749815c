"""What a manifest is called: the versions that have a digest, who published them, and the aliases that mean them."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry


class Named(NamedTuple):
    """A version of a manifest: its reference, who published it and when, and whether it was deleted since."""

    ref: str
    by: str | None
    time: str | None
    is_deleted: bool


def first_names(registry: "Registry", digests: Iterable[str]) -> dict[str, Named]:
    """Each manifest's first version by name and number; a deleted one where there is no other.

    Manifests without a version are left out. Reads only as many records as it takes.
    """
    wanted = set(digests)
    found: dict[str, Named] = {}
    for with_deleted in (False, True):
        for digest, named in _each(registry, with_deleted):
            if digest in wanted and digest not in found:
                found[digest] = named
                if len(found) == len(wanted):
                    return found
    return found


def all_names(registry: "Registry") -> dict[str, list[Named]]:
    """Every manifest that ever was a version, with all its versions, those that are left first."""
    found: dict[str, list[Named]] = {}
    for digest, named in _each(registry, with_deleted=True):
        found.setdefault(digest, []).append(named)
    return {digest: sorted(names, key=lambda named: named.is_deleted) for digest, names in found.items()}


def aliases_of(registry: "Registry", refs: Iterable[str]) -> dict[str, list[str]]:
    """Each reference `team/name:7` with the aliases that mean it now, sorted."""
    wanted: dict[str, list[str]] = {ref: [] for ref in refs}
    for name in sorted({ref.rpartition(":")[0] for ref in wanted}):
        for alias, number in registry.aliases(name).items():
            if f"{name}:{number}" in wanted:
                wanted[f"{name}:{number}"].append(alias)
    return wanted


def _each(registry: "Registry", with_deleted: bool) -> Iterator[tuple[str, Named]]:
    for name, number, record, is_deleted in registry.every_record(with_deleted):
        by, time = _text(record, "by"), _text(record, "time")
        yield record["digest"], Named(f"{name}:{number}", by, time, is_deleted)


def _text(record: dict[str, Any], field: str) -> str | None:
    return str(record[field]) if record.get(field) is not None else None
