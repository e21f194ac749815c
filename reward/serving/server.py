"""The server process: listens, loads the model, answers until it is told to stop, and finishes what it began."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from baton.errors import UserError
from baton.registry import Registry
from reward.serving.limits import Limits

STOP_S = 60
"""How long requests may go on after SIGTERM."""


@dataclass(frozen=True)
class Settings:
    """What a server is started with."""

    ref: str
    host: str = "127.0.0.1"
    port: int = 8789
    token_file: Path | None = None
    without_token: bool = False
    dtype: str = "auto"
    device: str = "auto"
    batch_tokens: int = 8192  # of a forward pass, padding included
    join: bool = False
    limits: Limits = field(default_factory=Limits)


def serve(registry: Registry, settings: Settings, announce: Callable[[str], None]) -> None:
    """Serve a reward version; returns after SIGTERM or SIGINT, when what was asked before is answered.

    Raises UserError before anything is loaded where the address is taken, or open to others without a token.
    """
    try:
        import uvicorn

        from reward.serving.access import Access, check_exposure, read_token
        from reward.serving.app import PATH, Application, make_app
        from reward.serving.metrics import Metrics
    except ImportError as error:
        raise UserError(f"serving needs a library that is not installed ({error}): pip install 'baton[ui]'") from error
    from baton.models import quieten
    from baton.registry.ui.server import listen
    from reward.serving.model import open_model, reward_version
    from reward.serving.worker import Worker

    token, limits = read_token(settings.token_file), settings.limits
    check_exposure(settings.host, token, settings.without_token)
    version = reward_version(registry, settings.ref)
    # before the model is loaded: who asks meanwhile waits instead of being refused
    with listen(settings.host, settings.port) as listener:
        quieten()
        model = open_model(
            registry,
            version,
            dtype=settings.dtype,
            device=settings.device,
            batch_tokens=settings.batch_tokens,
            limits=limits,
        )
        metrics = Metrics()
        metrics.serves(version.ref, version.digest, model.dtype, model.device)
        worker = Worker(model, metrics, settings.batch_tokens if settings.join else 0)
        application = Application(version.ref, version.digest, worker, Access(token, settings.host), limits, metrics)
        config = uvicorn.Config(
            make_app(application),
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=STOP_S,
        )
        server = uvicorn.Server(config)
        for number in (signal.SIGTERM, signal.SIGINT):
            # uvicorn catches them once it runs, and raises them again after its last answer: they have been obeyed then
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"http://{shown}:{listener.getsockname()[1]}{PATH}"
        members = f"{model.num_members} members, " if model.num_members > 1 else ""
        announce(f"{url}  {version.ref} ({version.digest})  {members}{model.dtype} on {model.device}  (Ctrl-C ends it)")
        server.run(sockets=[listener])
    worker.close()
