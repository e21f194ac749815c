"""Handing models over: publish, get."""

from pathlib import Path
from typing import Annotated

import typer

from baton.errors import UserError
from baton.registry.catalogue import Registry
from baton.registry.commands.options import DEFAULT_REGISTRY, JsonOption, RefArgument, RegistryOption, print_json
from baton.registry.reference import check_alias


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    for command in (publish, get,):
        app.command(name=command.__name__.removesuffix("_models"))(command)


def get(
    ref: RefArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge an adapter into its base.")] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
) -> None:
    """Write a version as a plain folder, verified, and prove by its probe that it is the same model."""
    reg = Registry(registry)
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
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Publish a folder as the next version of a model; makes the registry when there is none."""
    if alias is not None:
        check_alias(alias)
    reg = Registry(registry, create=True)
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
        print_json({"ref": version.ref, "digest": version.digest})
    else:
        typer.echo(f"{version.ref} {version.digest}")
