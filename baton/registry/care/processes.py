"""Processes across machines: which one wrote something, and whether it is surely dead."""

import os
import socket
from functools import cache
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """This process for others to tell: `{host, boot, pids, pid, started}`."""
    return {**_place(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_surely_dead(process: Any) -> bool:
    """Whether a process that `this_process` described has ended; False whenever that cannot be seen from here."""
    if not isinstance(process, dict) or type(process.get("pid")) is not int:
        return False
    if {key: process.get(key) for key in _place()} != _place():
        return False
    try:
        # A process number is used again: one that began at another time is another process.
        return _started(process["pid"]) != process.get("started")
    except PermissionError:  # it lives, and is none of ours
        return False


@cache
def _place() -> dict[str, str]:
    """Where process numbers mean the same as here: containers share a host's name, but not its numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        return {
            "host": socket.gethostname(),
            "boot": boot.read_text().strip(),
            "pids": os.readlink("/proc/self/ns/pid"),
        }
    except OSError:  # not Linux, and so no containers either
        import psutil

        return {"host": socket.gethostname(), "boot": str(int(psutil.boot_time())), "pids": ""}


def _started(pid: int) -> str | None:
    """When a process began, in whatever unit; None when it has ended, even if its parent has not noticed yet.

    Raises PermissionError when there is such a process, of which nothing else may be known.
    """
    if _place()["pids"]:
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            _require_none_hidden(pid)
            return None
        # After the name, which is in brackets and may hold anything: the state, and 19 fields on, the start in ticks.
        fields = text.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    import psutil

    try:
        return str(int(psutil.Process(pid).create_time()))
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied as error:
        raise PermissionError(pid) from error


def _require_none_hidden(pid: int) -> None:
    # /proc mounted with `hidepid` shows only one's own processes; a signal tells a hidden one from none.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return
    raise PermissionError(pid)
