"""Lineage, differences and descendants as lines of text; what others wrote cannot steer the terminal."""

import json
from collections.abc import Sequence
from typing import Any

from baton.registry.history.children import Child
from baton.registry.history.diff import SECTIONS, Difference, Entry
from baton.registry.history.graph import numbers_of, source_line
from baton.registry.history.licences import spelling
from baton.registry.history.plain import cells, plain
from baton.registry.manifest import canonical, digest_of

_MOST_METRICS = 8
_BAR = 24
_MOST_GROUPS = 40


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Aligned columns, two spaces apart; the last one is not padded."""
    texts = [[plain("–" if value is None else str(value)) for value in row] for row in rows]
    widths = [max(map(cells, column)) for column in zip(heads, *texts, strict=True)]
    return [_padded(row, widths) for row in [heads, *texts]]


def _padded(row: Sequence[str], widths: Sequence[int]) -> str:
    parts = [text + " " * (width - cells(text)) for text, width in zip(row, widths, strict=True)]
    return "  ".join(parts).rstrip()


def facts(values: dict[str, Any]) -> list[str]:
    """`key  value` lines; a value of several lines is indented below itself, others than text are JSON."""
    width = max(map(len, values))
    lines = []
    for key, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for at, line in enumerate(text.split("\n")):
            lines.append(f"{key if not at else '':<{width}}  {plain(line)}".rstrip())
    return lines


def tree_lines(tree: dict[str, Any]) -> list[str]:
    """The lineage as a tree: a version a branch, with its facts below its name."""
    return _branch(tree, "", "", "")


def _branch(node: dict[str, Any], role: str, first: str, rest: str) -> list[str]:
    """Lines of a node: the first one begins with `first`, the others with `rest`."""
    name = f"{role}: " if role else ""
    line = f"{name}{node['ref'] or node['digest']}  {node['kind']}"
    if node["is_deleted"]:
        line += "  (deleted)"
    if node["is_above"]:
        return [first + plain(line + "  (above)")]
    lines = [first + plain(line + _metrics(node["metrics"]))]
    parents = list(node["parents"].items())
    below = rest + ("│    " if parents else "     ")
    lines += [below + plain(fact) for fact in _facts(node)]
    for at, (parent_role, parent) in enumerate(parents):
        is_last = at == len(parents) - 1
        lines += _branch(
            parent, parent_role, rest + ("└── " if is_last else "├── "), rest + ("    " if is_last else "│   ")
        )
    return lines


def _metrics(metrics: dict[str, Any]) -> str:
    found = list(numbers_of(metrics).items())
    text = "".join(f"  {key}={value if type(value) is int else f'{value:.4g}'}" for key, value in found[:_MOST_METRICS])
    return text + (f"  and {len(found) - _MOST_METRICS} more" if len(found) > _MOST_METRICS else "")


def _facts(node: dict[str, Any]) -> list[str]:
    licences = f"licence {node['licence'] or 'unknown'}"
    gathered = {*node["licences"]["models"], *node["licences"]["data"]}
    if others := sorted(gathered - {spelling(node["licence"])}):
        licences += f"; with ancestors and data: {', '.join(others)}"
    lines = [licences]
    if node["by"] or node["time"]:
        lines.append(f"published {node['time']} by {node['by']}")
    if recipe := node["recipe"]:
        # a manifest may hold anything under these names
        train = recipe.get("train") if isinstance(recipe.get("train"), dict) else {}
        main = [f"{key}={train[key]}" for key in ("steps", "learning_rate", "seed") if key in train]
        lines.append("  ".join([f"recipe {recipe.get('stage')}", *main, digest_of(canonical(recipe))[:19] + "…"]))
    lines += [f"data {source_line(row)}" for row in node["data"]]
    return lines


def children_lines(ref: str, children: Sequence[Child]) -> list[str]:
    """A table of the descendants, and how many aliases mean one of them."""
    if not children:
        return [f"nothing descends from {ref}"]
    rows = [
        [
            ", ".join(child.refs) + (" (deleted)" if child.is_deleted else ""),
            child.kind,
            child.depth,
            ", ".join(child.roles),
            ", ".join(child.aliases),
        ]
        for child in children
    ]
    num_aliases = sum(len(child.aliases) for child in children)
    summary = f"{len(children)} version(s) descend from {ref}; {num_aliases} alias(es) mean one of them"
    return [*table(["version", "kind", "steps", f"{ref} is its", "aliases"], rows), "", summary]


def diff_lines(found: Difference) -> list[str]:
    """Each section that differs, and the weights by group with a bar for each relative change."""
    lines = [f"{found.a} → {found.b}"]
    for section in SECTIONS:
        if entries := found.sections[section]:
            lines += ["", section, *(f"  {plain(_entry(entry))}" for entry in entries)]
    if len(lines) == 1:
        lines += ["", "nothing that their manifests say differs"]
    if found.weights is not None:
        lines += ["", *_weights(found)]
    return lines


def _entry(entry: Entry) -> str:
    before, after = _short(entry.before), _short(entry.after)
    if entry.change == "added":
        return f"+ {entry.key}: {after}"
    if entry.change == "removed":
        return f"- {entry.key}: {before}"
    moved = f"  ({entry.difference:+.4g})" if entry.difference is not None else ""
    return f"~ {entry.key}: {before} → {after}{moved}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:119] + "…"


def _weights(found: Difference) -> list[str]:
    weights = found.weights
    assert weights is not None
    lines = [f"weights: {weights.compared}"]
    if weights.groups:
        total = weights.total
        lines[0] += f", ‖A−B‖/‖A‖ = {_percent(total.relative)} of {total.num_parameters:,} numbers"
        largest = max((group.relative or 0.0 for group in weights.groups), default=0.0)
        shown = weights.groups[:_MOST_GROUPS]
        width = max(cells(group.name) for group in shown)
        for group in shown:
            bar = _bar((1.0 if group.relative is None else group.relative / largest) if largest else 0.0)
            name = plain(group.name) + " " * (width - cells(group.name))
            lines.append(f"  {name}  {_percent(group.relative):>9}  {bar}".rstrip())
        if len(weights.groups) > _MOST_GROUPS:
            lines.append(f"  … and {len(weights.groups) - _MOST_GROUPS} that changed less (--json has all)")
    lines += [f"  only in {found.a}: {plain(name)}" for name in weights.only_a]
    lines += [f"  only in {found.b}: {plain(name)}" for name in weights.only_b]
    lines += [f"  {plain(name)} has shape {a} in {found.a} and {b} in {found.b}" for name, a, b in weights.shapes]
    return lines + [f"  {note}" for note in weights.notes]


def _percent(relative: float | None) -> str:
    """A share in per cent; `new` where there was nothing, or nothing finite, to compare with."""
    return "new" if relative is None else f"{100 * relative:.3g}%"


def _bar(share: float) -> str:
    eighths = round(_BAR * 8 * share)
    return "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
