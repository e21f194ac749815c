"""Lineage: a version's base and parents, and theirs, as one nested dict."""

from typing import TYPE_CHECKING, Any

from baton.registry.history.names import Named, first_names
from baton.registry.version import Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry


def lineage(registry: "Registry", version: Version) -> dict[str, Any]:
    """A node `{ref, digest, kind, …, parents: {role: node}}`; a base that is no parent has the role `base`.

    A node also has `is_deleted`, `by` and `time` (of its publishing), `licence`, `licences` (with all inherited ones),
    `data`, `recipe` and `metrics`. An ancestor known under several references is shown by the first by name and
    number; `ref` is None for one without any. One that occurs again, reading from top to bottom, has `is_above` set and
    no parents of its own.
    """
    manifests = ancestry(registry, version.digest)
    names = first_names(registry, set(manifests) - {version.digest})
    record = registry.version_records(version.name, with_deleted=True)[version.number]
    is_deleted = version.number in registry.deleted_numbers(version.name)
    names[version.digest] = Named(version.ref, record.get("by"), record.get("time"), is_deleted)
    return _node(version.digest, manifests, names, set())


def ancestry(registry: "Registry", digest: str) -> dict[str, dict[str, Any]]:
    """The manifests of a version and all its ancestors by digest, the version's own first."""
    found: dict[str, dict[str, Any]] = {}
    waiting = [digest]
    while waiting:
        digest = waiting.pop(0)
        if digest not in found:
            found[digest] = registry.manifest(digest)
            waiting += ancestors(found[digest]).values()
    return found


def ancestors(manifest: dict[str, Any]) -> dict[str, str]:
    """Role -> digest of what a manifest was made from: its parents, and its base as `base` where it is none of them."""
    parents: dict[str, str] = manifest["parents"]
    if manifest["base"] and manifest["base"] not in parents.values():
        # A parent that is called so, and is another version, keeps its name.
        return {"base" if "base" not in parents else "base (loaded on)": manifest["base"], **parents}
    return dict(parents)


def _node(
    digest: str, manifests: dict[str, dict[str, Any]], names: dict[str, Named], shown: set[str]
) -> dict[str, Any]:
    manifest = manifests[digest]
    named = names.get(digest, Named(None, None, None, False))  # type: ignore[arg-type]
    is_above = digest in shown
    shown.add(digest)
    # A manifest names its parents by digest, so that it cannot be its own ancestor: this ends.
    above = {} if is_above else ancestors(manifest)
    return {
        "ref": named.ref,
        "digest": digest,
        "kind": manifest["kind"],
        "is_deleted": named.is_deleted,
        "is_above": is_above,
        "by": named.by,
        "time": named.time,
        "licence": manifest["licence"],
        "licences": manifest["licences"],
        "data": manifest["data"],
        "recipe": manifest["recipe"],
        "metrics": manifest["metrics"],
        "parents": {role: _node(parent, manifests, names, shown) for role, parent in above.items()},
    }
