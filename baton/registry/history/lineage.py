"""Lineage: a version's base and parents, and theirs, as one nested dict."""

from typing import TYPE_CHECKING, Any

from baton.registry.version import Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry


def lineage(registry: "Registry", version: Version) -> dict[str, Any]:
    """`{ref, digest, kind, licence, data, metrics, parents: {role: the same}}`; the base has role `base`.

    An ancestor known under several references is shown by the first by name and number; `ref` is None for one
    without any.
    """
    return _node(registry, version.digest, registry.references(), version.ref)


def _node(registry: "Registry", digest: str, references: dict[str, list[str]], ref: str | None) -> dict[str, Any]:
    manifest = registry.manifest(digest)
    ancestors = dict(manifest["parents"])
    # A parent that is also the base is shown once, under the role that its publisher gave it.
    if manifest["base"] and manifest["base"] not in ancestors.values():
        ancestors = {"base": manifest["base"], **ancestors}
    return {
        "ref": ref or next(iter(references.get(digest, [])), None),
        "digest": digest,
        "kind": manifest["kind"],
        "licence": manifest["licence"],
        "data": manifest["data"],
        "metrics": manifest["metrics"],
        # A manifest names its parents by digest, so that it cannot be its own ancestor: this ends.
        "parents": {role: _node(registry, parent, references, None) for role, parent in ancestors.items()},
    }
