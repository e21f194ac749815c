"""The `baton` command: arguments and options; the work is done in the modules that each command imports."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer

from baton.errors import UserError
from baton.registry.commands import register
from baton.registry.commands.options import DEFAULT_REGISTRY, JsonOption, RefArgument, RegistryOption

app = typer.Typer(
    name="baton",
    help="Take a language model from pretraining to RLHF, and hand on a verified checkpoint from each stage.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

LengthOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="At most so many tokens.")]
TemperatureOption = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token; above 0 samples.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Decides what is sampled.")]


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Holds recipes: pretrain.yaml, sft.yaml, …")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…", help="train.steps=10 for all stages, sft.train.steps=10 for one."),
    ] = None,
    start: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Begin with this stage.")] = None,
    only: Annotated[str | None, typer.Option("--only", metavar="STAGE", help="Run just this stage.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes a stage, on this machine.")] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config_file", "--config-file", help="An accelerate config to launch by.")
    ] = None,
    registry: Annotated[
        str | None, typer.Option("--registry", help="The registry's folder; without it, what the recipes say.")
    ] = None,
) -> None:
    """Run a folder's stages in order: world, pretrain, sft, reward, ppo. What is up to date is not run again."""
    from baton.chain import Options
    from baton.chain import run as run_chain

    raise typer.Exit(run_chain(folder, overrides or [], Options(start, only, processes, config_file, registry)))


@app.command()
def prepare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe of stage 1: pretrain.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="data.prepared=folder")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that encode; by default one a core.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every shard with its digest.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Tokenise a recipe's text ahead of its training; what a killed command had finished is kept."""
    from baton.corpus.command import prepare as prepare_corpus

    prepare_corpus(recipe, overrides or [], workers, verify, as_json)


@app.command()
def chat(
    ref: RefArgument,
    once: Annotated[str | None, typer.Option(metavar="TEXT", help="Print the reply to TEXT and leave.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    max_new_tokens: LengthOption = 256,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Talk to a version; /reset forgets the conversation, /quit or Ctrl-D leaves."""
    from baton import talk

    talk.chat(registry, ref, talk.Sampling(max_new_tokens, temperature, seed), system, once, as_json)


@app.command()
def generate(
    ref: RefArgument,
    text: Annotated[
        str,
        typer.Argument(metavar="TEXT", help="A document's beginning; with --best-of, what a user says."),
    ],
    max_new_tokens: LengthOption = 64,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="0 takes the likeliest token; above 0 samples. By default 0, with --best-of 1."),
    ] = None,
    seed: SeedOption = 0,
    show_candidates: Annotated[
        bool, typer.Option("--show-candidates", help="Show the likeliest next tokens with their probabilities.")
    ] = False,
    candidates: Annotated[int | None, typer.Option(min=1, help="How many; implies --show-candidates.")] = None,
    best_of: Annotated[
        int | None, typer.Option("--best-of", metavar="N", help="Answer TEXT N times and show the best first.")
    ] = None,
    reward: Annotated[
        str | None, typer.Option(metavar="REF", help="The reward model that says which of --best-of is best.")
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Continue a text, token by token; or answer it N times and let a reward model choose."""
    from baton import talk

    if (best_of is None) != (reward is None):
        raise UserError("--best-of N and --reward REF go together: how many replies, and what judges them")
    shown = candidates or (5 if show_candidates else 0)
    if best_of is None or reward is None:
        sampling = talk.Sampling(max_new_tokens, temperature or 0.0, seed)
        talk.continue_text(registry, ref, text, sampling, shown, as_json)
        return
    if shown:
        raise UserError("--show-candidates is for one continuation, --best-of for whole replies; leave one out")
    sampling = talk.Sampling(max_new_tokens, 1.0 if temperature is None else temperature, seed)
    talk.best_of(registry, ref, reward, text, sampling, best_of, as_json)


@app.command()
def score(
    ref: RefArgument,
    text: Annotated[str, typer.Argument(metavar="TEXT")],
    prompt: Annotated[
        str | None, typer.Option(metavar="PROMPT", help="What TEXT replies to; for a reward model.")
    ] = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: JsonOption = False,
) -> None:
    """Say how natural a text is: bits per byte and each token's surprisal; or a reply's reward."""
    from baton import talk

    talk.score(registry, ref, text, prompt, as_json)


register(app)
for _entry in entry_points(group="baton.commands"):
    _entry.load()(app)  # of the rooms that build on this one, which it does not import


def main() -> None:
    """The console script: a user's mistake is one message and exit code 2."""
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)  # between libraries, nothing that a user can mend
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        # What no command foresaw of a disk that is full or a folder that is closed.
        from baton.registry.stores.files import storage_error

        told = storage_error(error)
        if told is None:
            raise
        _fail(told)


def _fail(message: str) -> None:
    red, plain = ("\033[31m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{red}error:{plain} {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
