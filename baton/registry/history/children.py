"""Children: everything that descends from a version, which is what a bad base would have spoilt."""

from typing import TYPE_CHECKING, Any, NamedTuple

from baton.errors import UserError
from baton.registry import manifest as manifests
from baton.registry.history.lineage import ancestors
from baton.registry.history.names import Named, aliases_of, all_names
from baton.registry.version import Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry


class Child(NamedTuple):
    """A descendant. roles: what the version, or a descendant of it, is to this one; depth: 1 for a direct child."""

    ref: str
    digest: str
    kind: str
    roles: tuple[str, ...]
    depth: int
    refs: tuple[str, ...]  # every version with this content; `ref` is the first
    aliases: tuple[str, ...]  # `team/name:prod` that mean one of them now
    is_deleted: bool  # all its versions are


class Survey(NamedTuple):
    """The descendants that were found, and what could not be read: there may be others behind it."""

    children: list[Child]
    unreadable: list[str]


def children(registry: "Registry", version: Version) -> list[Child]:
    """Every descendant by base or parent, the nearest first, then by reference; raises UserError on damage."""
    found = survey(registry, version)
    if found.unreadable:
        raise UserError("\n".join(found.unreadable))
    return found.children


def survey(registry: "Registry", version: Version) -> Survey:
    """As `children`, but damage elsewhere does not hide what is known."""
    names = all_names(registry)
    collected = {digest for digest, named in names.items() if all(one.is_deleted for one in named)}
    found, unreadable = _read(registry, list(names), collected)
    depths = _depths(version.digest, found)
    refs = [named.ref for digest in depths for named in names.get(digest, [])]
    aliases = aliases_of(registry, refs)
    described = [
        _child(digest, depth, found[digest], names[digest], depths, aliases)
        for digest, depth in depths.items()
        if depth and digest in names
    ]
    return Survey(sorted(described, key=lambda child: (child.depth, child.ref)), unreadable)


def _read(
    registry: "Registry", digests: list[str], may_be_gone: set[str]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The manifests of `digests` and of all their ancestors, whether these are versions or not.

    may_be_gone: those of deleted versions, which garbage collection takes away once nothing descends from them.
    """
    found: dict[str, dict[str, Any]] = {}
    unreadable: list[str] = []
    asked: set[str] = set()
    while digests:
        asked.update(digests)
        paths = {manifests.manifest_path(digest): digest for digest in digests}
        stored = registry.store.get_many(list(paths))
        for path, digest in paths.items():
            where = registry.store.describe(path)
            if path not in stored and digest in may_be_gone:
                continue
            try:
                if path not in stored:
                    raise UserError(f"{where} is missing. Copy it from a backup or the registry that has it.")
                found[digest] = manifests.parse(stored[path], digest, where)
            except UserError as error:
                unreadable.append(str(error))
        made_of = {parent for digest in digests if digest in found for parent in ancestors(found[digest]).values()}
        digests = sorted(made_of - asked)
    return found, unreadable


def _depths(root: str, found: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Digest -> steps from `root` to each descendant, 0 for itself, nearest first."""
    made_of: dict[str, list[str]] = {}
    for digest, manifest in found.items():
        for parent in ancestors(manifest).values():
            made_of.setdefault(parent, []).append(digest)
    depths = {root: 0}
    waiting = [root]
    while waiting:
        parent = waiting.pop(0)
        for digest in made_of.get(parent, []):
            if digest not in depths:
                depths[digest] = depths[parent] + 1
                waiting.append(digest)
    return depths


def _child(
    digest: str,
    depth: int,
    manifest: dict[str, Any],
    names: list[Named],
    depths: dict[str, int],
    aliases: dict[str, list[str]],
) -> Child:
    roles = [role for role, parent in manifest["parents"].items() if parent in depths]
    if manifest["base"] in depths:
        roles = ["base", *(role for role in roles if role != "base")]
    meant = [f"{named.ref.rpartition(':')[0]}:{alias}" for named in names for alias in aliases[named.ref]]
    refs = tuple(named.ref for named in names)
    return Child(names[0].ref, digest, manifest["kind"], tuple(roles), depth, refs, tuple(meant), names[0].is_deleted)
