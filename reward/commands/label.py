"""Human feedback: label."""

from pathlib import Path
from typing import Annotated

import typer

from baton.errors import UserError


def register(app: typer.Typer) -> None:
    """Add this command to `app`."""
    app.command(name="label")(label)


def label(
    pairs: Annotated[
        str, typer.Argument(metavar="FILE", help="Pairs: of `baton rollout`, or of preferences; .jsonl and others.")
    ],
    out: Annotated[Path, typer.Option(help="The judgements: appended to, and read by training.")] = Path(
        "judgements.jsonl"
    ),
    annotator: Annotated[str | None, typer.Option(help="Who judges; left out, the page asks.")] = None,
    file_format: Annotated[
        str | None, typer.Option("--format", help="The format of preferences, where the file does not make it plain.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everybody's order and sides.")] = 0,
    host: Annotated[
        str, typer.Option(help="The address to serve on; another than this machine's own lets others judge.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8788,
) -> None:
    """Serve a web page on which people judge pairs of replies, blind, by keys; each judgement is a line of --out."""
    from baton.data import FORMATS
    from baton.registry.ui.server import is_loopback
    from reward.labelling.questions import read_questions
    from reward.labelling.server import Settings, serve

    if file_format is not None and file_format not in FORMATS:
        raise UserError(f"--format {file_format}: known are {', '.join(FORMATS)}")
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: expected a name that ends in .jsonl, which training reads")
    if out.exists() and Path(pairs).exists() and out.samefile(pairs):
        raise UserError(f"--out {out} is the file of pairs itself; name another")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")
    if annotator is not None:
        annotator = _checked_name(annotator)
    asked = read_questions(pairs, file_format)
    if not is_loopback(host):
        typer.echo(f"warning: whoever can reach {host} can read these pairs and judge them under any name.")
    serve(asked, Settings(out, host, port, seed, annotator), typer.echo)


def _checked_name(annotator: str) -> str:
    from reward.labelling.names import annotator_name

    name = annotator_name(annotator)
    if name is None:
        raise UserError(f"--annotator {annotator!r}: expected a name of up to 60 visible characters")
    return name
