"""Bundles: a version with all that it needs as one tar file, which carries it across an air gap."""

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from baton.errors import UserError
from baton.registry import failpoints, materialise
from baton.registry import manifest as manifests
from baton.registry.care.leases import lease
from baton.registry.stores import blob_path
from baton.registry.stores.files import CHUNK_BYTES, storage_errors_are_user_errors, sync_folder
from baton.registry.travel import arrival, transfer
from baton.registry.travel.archive import Reader, Writer
from baton.registry.travel.closure import blobs_of, manifests_below
from baton.registry.travel.index import INDEX, MAX_INDEX_BYTES, Blob, File, Index, from_bytes, order, to_bytes
from baton.registry.travel.looking import Sketches
from baton.registry.trust import attestations, policy
from baton.registry.version import Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry

_STEPS = {"manifest": "4-manifest-stored", "version": "5-version-recorded"}


@dataclass(frozen=True)
class Exported:
    """What was written: the bundle's hex digest and bytes, and how many files it has beside its index."""

    ref: str
    sha256: str
    size: int
    num_files: int


def export(
    registry: "Registry",
    version: Version,
    file: Path | BinaryIO,
    without: Iterable[Version] = (),
    watch: transfer.Watch | None = None,
) -> Exported:
    """Write a version with its ancestors and attestations as a tar file; equal content gives equal bytes.

    file: a path, which is written aside and renamed, or a stream. without: versions that the receiver has; what they
    need is left out, and an import checks that it is there.
    """
    policy.check_loading(registry, version)
    closure = manifests_below(version.digest, registry.manifest)
    arrival.require_bases(closure, registry.location)
    with (
        storage_errors_are_user_errors(f"exporting {version.ref} failed"),
        transfer.lease_if_writable(registry, f"export {version.ref}", [*closure, *blobs_of(closure.values())]),
    ):
        contents = _contents(registry, version, closure, list(without))
        if not isinstance(file, Path):
            writer = Writer(file)
            _write(registry, contents, writer, Path(tempfile.gettempdir()), watch)
        else:
            with _aside(file) as (stream, folder):
                writer = Writer(stream)
                _write(registry, contents, writer, folder, watch)
    return Exported(version.ref, writer.sha256, writer.size, len(contents.index.files))


@dataclass(frozen=True)
class _Contents:
    """What goes into a bundle."""

    index: Index
    small: dict[str, bytes]  # manifests and attestations by path
    blobs: dict[str, dict[str, Any]]  # manifests' entries by path


def _contents(
    registry: "Registry", version: Version, closure: dict[str, dict[str, Any]], without: list[Version]
) -> _Contents:
    there: dict[str, dict[str, Any]] = {}
    for one in without:
        below = manifests_below(one.digest, registry.manifest)
        if not below.keys() & closure.keys():
            raise UserError(f"--without {one.ref} leaves nothing out: {version.ref} needs nothing of it.")
        there |= below
    sent = [digest for digest in closure if digest not in there]
    if not sent:
        raise UserError(f"{version.ref} is itself left out by --without: nothing remains to export.")
    blobs, blobs_there = blobs_of(closure.values()), blobs_of(there.values())
    small = {manifests.manifest_path(digest): manifests.canonical(closure[digest]) for digest in sent}
    for digest in sent:
        small |= registry.store.get_many([attestations.path_of(found) for found in attestations.of(registry, digest)])
    files = [File(path, len(data), Path(path).stem) for path, data in small.items()]
    files += [File(blob_path(hex), entry["size"], hex) for hex, entry in blobs.items() if hex not in blobs_there]
    index = Index(
        registry=registry.id,
        versions=[one for one in transfer.named_of(registry, version, closure) if one.digest in sent],
        files=sorted(files, key=lambda entry: order(entry.path)),
        without_refs=sorted(one.ref for one in without),
        without_manifests=sorted(closure.keys() & there.keys()),
        without_blobs=[Blob(hex, blobs[hex]["size"]) for hex in sorted(blobs.keys() & blobs_there.keys())],
    )
    return _Contents(index, small, {blob_path(hex): entry for hex, entry in blobs.items()})


def _write(
    registry: "Registry", contents: _Contents, writer: Writer, folder: Path, watch: transfer.Watch | None
) -> None:
    data = to_bytes(contents.index)
    writer.add(INDEX, len(data), iter([data]))
    total = sum(file.size for file in contents.index.files)
    done = 0
    for file in contents.index.files:
        if file.path in contents.small:
            writer.add(file.path, file.size, iter([contents.small[file.path]]))
        else:
            # By way of a file of its own: nothing gets into a bundle before its digest is known to be right.
            with tempfile.TemporaryDirectory(dir=folder, prefix=".baton-export-") as place:
                blob = Path(place, "blob")
                entry = contents.blobs[file.path]
                materialise.copy_blob(registry.store, entry, blob)
                arrival.require_sound(blob, entry, file.sha256, registry.location)
                writer.add(file.path, file.size, _chunks(blob))
        done += file.size
        if watch:
            watch(done, total)
    writer.end()


