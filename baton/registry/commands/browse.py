"""What is in a registry, where it comes from and what came of it: list, show, log, diff, children."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from baton.errors import UserError
from baton.registry import records
from baton.registry.catalogue import Registry
from baton.registry.commands.options import DEFAULT_REGISTRY, JsonOption, RefArgument, RegistryOption, print_json


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    for command in (list_models, show, log, diff, children):
        app.command(name=command.__name__.removesuffix("_models"))(command)


def list_models(
    name: Annotated[str | None, typer.Argument(help="Only this model, with all its versions.")] = None,
    deleted: Annotated[bool, typer.Option("--deleted", help="What was deleted, by whom and why.")] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """List the models, or one model's versions, with aliases."""
    reg = Registry(registry)
    rows = _deleted(reg, name) if deleted else _left(reg, name)
    if as_json:
        print_json(rows)
        return
    from baton.registry.commands.browse_text import table

    if deleted:
        print_lines(table(["deleted", "kind", "by", "time", "why"], [[row[key] for key in _DELETED] for row in rows]))
        return
    shown = []
    for row in rows:
        aliases = ", ".join(f"{alias}→{number}" for alias, number in row["aliases"].items())
        shown.append([row["ref"], row["kind"], aliases, row["digest"][:19] + "…"])
    print_lines(table(["version" if name else "latest", "kind", "aliases", "digest"], shown))


_DELETED = ("ref", "kind", "by", "time", "why")


def _left(reg: Registry, name: str | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for model in reg.models() if name is None else [name]:
        aliases = reg.aliases(model)
        # Only records are read: they have the kind, and a registry may hold ten thousand manifests.
        if name is None:
            last = reg.numbers(model)[-1]
            found = {last: records.read(reg.store, records.versions_folder(model), last, "digest")}
        else:
            reg.versions(model)  # refuses a name that there is not
            found = reg.version_records(model)
        for number, record in found.items():
            # The overview has one line a model, so that it names every alias with what it means.
            named = {alias: meant for alias, meant in aliases.items() if name is None or meant == number}
            facts = {"ref": f"{model}:{number}", "kind": record["kind"], "digest": record["digest"]}
            rows.append({**facts, "aliases": named})
    return rows


def _deleted(reg: Registry, name: str | None) -> list[dict[str, Any]]:
    rows = []
    for model in reg.models(with_deleted=True) if name is None else [name]:
        versions = reg.version_records(model, with_deleted=True)
        folder = records.tombstones_folder(model)
        numbers = reg.deleted_numbers(model)
        for number, stone in records.read_all(reg.store, folder, numbers, "why").items():
            record = versions.get(number, {})
            facts = {"ref": f"{model}:{number}", "kind": record.get("kind"), "digest": record.get("digest")}
            rows.append({**facts, **{key: stone.get(key) for key in ("by", "time", "why")}})
    return rows


def show(ref: RefArgument, registry: RegistryOption = DEFAULT_REGISTRY, as_json: JsonOption = False) -> None:
    """Show a version; with --json its manifest, byte for byte as it is stored."""
    reg = Registry(registry)
    version = reg.resolve(ref)
    if as_json:
        from baton.registry.manifest import canonical

        sys.stdout.buffer.write(canonical(version.manifest))  # no newline: its sha256 is the version's digest
        sys.stdout.buffer.flush()
        return
    from baton.registry.commands.browse_text import facts
    from baton.registry.trust import summary

    manifest = version.manifest
    record = reg.version_records(version.name)[version.number]
    aliases = [alias for alias, number in reg.aliases(version.name).items() if number == version.number]
    shown = {"version": version.ref, "digest": version.digest}
    shown |= {"published": f"{record.get('time')} by {record.get('by')}", "aliases": ", ".join(aliases)}
    said = {"moves": _moves(reg, version.name, version.number), "attested": summary.lines(reg, version)}
    shown |= {key: "\n".join(lines) for key, lines in said.items() if lines}
    described = ("kind", "licence", "licences", "dtype", "architecture", "vocabulary", "base")
    circumstances = ("parents", "data", "metrics", "code", "packages")
    shown |= {key: manifest[key] for key in (*described, *circumstances)}
    shown["files"] = "\n".join(f"{entry['size']:>13,} {entry['path']}" for entry in manifest["files"])
    print_lines(facts(shown))


def _moves(reg: Registry, name: str, number: int) -> list[str]:
    """Every move of an alias to or from a version, oldest first."""
    moves = [(alias, move) for alias in records.alias_names(reg.store, name) for move in reg.alias_history(name, alias)]
    return [
        f"{move.get('time')}  {alias}: {move.get('previous') or 'none'} → {move['to'] or 'none'}  by {move.get('by')}: "
        f"{move.get('reason')}"
        for alias, move in sorted(moves, key=lambda one: str(one[1].get("time")))
        if number in (move["to"], move.get("previous"))
    ]


def log(
    ref: RefArgument,
    graph: Annotated[
        Path | None, typer.Option("--graph", metavar="FILE", help="Draw it instead: a .svg picture or an .html page.")
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Show where a version comes from, as a tree: parents, data, recipe, metrics, licences, who and when."""
    if graph is not None and (graph.suffix not in (".svg", ".html") or as_json):
        raise UserError(f"--graph {graph}: name a file that ends in .svg or .html, without --json.")
    reg = Registry(registry)
    version = reg.resolve(ref)
    if graph is not None:
        from baton.registry.history import graph as graphs

        found = graphs.graph(reg, version)
        title = f"Lineage of {version.ref}"
        text = graphs.to_svg(found) if graph.suffix == ".svg" else graphs.to_html(found, title)
        try:
            graph.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{graph} cannot be written: {error.strerror}.") from error
        typer.echo(f"{graph} shows {version.ref} and {len(found.nodes) - 1} ancestor(s)")
        return
    tree = reg.lineage(version)
    if as_json:
        print_json(tree)
        return
    from baton.registry.commands.browse_text import tree_lines

    print_lines(tree_lines(tree))


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A reference: what was.")],
    b: Annotated[str, typer.Argument(metavar="B", help="A reference: what is compared with it.")],
    weights: Annotated[
        bool, typer.Option("--weights/--no-weights", help="Compare the weights too, which reads both models.")
    ] = True,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Show what differs between two versions: recipe, data, packages, metrics, and the weights by layer."""
    from baton.registry.history.diff import diff as difference

    reg = Registry(registry)
    found = difference(reg, reg.resolve(a), reg.resolve(b), with_weights=weights)
    if as_json:
        print_json(found.as_json())
        return
    from baton.registry.commands.browse_text import diff_lines

    print_lines(diff_lines(found))


def children(ref: RefArgument, registry: RegistryOption = DEFAULT_REGISTRY, as_json: JsonOption = False) -> None:
    """List everything that descends from a version, at any depth: what a bad base would have spoilt.

    Exit code 1 when a damaged manifest may hide more.
    """
    from baton.registry.history.children import survey

    reg = Registry(registry)
    version = reg.resolve(ref)
    found = survey(reg, version)
    if as_json:
        print_json([child._asdict() for child in found.children])
    else:
        from baton.registry.commands.browse_text import children_lines

        print_lines(children_lines(version.ref, found.children))
    for problem in found.unreadable:
        typer.echo(f"not read, so that descendants may be missing: {problem}", err=True)
    if found.unreadable:
        raise typer.Exit(1)


def print_lines(lines: list[str]) -> None:
    """Print lines at once; not by rich, which takes seconds for ten thousand."""
    typer.echo("\n".join(lines))
