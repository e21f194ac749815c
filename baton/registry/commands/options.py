"""What the commands share: their common options and arguments, and how they print."""

import json
from typing import Annotated, Any

import typer

DEFAULT_REGISTRY = ".baton/registry"
RegistryOption = Annotated[
    str, typer.Option("--registry", envvar="BATON_REGISTRY", help="The registry: a folder, or s3://bucket/prefix.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print data instead of text.")]
RefArgument = Annotated[str, typer.Argument(metavar="REF", help="team/name:7, team/name:alias or team/name@sha256:…")]


def print_rich(renderable: Any) -> None:
    """Print something of rich's: as wide as the terminal, or wide enough for programs that read it."""
    from rich.console import Console

    console = Console()
    # Piped output is read by programs: never cut a line to a terminal's width.
    console.print(renderable) if console.is_terminal else Console(width=200).print(renderable)


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
