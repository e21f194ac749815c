"""Serve the page of one file of pairs until it is interrupted."""

import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from baton.errors import UserError
from reward.labelling.questions import Asked
from reward.labelling.store import Store


@dataclass(frozen=True)
class Settings:
    """Where judgements go and where the page is: host, port (0: a free one), seed of order and sides."""

    out: Path
    host: str
    port: int
    seed: int
    annotator: str | None


def serve(asked: Asked, settings: Settings, say: Callable[[str], None]) -> None:
    """Serve the page, and `say` what a person should know; returns when interrupted.

    Raises UserError where the file of judgements or the port cannot be had, or where the file judges other pairs by
    the same ids.
    """
    try:
        import uvicorn

        from reward.labelling.app import make_app
    except ImportError as error:
        raise UserError(f"the page needs a library that is not installed ({error}): pip install 'baton[ui]'") from error
    from baton.registry.ui.protect import LOOPBACK
    from baton.registry.ui.server import is_loopback, listen

    store = Store(settings.out)
    try:
        _check_same(asked, store)
        host, is_local = settings.host, is_loopback(settings.host)
        with listen(host, settings.port) as listener:
            shown = f"[{host}]" if ":" in host else host
            address = f"http://{shown}:{listener.getsockname()[1]}/"
            store.announce(address)
            for line in _told(asked, store):
                say(line)
            say(f"{address}  (Ctrl-C ends it)")
            hosts = LOOPBACK if is_local else LOOPBACK | {host.lower(), socket.gethostname().lower()}
            app = make_app(asked.questions, store, settings.seed, settings.annotator, hosts, not is_local)
            config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off")
            with suppress(KeyboardInterrupt):  # which is how this ends
                uvicorn.Server(config).run(sockets=[listener])
        say(f"{_count(len(store.judgements()), 'judgement')} in {settings.out}: train on them as preferences")
    finally:
        store.close()


def _check_same(asked: Asked, store: Store) -> None:
    """Rounds number their pairs from one again: the judgements of one must not count as those of the next."""
    judged = {each.pair: each.content for each in store.judgements()}
    for question in asked.questions:
        if judged.get(question.id, question.content) != question.content:
            raise UserError(
                f"{store.path} already judges a pair {question.id}, which has other texts than the pair {question.id} "
                "here; expected judgements of these pairs. Name another --out for another file of pairs"
            )


def _told(asked: Asked, store: Store) -> list[str]:
    reasons = ", ".join(f"{count} × {reason}" for reason, count in asked.left_out.items())
    lines = [f"{_count(len(asked.questions), 'pair')} to judge" + (f"; left out: {reasons}" if reasons else "")]
    lines += store.notes
    if judgements := store.judgements():
        names = sorted({each.annotator for each in judgements})
        by = f"{len(names)} annotators" if len(names) > 5 else ", ".join(names)
        lines.append(f"{store.path} holds {_count(len(judgements), 'judgement')} by {by}; they go on where they were")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
