"""The registry's commands: list, show, log, verify, get, publish, promote."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from baton.errors import UserError
from baton.registry.catalogue import Registry
from baton.registry.reference import check_alias

if TYPE_CHECKING:
    from rich.tree import Tree

_RegistryPath = Annotated[Path, typer.Option("--registry", envvar="BATON_REGISTRY", help="The registry's folder.")]
_Json = Annotated[bool, typer.Option("--json", help="Print data instead of text.")]
_Ref = Annotated[str, typer.Argument(metavar="REF", help="team/name:7, :alias or @sha256:…")]
_DEFAULT = Path(".baton/registry")


def register(app: typer.Typer) -> None:
    """Add the registry's commands to `app`."""
    for command in (list_models, show, log, verify, get, publish, promote):
        app.command(name=command.__name__.removesuffix("_models"))(command)


def list_models(
    name: Annotated[str | None, typer.Argument(help="Only this model, with all its versions.")] = None,
    registry: _RegistryPath = _DEFAULT,
    as_json: _Json = False,
) -> None:
    """List the models, or one model's versions, with aliases."""
    reg = Registry.open(registry)
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
        _print_json(rows)
        return
    from rich.table import Table

    table = Table("version" if name else "latest", "kind", "aliases", "digest", box=None)
    for row in rows:
        aliases_text = ", ".join(f"{alias}→{number}" for alias, number in row["aliases"].items())
        table.add_row(row["ref"], row["kind"], aliases_text, row["digest"][:19] + "…")
    _print(table)


def show(ref: _Ref, registry: _RegistryPath = _DEFAULT, as_json: _Json = False) -> None:
    """Show a version; with --json its manifest, byte for byte as it is stored."""
    reg = Registry.open(registry)
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
    _print(table)


def log(ref: _Ref, registry: _RegistryPath = _DEFAULT, as_json: _Json = False) -> None:
    """Show where a version comes from, as a tree."""
    reg = Registry.open(registry)
    tree = reg.lineage(reg.resolve(ref))
    if as_json:
        _print_json(tree)
    else:
        _print(_branch(tree, None))


def verify(
    ref: Annotated[str | None, typer.Argument(metavar="[REF]")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Verify everything in the registry.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Also load it and replay its probe.")] = False,
    registry: _RegistryPath = _DEFAULT,
    as_json: _Json = False,
) -> None:
    """Check digests, ancestors and records; exit code 1 when something is wrong."""
    if (ref is None) == (not everything):
        raise UserError("say what to verify: either a REF, or --all.")
    reg = Registry.open(registry)
    problems = reg.verify(reg.resolve(ref), deep=deep) if ref else reg.verify_all(deep=deep)
    if as_json:
        _print_json(problems)
    else:
        for problem in problems:
            typer.echo(problem)
        typer.echo(f"{ref or 'everything'}: {len(problems) or 'no'} problem(s)")
    if problems:
        raise typer.Exit(1)


def get(
    ref: _Ref,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge an adapter into its base.")] = False,
    registry: _RegistryPath = _DEFAULT,
) -> None:
    """Write a version as a plain folder, verified, and prove by its probe that it is the same model."""
    reg = Registry.open(registry)
    version = reg.resolve(ref)
    reg.merge(version, folder) if merge else reg.materialise(version, folder, replay_probe=True)
    typer.echo(f"{version.ref} is in {folder}")


def publish(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder written by save_pretrained.")],
    name: Annotated[str, typer.Option(help="team/name")],
    kind: Annotated[str, typer.Option(help="base, adapter, reward, value or merged")],
    base: Annotated[str | None, typer.Option(metavar="REF", help="An adapter's base; none for a whole model.")] = None,
    parent: Annotated[list[str] | None, typer.Option(metavar="ROLE=REF", help="May be repeated.")] = None,
    licence: Annotated[str | None, typer.Option(help="An SPDX identifier, such as apache-2.0.")] = None,
    alias: Annotated[str | None, typer.Option(help="Make this alias mean the new version.")] = None,
    registry: _RegistryPath = _DEFAULT,
    as_json: _Json = False,
) -> None:
    """Publish a folder as the next version of a model; makes the registry when there is none."""
    if alias is not None:
        check_alias(alias)
    reg = Registry.open(registry, create=True)
    parents = {}
    for text in parent or []:
        role, equals, ref = text.partition("=")
        if not equals or not role:
            raise UserError(f"--parent {text!r} is not ROLE=REF, such as sft=team/name:3.")
        parents[role] = reg.resolve(ref)
    version = reg.publish(
        folder,
        name=name,
        kind=kind,
        base=reg.resolve(base) if base else None,
        parents=parents,
        details={"licence": licence},
    )
    if alias is not None:
        reg.promote(version.ref, alias, reason="published under this alias")
    if as_json:
        _print_json({"ref": version.ref, "digest": version.digest})
    else:
        typer.echo(f"{version.ref} {version.digest}")


def promote(
    ref: _Ref,
    alias: Annotated[str, typer.Argument(metavar="ALIAS")],
    reason: Annotated[str, typer.Option(help="Why this version; kept in the alias's history.")],
    registry: _RegistryPath = _DEFAULT,
    as_json: _Json = False,
) -> None:
    """Make an alias mean a version; the alias's history keeps who, when, why and what was there before."""
    reg = Registry.open(registry)
    version = reg.resolve(ref)
    record = reg.promote(version.ref, alias, reason)
    if as_json:
        _print_json(record)
    else:
        typer.echo(f"{version.name}:{alias} → {record['to']} (before: {record['previous'] or 'none'})")


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


def _print(renderable: Any) -> None:
    from rich.console import Console

    console = Console()
    # Piped output is read by programs: never cut a line to a terminal's width.
    console.print(renderable) if console.is_terminal else Console(width=200).print(renderable)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
