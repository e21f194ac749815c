"""Publish's checks of a model's structure, for what arrives: on folders that hold as much of it as the checks read.

What another registry, or a bundle, says of a model was not seen here. Code, lost heads, files that make a loader take
another model than the manifest's, an adapter on another base: refused before a record is written, as when publishing.
"""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.adapters import member_folders
from baton.errors import UserError
from baton.registry import materialise, weights
from baton.registry.checks import CheckFailed, check_tokenizer, named_base
from baton.registry.inspection import ADAPTER_WEIGHTS, has_code, inspect
from baton.registry.manifest import manifest_path
from baton.registry.travel.closure import blobs_of
from baton.registry.version import Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry

_WHOLE_BYTES = 64 << 20
_MAX_HEADER_BYTES = 100 << 20
_HEAD_BYTES = 1 << 20


class Sketches:
    """The beginnings of received files: all of a small one, of a large one the header that safetensors has."""

    def __init__(self, registry: "Registry", manifests: Mapping[str, dict[str, Any]], folder: Path) -> None:
        """manifests: of the version and its ancestors, by digest; folder: to work in. Those here already count not."""
        self._registry = registry
        self._manifests = manifests
        self._new = [digest for digest in manifests if not registry.store.exists(manifest_path(digest))]
        self._wanted = blobs_of(manifests[digest] for digest in self._new)
        self._folder = folder

    def keep(self, file: Path, sha256: str) -> None:
        """Keep what the checks need of a file that is verified, and may be gone or moved when they run."""
        if sha256 not in self._wanted:
            return
        self._heads.mkdir(parents=True, exist_ok=True)
        left = _needed(file)
        with open(file, "rb") as source, open(self._heads / sha256, "wb") as kept:
            while left > 0 and (chunk := source.read(min(left, 1 << 20))):
                kept.write(chunk)
                left -= len(chunk)

    def look(self, refs: Mapping[str, str], allow_code: bool, where: str) -> None:
        """Refuse a version that could not have been published; refs: what to call a manifest, by its digest."""
        for sha256, entry in self._wanted.items():
            if not (self._heads / sha256).exists():  # it was here already
                file = self._folder / f"fetched-{sha256}"
                materialise.copy_blob(self._registry.store, entry, file)
                self.keep(file, sha256)
                file.unlink()
        for digest in self._new:
            view = self._folder / "looking"
            self._lay_out(self._manifests[digest]["files"], view)
            try:
                self._look_at(digest, view, allow_code)
            except UserError as error:
                raise _told(error, view, f"{where}: {refs.get(digest, digest)}") from error
            finally:
                shutil.rmtree(view)

    @property
    def _heads(self) -> Path:
        return self._folder / "heads"

    def _lay_out(self, entries: Iterable[dict[str, Any]], view: Path) -> None:
        view.mkdir()
        for entry in entries:
            path = view / entry["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._heads / entry["sha256"], path)
            os.truncate(path, entry["size"])  # the rest is a hole, and takes no room

    def _look_at(self, digest: str, view: Path, allow_code: bool) -> None:
        manifest = self._manifests[digest]
        base = self._base_of(manifest)
        paths = inspect(view, manifest["kind"], base, allow_code)
        if has_code(view, paths) and not manifest["architecture"].get("remote_code"):
            raise UserError("it brings code, and its manifest does not say so (architecture: remote_code).")
        if base is not None:
            for named in filter(None, map(named_base, member_folders(view))):
                if named.startswith("baton:") and named != f"baton:{base.digest}":
                    told = f"its adapter was trained on {named[6:]}, its base is {base.digest}."
                    raise CheckFailed("swapped-base", told)
            check_tokenizer(view, manifest["tokenizer_digest"], weights.read_header(view / ADAPTER_WEIGHTS), base)

    def _base_of(self, manifest: dict[str, Any]) -> Version | None:
        if manifest["base"] is None:
            return None
        base = Version("its", 1, manifest["base"], self._registry)
        vars(base)["manifest"] = self._manifests[base.digest]  # as if it had been read: it need not be here yet
        return base


def _needed(file: Path) -> int:
    """How many bytes of a file the checks read."""
    size = file.stat().st_size
    if size <= _WHOLE_BYTES:
        return size
    with open(file, "rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    return 8 + header if header <= _MAX_HEADER_BYTES else _HEAD_BYTES


def _told(error: UserError, view: Path, where: str) -> UserError:
    """The error without the path of a folder that is gone by now."""
    text = error.message if isinstance(error, CheckFailed) else str(error)
    text = f"{where}: {text.replace(f'{view}/', '').replace(str(view), 'it')}"
    if "--allow-code" in text:
        text += " Here: --allow-code on import, pull and push lets it in."
    return CheckFailed(error.check, text) if isinstance(error, CheckFailed) else UserError(text)
