"""What differs between two versions: how they were made, what they measured, and how far their weights lie apart."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from baton.registry.history.names import first_names
from baton.registry.manifest import storable
from baton.registry.version import Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry
    from baton.registry.history.weights_diff import Change, WeightsDifference

SECTIONS = ("version", "recipe", "data", "packages", "metrics", "licences", "architecture", "files")


class Entry(NamedTuple):
    """A key whose value differs. change: "changed", "added" (only B has it) or "removed" (only A has it)."""

    key: str
    change: str
    before: Any
    after: Any

    @property
    def difference(self) -> float | None:
        """B minus A, for two numbers."""
        numbers = [value for value in (self.before, self.after) if type(value) in (int, float)]
        return numbers[1] - numbers[0] if self.change == "changed" and len(numbers) == 2 else None


@dataclass(frozen=True)
class Difference:
    """Version `a` against version `b`; sections without differences are empty."""

    a: str
    b: str
    sections: dict[str, list[Entry]] = field(default_factory=dict)  # by `SECTIONS`
    weights: "WeightsDifference | None" = None  # None: not compared

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON's types."""
        found: dict[str, Any] = {"a": self.a, "b": self.b}
        for section, entries in self.sections.items():
            found[section] = [_entry_json(entry) for entry in entries]
        found["weights"] = _weights_json(self.weights) if self.weights else None
        return found


def diff(registry: "Registry", a: Version, b: Version, with_weights: bool = True) -> Difference:
    """Compare two versions of one registry; with_weights: their weights too, for which both are materialised."""
    ours, theirs = a.manifest, b.manifest
    names = _names(registry, ours, theirs)
    views = {
        "version": (_made_from(ours, names), _made_from(theirs, names)),
        "recipe": (ours["recipe"], theirs["recipe"]),
        "data": (_sources(ours["data"]), _sources(theirs["data"])),
        "packages": (
            ours["packages"] | {f"code.{key}": value for key, value in ours["code"].items()},
            theirs["packages"] | {f"code.{key}": value for key, value in theirs["code"].items()},
        ),
        "metrics": (ours["metrics"], theirs["metrics"]),
        "licences": (_licences(ours), _licences(theirs)),
        "architecture": (_architecture(ours), _architecture(theirs)),
        "files": (_files(ours), _files(theirs)),
    }
    assert set(views) == set(SECTIONS)
    sections = {section: _entries(*views[section]) for section in SECTIONS}
    weights = None
    if with_weights:
        from baton.registry.history.weights_diff import weights_difference

        weights = weights_difference(registry, a, b)
    return Difference(a.ref, b.ref, sections, weights)


def _entries(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[Entry]:
    """The keys that differ, nested ones dotted; a key that is null says no more than one that is not there."""
    found = []
    for key in sorted({key for side in (ours, theirs) for key, value in side.items() if value is not None}):
        before, after, name = ours.get(key), theirs.get(key), f"{prefix}{key}"
        sections = _as_section(before), _as_section(after)
        if sections[0] and sections[1]:
            found += _entries(sections[0], sections[1], f"{name}.")
        elif after is None:
            found.append(Entry(name, "changed" if key in theirs else "removed", before, None))
        elif before is None:
            found.append(Entry(name, "changed" if key in ours else "added", None, after))
        elif before != after or type(before) is not type(after):
            found.append(Entry(name, "changed", before, after))
    return found


def _as_section(value: Any) -> dict[str, Any] | None:
    """Sections, and lists of sections by position; None for every other value."""
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return {str(at): item for at, item in enumerate(value)}
    return None


def _sources(data: list[Any]) -> dict[str, Any]:
    """`use path` -> the source's other facts; a source that occurs again is counted."""
    found: dict[str, Any] = {}
    seen: dict[str, int] = {}
    for row in data:
        facts = row if isinstance(row, dict) else {"path": row}
        name = f"{facts.get('use') or 'data'} {facts.get('path')}"
        seen[name] = seen.get(name, 0) + 1
        name += f" #{seen[name]}" if seen[name] > 1 else ""
        found[name] = {key: value for key, value in facts.items() if key not in ("use", "path") and value is not None}
    return found


def _names(registry: "Registry", *manifests: dict[str, Any]) -> dict[str, str]:
    used = {digest for manifest in manifests for digest in [*manifest["parents"].values(), manifest["base"]] if digest}
    return {digest: named.ref for digest, named in first_names(registry, used).items()}


def _made_from(manifest: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    found = {f"parent {role}": digest for role, digest in manifest["parents"].items()}
    found |= {"base": manifest["base"], "kind": manifest["kind"]}
    return {key: names.get(value, value) for key, value in found.items()}


def _licences(manifest: dict[str, Any]) -> dict[str, Any]:
    inherited = {f"of {kind}": entries for kind, entries in manifest["licences"].items()}
    return {"licence": manifest["licence"], **inherited}


def _architecture(manifest: dict[str, Any]) -> dict[str, Any]:
    keys = ("vocabulary", "dtype", "tokenizer_digest", "chat_template_digest")
    return manifest["architecture"] | {key: manifest[key] for key in keys}


def _files(manifest: dict[str, Any]) -> dict[str, Any]:
    return {entry["path"]: f"{entry['sha256'][:12]}… {entry['size']:,} bytes" for entry in manifest["files"]}


def _entry_json(entry: Entry) -> dict[str, Any]:
    found = {"key": entry.key, "change": entry.change, "before": entry.before, "after": entry.after}
    return found | ({} if entry.difference is None else {"difference": storable(entry.difference)})


def _weights_json(weights: "WeightsDifference") -> dict[str, Any]:
    def change(of: "Change") -> dict[str, Any]:
        norms = {"difference": of.difference, "norm_a": of.before, "norm_b": of.after}
        # storable: a norm that is not finite has no spelling in JSON
        return {"name": of.name, "num_parameters": of.num_parameters, "relative": of.relative, **storable(norms)}

    return {
        "compared": weights.compared,
        "total": change(weights.total),
        "groups": [change(group) for group in weights.groups],
        "tensors": [change(tensor) for tensor in weights.tensors],
        "only_a": weights.only_a,
        "only_b": weights.only_b,
        "shapes": [{"name": name, "a": list(a), "b": list(b)} for name, a, b in weights.shapes],
        "notes": weights.notes,
    }
