"""Who, when, and with which code and packages: what a publish notes about its surroundings."""

import getpass
import os
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import baton

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors")


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide what a model computes."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def code_state() -> dict[str, Any]:
    """Baton's version, and its git commit and whether it has changes when it runs from a checkout."""
    folder = Path(baton.__file__).parent
    state: dict[str, Any] = {"baton": baton.__version__, "commit": None, "dirty": None}
    # An installed package may lie inside another project's checkout: a tracked file shows that it is ours.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is not None:
        state["commit"] = _git(folder, "rev-parse", "--verify", "--quiet", "HEAD")
        state["dirty"] = bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    return state


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def user() -> str:
    """The name of the person or account that runs this."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's uid without an account
        return f"uid-{os.getuid()}"


def now() -> str:
    """The time in UTC to the second, ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
