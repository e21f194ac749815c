"""The graph of a version's ancestors, as a picture (SVG) or a page with its metrics (HTML), for people."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from baton.registry.history.lineage import ancestry
from baton.registry.history.names import aliases_of, first_names
from baton.registry.version import Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry

_FIRST = ("accuracy", "reward_accuracy", "win_rate", "reward", "loss", "kl_nats")  # what a stage is judged by
_LAST = ("seconds", "parameters", "published_step")  # of little interest in a picture


@dataclass(frozen=True)
class Node:
    """One version; `name` is its reference, or its digest where it has none."""

    digest: str
    name: str
    kind: str
    licence: str | None
    aliases: tuple[str, ...]
    metrics: dict[str, Any]
    data: tuple[str, ...]  # a line a source
    by: str | None
    time: str | None
    is_deleted: bool


@dataclass(frozen=True)
class Edge:
    """`parent` was used as each of `roles` when `child` was made."""

    parent: str
    child: str
    roles: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """A version (`subject`, its digest) with all its ancestors, itself first."""

    subject: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


def graph(registry: "Registry", version: Version) -> Graph:
    """The version and everything that it was made from."""
    manifests = ancestry(registry, version.digest)
    names = first_names(registry, set(manifests) - {version.digest})
    names |= first_names(registry, [version.digest])
    refs = {digest: named.ref for digest, named in names.items()} | {version.digest: version.ref}
    aliases = aliases_of(registry, refs.values())
    nodes = []
    edges = []
    for digest, manifest in manifests.items():
        named = names.get(digest)
        nodes.append(
            Node(
                digest,
                refs.get(digest, digest),
                manifest["kind"],
                manifest["licence"],
                tuple(aliases.get(refs.get(digest, ""), [])),
                manifest["metrics"],
                tuple(source_line(row) for row in manifest["data"]),
                named.by if named else None,
                named.time if named else None,
                named.is_deleted if named else False,
            )
        )
        roles: dict[str, list[str]] = {}
        for role, parent in manifest["parents"].items():
            roles.setdefault(parent, []).append(role)
        if manifest["base"] and "base" not in roles.setdefault(manifest["base"], []):
            roles[manifest["base"]].append("base")
        edges += [Edge(parent, digest, tuple(used)) for parent, used in roles.items()]
    return Graph(version.digest, tuple(nodes), tuple(edges))


def to_svg(graph: Graph, links: dict[str, str] | None = None) -> str:
    """One self-contained SVG document; links: digest -> address that the node's box leads to."""
    from baton.registry.history.svg import draw_svg

    return draw_svg(graph, links or {})


def to_html(graph: Graph, title: str) -> str:
    """One self-contained HTML page: the picture, and tables of the metrics and of where each version comes from."""
    from baton.registry.history.graph_page import draw_page

    return draw_page(graph, title)


def source_line(row: Any) -> str:
    """A data source in a line: its path, use, rows (or bytes, where none were counted) and licence."""
    facts = row if isinstance(row, dict) else {}
    parts = [str(facts.get("path") or "a source without a name")]
    if facts.get("use"):
        parts.append(f"({facts['use']})")
    if isinstance(facts.get("slice"), list):
        start, stop = [*facts["slice"], None, None][:2]
        parts.append(f"rows {start or 0} to {'the end' if stop is None else stop}")
    elif type(facts.get("rows")) is int:
        parts.append(f"{facts['rows']:,} rows")
    elif type(facts.get("size")) is int:
        parts.append(f"{facts['size']:,} bytes")
    parts.append(str(facts.get("licence") or "licence unknown"))
    return "  ".join(parts)


def numbers_of(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics that are numbers, the ones that a picture should show first."""
    found = {
        key: value
        for key, value in metrics.items()
        if type(value) is int or (type(value) is float and math.isfinite(value))
    }
    return dict(sorted(found.items(), key=lambda item: (_rank(item[0]), item[0])))


def number(value: float) -> str:
    """A metric's value in few characters."""
    return f"{value:,}" if type(value) is int and abs(value) < 10**12 else f"{value:.4g}"


def _rank(key: str) -> int:
    last = key.rpartition("/")[2]
    if last in _FIRST:
        return _FIRST.index(last)
    if key in _LAST:
        return len(_FIRST) + 3
    if key.endswith("_before"):
        return len(_FIRST) + 2
    return len(_FIRST) + (not key.startswith("eval/"))
