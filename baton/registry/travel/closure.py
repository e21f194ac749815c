"""A version with everything that it needs: its ancestors' manifests, and the names that they go by."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from baton.errors import UserError
from baton.registry.version import Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry


class Named(NamedTuple):
    """A manifest with the name and number that it has in the registry it comes from, and who published it there."""

    digest: str
    name: str
    number: int
    by: str

    @property
    def ref(self) -> str:
        """`team/name:7`, over there."""
        return f"{self.name}:{self.number}"


def closure(registry: "Registry", version: Version) -> list[str]:
    """The digests of a version and all its ancestors, ancestors first; raises UserError when one is missing."""
    return list(manifests_below(version.digest, registry.manifest))


def manifests_below(digest: str, read: Callable[[str], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Manifests by digest, ancestors first, in an order that depends on them alone."""
    found: dict[str, dict[str, Any]] = {}
    opened: dict[str, dict[str, Any]] = {}
    # Not by recursion: a chain of a thousand fine-tunings is deeper than Python's stack.
    pending = [digest]
    while pending:
        current = pending[-1]
        if current in found:
            pending.pop()
        elif current in opened:
            found[current] = opened[current]
            pending.pop()
        else:
            opened[current] = read(current)
            # A manifest names its ancestors by digest, so that none is its own: this ends.
            pending += [parent for parent in reversed(parents_of(opened[current])) if parent not in found]
    return found


def parents_of(manifest: dict[str, Any]) -> list[str]:
    """The digests of a manifest's base and parents, once each, in a fixed order."""
    base = [manifest["base"]] if manifest["base"] else []
    return list(dict.fromkeys([*base, *(digest for _, digest in sorted(manifest["parents"].items()))]))


def blobs_of(manifests: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The files of some manifests by hex digest, each once: `{path, sha256, size}`."""
    found: dict[str, dict[str, Any]] = {}
    for manifest in manifests:
        for entry in manifest["files"]:
            first = found.setdefault(entry["sha256"], entry)
            if first["size"] != entry["size"]:
                raise UserError(
                    f"manifests disagree on the size of the blob {entry['sha256']}: {first['path']} has "
                    f"{first['size']} bytes, {entry['path']} {entry['size']}. One of them was made up."
                )
    return found


def names_of(registry: "Registry", digests: Iterable[str]) -> dict[str, Named]:
    """The first name and number of each manifest that has one; a deleted one's where there is no other."""
    wanted = set(digests)
    found: dict[str, Named] = {}
    for with_deleted in (False, True):
        for name in registry.models(with_deleted):
            if wanted <= found.keys():
                return found
            try:
                records = registry.version_records(name, with_deleted)
            except UserError:
                continue  # a damaged record of another model is no reason to keep this one here
            for number, record in records.items():
                if record["digest"] in wanted:
                    found.setdefault(record["digest"], Named(record["digest"], name, number, str(record.get("by"))))
    return found
