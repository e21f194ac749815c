"""Replies to be judged, by `baton rollout`."""

from pathlib import Path
from typing import Annotated

import typer

from baton.errors import UserError
from baton.registry.catalogue import Registry
from baton.registry.commands.options import DEFAULT_REGISTRY, JsonOption, RefArgument, RegistryOption, print_json


def register(app: typer.Typer) -> None:
    """Add this command to `app`."""
    app.command(name="rollout")(roll_out)


def roll_out(
    ref: RefArgument,
    prompts: Annotated[str, typer.Argument(metavar="PROMPTS", help="A file, folder or glob, or a hub dataset's id.")],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Written line by line; begun files are gone on with.")
    ],
    replies: Annotated[int, typer.Option("--n", min=2, help="Replies to each prompt.")] = 2,
    other: Annotated[
        str | None, typer.Option("--with", metavar="REF", help="Another version, which gives every second reply.")
    ] = None,
    prompt_format: Annotated[
        str | None, typer.Option("--format", metavar="FORMAT", help="Of PROMPTS, where its fields do not tell.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many prompts, from the first on.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="At most so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="Above 0; 1 is the model's own distribution.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Decides what is sampled.")] = 0,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Sample replies to prompts, from one version or two, to be judged by `baton label`."""
    if temperature <= 0:
        raise UserError(f"--temperature {temperature:g} gives the same reply every time; give one above 0")
    from baton.data import FORMATS
    from baton.models import quieten
    from reward.rollouts import Settings, check_versions, read_prompts, write_rollouts

    if prompt_format is not None and prompt_format not in FORMATS:
        raise UserError(f"--format {prompt_format}: known are {', '.join(FORMATS)}")
    reg = Registry(registry)
    versions = [reg.resolve(name) for name in (ref, other) if name is not None]
    check_versions(versions)
    messages, told = read_prompts(prompts, prompt_format, limit)
    if not as_json:
        typer.echo(told)
    quieten()
    settings = Settings(replies, max_new_tokens, temperature, seed)
    outcome = write_rollouts(reg, versions, messages, settings, out, shown=not as_json)
    if as_json:
        print_json({"file": str(out), "pairs": outcome.pairs, "same": outcome.same, "unfit": outcome.unfit})
        return
    typer.echo(f"{out}: {outcome.pairs:,} prompts with {replies} replies each")
    if outcome.same:
        typer.echo(f"  {outcome.same:,} left out: all replies were the same")
    if outcome.unfit:
        typer.echo(f"  {outcome.unfit:,} left out: too long for a model, or a special token spelt out")
