"""Where corpora are kept, and that one process at a time writes there."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from baton.errors import UserError

if TYPE_CHECKING:
    from baton.recipe_base import Recipe


def corpora_folder(recipe: Recipe) -> Path:
    """Where corpora and their tokenizers are kept by default: `corpora` beside the registry, if that is a folder."""
    return Path(".baton/corpora") if "://" in recipe.registry else Path(recipe.registry).parent / "corpora"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time prepares a folder; the lock ends with the process, however that ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror}. Set data.prepared to a folder that can"
        ) from None
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
