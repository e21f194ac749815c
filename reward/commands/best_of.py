"""PPO beside its cheap alternative, by `baton best-of`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from baton.errors import UserError
from baton.registry.catalogue import Registry
from baton.registry.commands.options import (
    DEFAULT_REGISTRY,
    JsonOption,
    RefArgument,
    RegistryOption,
    print_json,
    print_rich,
)


def register(app: typer.Typer) -> None:
    """Add this command to `app`."""
    app.command(name="best-of")(compare_best_of)


def compare_best_of(
    ref: RefArgument,
    reward: Annotated[str, typer.Argument(metavar="REWARD", help="What chooses: a reward model's reference.")],
    prompts: Annotated[str, typer.Argument(metavar="PROMPTS", help="A file, folder or glob, or a hub dataset's id.")],
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", metavar="REF", help="A policy of PPO's; give several, each by itself."),
    ] = None,
    gold: Annotated[
        str | None,
        typer.Option(metavar="REWARD", help="What is measured only: a reference, pkg.module:function, or a URL."),
    ] = None,
    samples: Annotated[int, typer.Option("--n", min=2, help="Replies of REF to each prompt.")] = 16,
    policy_samples: Annotated[int, typer.Option(min=1, help="Replies of each policy to each prompt.")] = 4,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many prompts, from the first on.")] = 128,
    prompt_format: Annotated[
        str | None, typer.Option("--format", metavar="FORMAT", help="Of PROMPTS, where its fields do not tell.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="At most so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="Above 0; 1 is the model's own distribution.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Decides what is sampled.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Gets comparison.json and comparison.png.")] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """The reward of best-of-n for every n by its KL, beside policies of PPO at the same KL."""
    if temperature <= 0:
        raise UserError(f"--temperature {temperature:g} gives the same reply every time; give one above 0")
    from baton.data import FORMATS, load, report
    from baton.models import quieten
    from baton.recipe import Source
    from reward.comparison import Settings, check_versions, compare, reward_setting, tables, write_comparison

    if prompt_format is not None and prompt_format not in FORMATS:
        raise UserError(f"--format {prompt_format}: known are {', '.join(FORMATS)}")
    reg = Registry(registry)
    sft, policies = reg.resolve(ref), [reg.resolve(name) for name in policy or []]
    check_versions(sft, policies)
    loaded = load(Source.model_validate({"path": prompts, "format": prompt_format}), Path.cwd(), "prompt")
    quieten()
    if not as_json:
        typer.echo(report([loaded]))
        if limit is not None and limit < len(loaded.rows):
            typer.echo(f"measuring on the first {limit} of {len(loaded.rows):,} prompts: --limit")
    rewards = {"proxy": reward_setting(reward)} | ({"gold": reward_setting(gold)} if gold else {})
    settings = Settings(samples, policy_samples, max_new_tokens, temperature, seed)
    found = compare(reg, sft, policies, rewards, loaded.rows[:limit], settings, shown=not as_json)
    if as_json:
        print_json(asdict(found))
    else:
        typer.echo(
            f"{found.samples} replies of {found.sft} to each of {found.prompts} prompts, chosen by {found.reward}"
        )
        for table in tables(found):
            print_rich(table)
    if out is not None:
        written = write_comparison(found, out)
        if not as_json:
            typer.echo("\n".join(map(str, written)))
