"""Python functions that a recipe names as `pkg.module:function`: where their code lies, and how it is loaded."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.machinery import all_suffixes
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from baton.errors import UserError, nearest


def split(setting: str) -> tuple[str, str]:
    """(module, function) of `pkg.module:function`. Raises UserError for anything else."""
    module, colon, function = setting.partition(":")
    parts = [*module.split("."), *function.split(".")]
    if not colon or not all(part.isidentifier() for part in parts):
        raise UserError(f"function: {setting!r} is not pkg.module:function, for example reward.rules:exact_answer")
    return module, function


def source_file(setting: str) -> Path:
    """The file of the function's module, found without running any of it. Raises UserError where there is none.

    Modules are looked for where Python looks, and in the current directory.
    """
    module, _ = split(setting)
    _search_here()
    importlib.invalidate_caches()  # a file written a moment ago
    top, *inner = module.split(".")
    with suppress(ValueError):  # what a running program is called has no place of its own
        spec = find_spec(top)
        file = Path(spec.origin) if spec and spec.origin else None
        folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
        for part in inner:
            # by hand: find_spec would import, and so run, the packages that the module lies in
            places = [folder / part for folder in folders]
            endings = ["/__init__.py", *all_suffixes()]
            files = [Path(f"{place}{ending}") for place in places for ending in endings]
            file = next((found for found in files if found.is_file()), None)
            folders = [place for place in places if place.is_dir()]
        if file is not None and file.is_file():
            return file
    raise UserError(
        f"function: there is no module {module} (from {setting}); expected {module.replace('.', '/')}.py in "
        f"{Path.cwd()} or an installed package"
    )


def load_function(setting: str) -> Callable[..., Any]:
    """Import the function. Raises UserError where its module fails or has no such function."""
    source_file(setting)
    name, function = split(setting)
    try:
        found: Any = importlib.import_module(name)
    except Exception as error:  # a person's module may raise anything
        raise UserError(f"function: importing {name} failed: {type(error).__name__}: {error}") from error
    for part in function.split("."):
        if not hasattr(found, part):
            known = [key for key, item in vars(found).items() if callable(item) and not key.startswith("_")]
            near = nearest(part, known) or known[:5]
            raise UserError(f"function: {name} has no {function}; it has {', '.join(near) or 'no functions'}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"function: {setting} is {type(found).__name__}, which cannot be called; name a function")
    return found  # type: ignore[no-any-return]


def _search_here() -> None:
    """Let imports find modules of the current directory, after everything else: they must not hide an installed one."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
