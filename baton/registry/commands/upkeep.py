"""Keeping a registry whole: verify."""

from typing import Annotated

import typer

from baton.errors import UserError
from baton.registry.catalogue import Registry
from baton.registry.commands.options import DEFAULT_REGISTRY, JsonOption, RegistryOption, print_json


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    for command in (verify,):
        app.command(name=command.__name__.removesuffix("_models"))(command)


def verify(
    ref: Annotated[str | None, typer.Argument(metavar="[REF]")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Verify everything in the registry.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Also load it and replay its probe.")] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Check digests, ancestors and records; exit code 1 when something is wrong."""
    if (ref is None) == (not everything):
        raise UserError("say what to verify: either a REF, or --all.")
    reg = Registry(registry)
    problems = reg.verify(reg.resolve(ref), deep=deep) if ref else reg.verify_all(deep=deep)
    if as_json:
        print_json(problems)
    else:
        for problem in problems:
            typer.echo(problem)
        typer.echo(f"{ref or 'everything'}: {len(problems) or 'no'} problem(s)")
    if problems:
        raise typer.Exit(1)
