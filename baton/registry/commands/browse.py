"""What is in a registry: list, show, log."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from baton.registry.catalogue import Registry
from baton.registry.commands.options import (
    DEFAULT_REGISTRY,
    JsonOption,
    RefArgument,
    RegistryOption,
    print_json,
    print_rich,
)

if TYPE_CHECKING:
    from rich.tree import Tree


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    for command in (list_models, show, log,):
        app.command(name=command.__name__.removesuffix("_models"))(command)


def list_models(
    name: Annotated[str | None, typer.Argument(help="Only this model, with all its versions.")] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """List the models, or one model's versions, with aliases."""
    reg = Registry(registry)
    rows: list[dict[str, Any]] = []
    for model in reg.models() if name is None else [name]:
        shown = reg.versions(model) if name else [reg.resolve(f"{model}:{reg.numbers(model)[-1]}")]
        aliases = reg.aliases(model)
        for version in shown:
            # The overview has one line a model, so that it names every alias with what it means.
            named = {a: number for a, number in aliases.items() if name is None or number == version.number}
            facts = {"ref": version.ref, "kind": version.kind, "digest": version.digest}
            rows.append({**facts, "aliases": named})
    if as_json:
        print_json(rows)
        return
    from rich.table import Table

    table = Table("version" if name else "latest", "kind", "aliases", "digest", box=None)
    for row in rows:
        aliases_text = ", ".join(f"{alias}→{number}" for alias, number in row["aliases"].items())
        table.add_row(row["ref"], row["kind"], aliases_text, row["digest"][:19] + "…")
    print_rich(table)


def show(ref: RefArgument, registry: RegistryOption = DEFAULT_REGISTRY, as_json: JsonOption = False) -> None:
    """Show a version; with --json its manifest, byte for byte as it is stored."""
    reg = Registry(registry)
    version = reg.resolve(ref)
    if as_json:
        from baton.registry.manifest import canonical

        sys.stdout.buffer.write(canonical(version.manifest))  # no newline: its sha256 is the version's digest
        sys.stdout.buffer.flush()
        return
    from rich.table import Table
    from rich.text import Text

    manifest = version.manifest
    table = Table(box=None, show_header=False)
    aliases = [alias for alias, number in reg.aliases(version.name).items() if number == version.number]
    facts = {"version": version.ref, "aliases": ", ".join(aliases), "digest": version.digest}
    described = ("kind", "licence", "dtype", "architecture", "vocabulary", "base")
    circumstances = ("parents", "data", "metrics", "code", "packages")
    facts |= {key: manifest[key] for key in (*described, *circumstances)}
    facts["files"] = "\n".join(f"{entry['size']:>13,} {entry['path']}" for entry in manifest["files"])
    for key, value in facts.items():
        table.add_row(key, Text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    print_rich(table)


def log(ref: RefArgument, registry: RegistryOption = DEFAULT_REGISTRY, as_json: JsonOption = False) -> None:
    """Show where a version comes from, as a tree."""
    reg = Registry(registry)
    tree = reg.lineage(reg.resolve(ref))
    if as_json:
        print_json(tree)
    else:
        print_rich(_branch(tree, None))


def _branch(node: dict[str, Any], role: str | None) -> "Tree":
    from rich.text import Text
    from rich.tree import Tree

    name = node["ref"] or node["digest"]
    label = Text.assemble(f"{role}: " if role else "", (name, "bold"), f"  {node['kind']}")
    for key, value in node["metrics"].items():
        if not isinstance(value, (dict, list)):
            label.append(f"  {key}={value:.4g}" if isinstance(value, float) else f"  {key}={value}", "dim")
    tree = Tree(label)
    for parent_role, parent in node["parents"].items():
        tree.children.append(_branch(parent, parent_role))
    return tree
