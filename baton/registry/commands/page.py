"""The registry as a web page: ui."""

from typing import Annotated

import typer

from baton.registry.catalogue import Registry
from baton.registry.commands.options import DEFAULT_REGISTRY, RegistryOption


def register(app: typer.Typer) -> None:
    """Add this command to `app`."""
    app.command(name="ui")(show_page)


def show_page(
    host: Annotated[str, typer.Option(help="The address to serve on; any but this machine's own lets others read.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8787,
    registry: RegistryOption = DEFAULT_REGISTRY,
) -> None:
    """Serve a read-only web page of the registry: models, versions, aliases, lineage, metrics, cards."""
    from baton.registry.ui.server import is_loopback, serve

    reg = Registry(registry)
    if not is_loopback(host):
        typer.echo(f"warning: whoever can reach {host} can read this registry: the page asks nobody who they are.")
    serve(reg, host, port, lambda address: typer.echo(f"{address}  (Ctrl-C ends it)"))
