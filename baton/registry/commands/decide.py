"""Deciding what an alias means: promote."""

from typing import Annotated

import typer

from baton.registry.catalogue import Registry
from baton.registry.commands.options import DEFAULT_REGISTRY, JsonOption, RefArgument, RegistryOption, print_json


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    for command in (promote,):
        app.command(name=command.__name__.removesuffix("_models"))(command)


def promote(
    ref: RefArgument,
    alias: Annotated[str, typer.Argument(metavar="ALIAS")],
    reason: Annotated[str, typer.Option(help="Why this version; kept in the alias's history.")],
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Make an alias mean a version; the alias's history keeps who, when, why and what was there before."""
    reg = Registry(registry)
    version = reg.resolve(ref)
    record = reg.promote(version.ref, alias, reason)
    if as_json:
        print_json(record)
    else:
        typer.echo(f"{version.name}:{alias} → {record['to']} (before: {record['previous'] or 'none'})")