def _chunks(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


@contextmanager
def _aside(file: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file beside `file` that becomes it at the end, and a folder for work in progress on the same disk."""
    if not file.parent.is_dir():
        raise UserError(f"{file.parent} is not a folder; make it first.")
    if file.exists() and not file.is_file():
        raise UserError(f"{file} is not a regular file; name another, or - to write to standard output.")
    aside = file.with_name(f".{file.name[:100]}.partial-{uuid.uuid4().hex}")
    try:
        with open(aside, "xb") as stream:
            yield stream, file.parent
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, file)
        sync_folder(file.parent.absolute())
    finally:
        aside.unlink(missing_ok=True)


def import_bundle(
    registry: "Registry", source: Path | BinaryIO, watch: transfer.Watch | None = None, allow_code: bool = False
) -> list[Version]:
    """Register what a bundle holds, ancestors first; again: nothing changes. The last one is what was exported.

    source: a path, or a stream that need not be seekable. Until the last byte is verified nothing is written but to
    the registry's workspace. allow_code: let Python files and `auto_map` in, which Baton never runs.
    Raises UserError for whatever differs by a bit from what `export` writes.
    """
    with (
        storage_errors_are_user_errors(f"importing into {registry.location} failed"),
        _opened(source) as (stream, where),
        registry.store.workspace() as folder,
    ):
        reader = Reader(stream, where)
        data = b"".join(reader.content(INDEX, reader.first(INDEX, MAX_INDEX_BYTES)))
        index = from_bytes(data, where)
        _require_room(index, folder, where)
        _require_there(registry, index.without_manifests, index.without_blobs, index, where)
        failpoints.step("import", "1-index-read")
        stored = _receive_manifests(reader, index)
        closure = _closure(registry, index, stored, where)
        policy.check_arrival(registry, closure)
        said = _receive_attestations(reader, index)
        _receive_blobs(reader, index, closure, folder, watch)
        reader.end()
        _look(registry, index, closure, folder, allow_code, reader.where)
        return _publish(registry, index, stored, closure, said, folder, reader)


@contextmanager
def _opened(source: Path | BinaryIO) -> Iterator[tuple[BinaryIO, str]]:
    if not isinstance(source, Path):
        yield source, "the bundle"
        return
    try:
        stream = open(source, "rb")  # noqa: SIM115 - closed below, errors of the block are not its own
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}. Name a bundle of `baton export`.") from error
    with stream:
        yield stream, str(source)


def _require_room(index: Index, folder: Path, where: str) -> None:
    needed, free = sum(file.size for file in index.files), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{where} holds {needed} bytes by its index; {folder.parent} has room for {free}. Free some.")


def _require_there(
    registry: "Registry", digests: Iterable[str], blobs: Iterable[Blob], index: Index, where: str
) -> None:
    """Refuse a bundle that needs what it does not hold and the registry lacks."""
    lacking = [digest for digest in digests if not registry.store.exists(manifests.manifest_path(digest))]
    lacking += [f"the blob {sha256}" for sha256, size in blobs if not arrival.has_blob(registry, sha256, size)]
    if lacking:
        left_out = f" (it was exported without {', '.join(index.without_refs)})" if index.without_refs else ""
        raise UserError(
            f"{where} needs what it does not hold{left_out} and {registry.location} lacks: {', '.join(lacking[:3])}"
            f"{', …' if len(lacking) > 3 else ''}. Import that first, or export again without --without."
        )


def _receive(reader: Reader, file: File) -> bytes:
    """A small file, verified."""
    reader.next(file.path, file.size)
    data = b"".join(reader.content(file.path, file.size))
    if (found := hashlib.sha256(data).hexdigest()) != file.sha256:
        raise UserError(f"{reader.where}: {file.path} is damaged: expected sha256:{file.sha256}, found sha256:{found}.")
    return data


def _receive_manifests(reader: Reader, index: Index) -> dict[str, bytes]:
    stored = {}
    for file in index.of_kind("manifests"):
        digest = f"sha256:{file.sha256}"
        stored[digest] = _receive(reader, file)
        manifests.parse(stored[digest], digest, f"{reader.where}: {file.path}")
        failpoints.step("import", "2-file-verified")
    return stored


def _closure(registry: "Registry", index: Index, stored: dict[str, bytes], where: str) -> dict[str, dict[str, Any]]:
    """The manifests of the version and all its ancestors, after everything that can be known of them is checked."""

    def read(digest: str) -> dict[str, Any]:
        if digest in stored:
            return manifests.parse(stored[digest], digest, where)
        _require_there(registry, [digest], [], index, where)
        return registry.read_manifest(digest)

    closure = manifests_below(index.versions[-1].digest, read)
    if stray := sorted(stored.keys() - closure.keys()):
        raise UserError(f"{where} holds the manifest {stray[0]}, which {index.versions[-1].ref} does not need.")
    arrival.require_bases(closure, where)
    blobs = blobs_of(closure.values())
    sent = {file.sha256: file.size for file in index.of_kind("blobs")}
    if unknown := sorted(sent.keys() - blobs.keys()):
        raise UserError(f"{where} holds the blob {unknown[0]}, which no manifest of it names.")
    for sha256, size in sent.items():
        if blobs[sha256]["size"] != size:
            raise UserError(
                f"{where}: {blob_path(sha256)} would have {size} bytes by its index, and {blobs[sha256]['size']} by "
                f"the manifest, which calls it {blobs[sha256]['path']}."
            )
    _require_there(registry, [], _not_sent(blobs, sent), index, where)
    return closure


def _not_sent(blobs: dict[str, dict[str, Any]], sent: Iterable[str]) -> list[Blob]:
    there = set(sent)
    return [Blob(sha256, entry["size"]) for sha256, entry in blobs.items() if sha256 not in there]


def _receive_attestations(reader: Reader, index: Index) -> list[tuple[str, bytes]]:
    said = []
    ours = {Path(file.path).stem for file in index.of_kind("manifests")}
    for file in index.of_kind("attestations"):
        about = file.path.split("/")[1]
        data = _receive(reader, file)
        attestations.parse(data, f"sha256:{about}", f"{reader.where}: {file.path}")
        if about not in ours:
            raise UserError(f"{reader.where}: {file.path} is about a manifest that the bundle does not hold.")
        said.append((f"sha256:{about}", data))
        failpoints.step("import", "2-file-verified")
    return said


def _receive_blobs(
    reader: Reader, index: Index, closure: dict[str, dict[str, Any]], folder: Path, watch: transfer.Watch | None
) -> None:
    """Write the blobs to `folder` under their hex digests, each verified."""
    entries = blobs_of(closure.values())
    total, done = sum(file.size for file in index.of_kind("blobs")), 0
    for file in index.of_kind("blobs"):
        reader.next(file.path, file.size)
        digest = hashlib.sha256()
        with open(folder / file.sha256, "xb") as out:
            for chunk in reader.content(file.path, file.size):
                out.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                if watch:
                    watch(done, total)
            out.flush()
            os.fsync(out.fileno())
        arrival.require_sound(folder / file.sha256, entries[file.sha256], digest.hexdigest(), reader.where)
        failpoints.step("import", "2-file-verified")


def _look(
    registry: "Registry",
    index: Index,
    closure: dict[str, dict[str, Any]],
    folder: Path,
    allow_code: bool,
    where: str,
) -> None:
    """Refuse a model that could not have been published here; its blobs are in `folder`."""
    sketches = Sketches(registry, closure, folder)
    for file in index.of_kind("blobs"):
        sketches.keep(folder / file.sha256, file.sha256)
    sketches.look({one.digest: one.ref for one in index.versions}, allow_code, where)


def _publish(
    registry: "Registry",
    index: Index,
    stored: dict[str, bytes],
    closure: dict[str, dict[str, Any]],
    said: list[tuple[str, bytes]],
    folder: Path,
    reader: Reader,
) -> list[Version]:
    """Make everything appear; it is all in `folder`, and verified."""
    blobs = blobs_of(closure.values())
    sent = [file.sha256 for file in index.of_kind("blobs")]
    with lease(registry.store, f"import {index.versions[-1].ref}", [*closure, *blobs]):
        # Looked at before as well, but only what is leased stays.
        _require_there(registry, closure.keys() - stored.keys(), _not_sent(blobs, sent), index, reader.where)
        for sha256 in sent:
            registry.store.put_blob(folder / sha256, sha256)
            (folder / sha256).unlink(missing_ok=True)
            failpoints.step("import", "3-blob-stored")
        return arrival.register(
            registry,
            {digest: stored[digest] for digest in closure if digest in stored},
            said,
            index.versions,
            {"registry": index.registry, "bundle": f"sha256:{reader.sha256}"},
            lambda what: failpoints.step("import", _STEPS[what]) if what in _STEPS else None,
        )
