"""A reward model over HTTP: serve-reward."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from baton.registry.commands.options import DEFAULT_REGISTRY, RefArgument, RegistryOption


def register(app: typer.Typer) -> None:
    """Add this command to `app`."""
    app.command(name="serve-reward")(serve_reward)


def serve_reward(
    ref: RefArgument,
    host: Annotated[
        str, typer.Option(help="The address to listen on; any but this machine's own asks for a token.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8789,
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Holds the token that requests must bear; without it, $BATON_REWARD_TOKEN."),
    ] = None,
    without_token: Annotated[
        bool, typer.Option("--without-token", help="Let every machine that reaches --host ask, without a token.")
    ] = False,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="To compute in; auto: what is fast here.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    tokens_per_batch: Annotated[
        int, typer.Option(min=1, help="Of one forward pass, padding included; a longer row goes alone.")
    ] = 8192,
    join: Annotated[
        bool,
        typer.Option(
            "--join",
            help="Score waiting requests in one pass: faster, but a reward's last digits then depend on the others.",
        ),
    ] = False,
    max_bytes: Annotated[int, typer.Option(min=1, help="Of a request's body.")] = 8 << 20,
    max_rows: Annotated[int, typer.Option(min=1, help="Of a request.")] = 1024,
    max_row_tokens: Annotated[int, typer.Option(min=1, help="Of a prompt and its reply.")] = 8192,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests at a time; further ones are to ask again.")] = 64,
    registry: RegistryOption = DEFAULT_REGISTRY,
) -> None:
    """Answer {"samples": [{prompt, response, columns}]} with {"rewards": […]} over HTTP: for PPO's `url:` rewards."""
    from baton.registry.catalogue import Registry
    from reward.serving.limits import Limits
    from reward.serving.server import Settings, serve

    limits = Limits(max_bytes, max_rows, max_row_tokens, max_queue)
    settings = Settings(ref, host, port, token_file, without_token, dtype, device, tokens_per_batch, join, limits)
    serve(Registry(registry), settings, lambda line: print(line, flush=True))
