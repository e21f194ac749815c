"""The commands of the reward's room, which `baton` finds by the entry point `baton.commands`."""

import typer

from reward.commands import best_of, know, label, rollout, serve


def register(app: typer.Typer) -> None:
    """Add them to `app`."""
    for room in (rollout, label, best_of, know, serve):
        room.register(app)
