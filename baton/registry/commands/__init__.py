"""The registry's commands, a module for each thing that people do with it."""

import typer

from baton.registry.commands import browse, decide, handover, page, upkeep


def register(app: typer.Typer) -> None:
    """Add the registry's commands to `app`."""
    for module in (browse, handover, decide, upkeep, page):
        module.register(app)
