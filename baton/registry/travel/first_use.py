"""The proof that a version which came from elsewhere is the model that its manifest says: its probe, replayed once."""

import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from baton.registry.materialise import cache_root
from baton.registry.trust import attestations
from baton.registry.version import Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry


def prove_once(registry: "Registry", version: Version, folder: Path, base_folder: Path | None) -> None:
    """Replay the probe of a version that arrived, the first time that this cache has it; raises ProbeMismatch.

    folder, base_folder: as materialised, verified. What was published here was probed then, and is not replayed. A
    mark in the cache remembers either, so that a second look costs one look at a file.
    """
    mark = cache_root() / f"{version.digest.removeprefix('sha256:')}.proven"
    if mark.exists():
        return
    if has_arrived(registry, version):
        from baton.registry import probe

        try:
            probe.replay(folder, base_folder, version.manifest)
        except (IndexError, RuntimeError, ValueError) as error:  # ids beyond its embedding, and the like
            raise probe.ProbeMismatch(f"{version.ref} does not give its probe's outputs: {error}") from error
    # Written aside and renamed: there, or not there. A mark that cannot be written costs another replay.
    aside = mark.with_name(f".{mark.name}.{uuid.uuid4().hex}")
    with suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
        aside.touch()
        os.replace(aside, mark)


def has_arrived(registry: "Registry", version: Version) -> bool:
    """Whether a version came from another registry, or with a bundle; not from the Hub, which is published here."""
    return any("registry" in said.body for said in attestations.of(registry, version.digest, "origin"))
