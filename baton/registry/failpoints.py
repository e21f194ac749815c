"""Numbered steps of the commands that write, and a way for tests to die at each of them."""

import os
import signal
import time
from collections import Counter

STEPS = {
    "publish": (
        "1-lease-taken",
        "2-file-copied",
        "3-probe-recorded",
        "4-blob-stored",
        "5-manifest-stored",
        "6-version-recorded",
    ),
    "promote": ("1-gate-passed", "2-alias-recorded"),
    "import": ("1-index-read", "2-file-verified", "3-blob-stored", "4-manifest-stored", "5-version-recorded"),
    "push": ("1-lease-taken", "2-blob-copied", "3-manifest-stored", "4-attestation-stored", "5-version-recorded"),
    "gc": ("1-marked", "2-condemned", "3-manifest-deleted", "4-blob-deleted", "5-finished"),
}
"""Every step by command, in order; after each of them the registry must hold the old or the new state."""

_reached: Counter[str] = Counter()


def step(command: str, name: str) -> None:
    """Say that a step is done. `BATON_FAILPOINT=publish.4-blob-stored` or `…:3` (third time) kills the process here.

    `publish.4-blob-stored=FILE` makes it wait here, every time, while FILE exists. For tests: the process dies as by
    `kill -9`, without any clean-up.
    """
    assert name in STEPS[command], (command, name)
    wanted = os.environ.get("BATON_FAILPOINT")
    if not wanted:
        return
    point, pauses, file = wanted.partition("=")
    point, _, count = point.partition(":")
    if point != f"{command}.{name}":
        return
    if pauses:
        _wait_while_there(file)
        return
    _reached[point] += 1
    if _reached[point] == int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)


def _wait_while_there(file: str) -> None:
    if os.path.exists(file):
        with open(f"{file}.reached", "ab"):
            pass
    while os.path.exists(file):
        time.sleep(0.01)
