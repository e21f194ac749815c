"""What is known of a reward, by `baton know-reward`."""

from pathlib import Path
from typing import Annotated

import typer

from baton.registry.catalogue import Registry
from baton.registry.commands.options import DEFAULT_REGISTRY, JsonOption, RefArgument, RegistryOption, print_json


def register(app: typer.Typer) -> None:
    """Add this command to `app`."""
    app.command(name="know-reward")(know_reward)


def know_reward(
    ref: RefArgument,
    data: Annotated[list[str], typer.Option("--data", metavar="PATH", help="Held-out pairs; may be given repeatedly.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page that is written.")] = Path(
        "reward_report.html"
    ),
    data_format: Annotated[
        str | None, typer.Option("--format", metavar="FORMAT", help="Of the data, where its fields do not tell.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="So many pairs of each source, from the first on.")] = 500,
    max_length: Annotated[
        int, typer.Option("--max-length", min=1, help="Longer pairs are left out, in tokens.")
    ] = 1024,
    perturbed: Annotated[int, typer.Option(min=0, help="So many pairs are scored again, perturbed.")] = 64,
    sft: Annotated[
        str | None, typer.Option(metavar="REF", help="Sample this policy too, for the score's scale and for shaping.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="So many prompts for --sft.")] = 64,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of a sample for --sft.")] = 128,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Measure a reward model on preference pairs and write the report: accuracy, calibration, length, robustness."""
    from baton.models import quieten
    from reward.knowledge.asking import Question, ask
    from reward.knowledge.findings import findings

    quieten()
    sampled = (sft, samples, max_new_tokens) if sft is not None else None
    question = Question(tuple(data), data_format, limit, max_length, perturbed, sampled)
    known = ask(Registry(registry), ref, question, out, typer.echo if not as_json else lambda _: None)
    if as_json:
        print_json(known.metrics)
        return
    for finding in findings(known):
        typer.echo(f"{finding.level:<5} {finding.title}. {finding.text}")
    typer.echo(str(out))
