"""Serve the page of a registry until it is interrupted."""

import ipaddress
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from baton.errors import UserError

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry


def serve(registry: "Registry", host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve on `host` and `port` (0: a free one), and `announce` the address; returns when interrupted."""
    try:
        import uvicorn

        from baton.registry.ui.app import make_app
    except ImportError as error:
        raise UserError(f"the page needs a library that is not installed ({error}): pip install 'baton[ui]'") from error
    from baton.registry.ui.protect import LOOPBACK

    with listen(host, port) as listener:
        shown = f"[{host}]" if ":" in host else host
        announce(f"http://{shown}:{listener.getsockname()[1]}/")
        hosts = LOOPBACK if is_loopback(host) else LOOPBACK | {host.lower(), socket.gethostname().lower()}
        app = make_app(registry, hosts, any_address=not is_loopback(host))
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off")
        uvicorn.Server(config).run(sockets=[listener])


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address; a name that is not `localhost` counts as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises UserError where there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, reuse_port=False)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}, port {port} ({error}). --port 0 takes a free port.") from error
