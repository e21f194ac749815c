"""Push and pull: a version with its ancestors from one registry to another, moving only what is missing there."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.errors import UserError
from baton.registry import failpoints, materialise, records
from baton.registry.care.leases import Lease, lease
from baton.registry.manifest import manifest_path, parse
from baton.registry.stores import is_url
from baton.registry.stores.files import storage_errors_are_user_errors
from baton.registry.travel import arrival
from baton.registry.travel.closure import Named, blobs_of, closure, manifests_below, names_of
from baton.registry.travel.looking import Sketches
from baton.registry.trust import attestations, policy
from baton.registry.version import Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry

__all__ = ["Report", "closure", "pull", "push"]

Watch = Callable[[int, int], None]
"""Told (bytes done, bytes in all) now and then, from any thread."""
CLOUD_WORKERS = 4
"""Blobs on their way at a time where one side is far away; each may be large, and lies on this disk meanwhile."""
_STEPS = {"manifest": "3-manifest-stored", "attestation": "4-attestation-stored", "version": "5-version-recorded"}


@dataclass(frozen=True)
class Report:
    """What a push did. `ref`: what the version is called over there."""

    ref: str
    digest: str
    blobs_sent: int
    blobs_present: int  # found over there with their sizes, and not sent
    bytes_sent: int
    bytes_total: int


def pull(
    target: "Registry", source: "Registry", ref: str, watch: Watch | None = None, allow_code: bool = False
) -> Report:
    """Bring the version that `ref` means in `source` into `target`, with all that it needs."""
    return push(source, source.resolve(ref), target, watch, allow_code)


def push(
    source: "Registry", version: Version, target: "Registry", watch: Watch | None = None, allow_code: bool = False
) -> Report:
    """Copy a version with its ancestors, attestations and names to another registry; again: nothing is sent.

    Every blob is hashed on its way: neither side's word is taken for what it holds. In `target` the version gets the
    next number of its name, unless its digest is registered there already. allow_code: let Python files and `auto_map`
    travel, which Baton never runs. Raises UserError when something is missing
    or damaged; what was sent until then is not sent again.
    """
    policy.check_loading(source, version)
    manifests = manifests_below(version.digest, source.manifest)
    named = named_of(source, version, manifests)
    arrival.require_bases(manifests, source.location)
    policy.check_arrival(target, manifests)
    blobs = blobs_of(manifests.values())
    holds = [*manifests, *blobs]
    with (
        storage_errors_are_user_errors(f"pushing {version.ref} to {target.location} failed"),
        lease_if_writable(source, f"push {version.ref}", holds),
        lease(target.store, f"push {version.ref}", holds),
        target.store.workspace() as folder,
    ):
        failpoints.step("push", "1-lease-taken")
        sketches = Sketches(target, manifests, folder)
        sent = _send_blobs(source, target, blobs, folder, sketches, watch)
        sketches.look({one.digest: one.ref for one in named}, allow_code, source.location)
        stored = _read_manifests(source, manifests)
        arrived = arrival.register(
            target,
            stored,
            _attestations(source, manifests),
            named,
            {"registry": source.id, "location": arrival.without_credentials(source.location)},
            lambda what: failpoints.step("push", _STEPS[what]),
        )
    return Report(
        ref=arrived[-1].ref,
        digest=version.digest,
        blobs_sent=len(sent),
        blobs_present=len(blobs) - len(sent),
        bytes_sent=sum(sent.values()),
        bytes_total=sum(entry["size"] for entry in blobs.values()),
    )


def named_of(source: "Registry", version: Version, manifests: Mapping[str, Any]) -> list[Named]:
    """The version last, its ancestors that have a name before it."""
    names = names_of(source, manifests)
    ancestors = [names[digest] for digest in manifests if digest in names and digest != version.digest]
    record = records.read(source.store, records.versions_folder(version.name), version.number, "digest")
    return [*ancestors, Named(version.digest, version.name, version.number, str(record.get("by")))]


@contextmanager
def lease_if_writable(source: "Registry", what: str, holds: Iterable[str]) -> Iterator[None]:
    held = Lease(source.store, what)
    try:
        held.add(holds)
    except (OSError, UserError):
        # Whoever may only read cannot say what they read. If it is collected meanwhile, a blob is missing: no harm.
        held.release()
        yield
        return
    try:
        yield
    finally:
        held.release()


def _send_blobs(
    source: "Registry",
    target: "Registry",
    blobs: Mapping[str, dict[str, Any]],
    folder: Path,
    sketches: Sketches,
    watch: Watch | None,
) -> dict[str, int]:
    """Copy those blobs that the target lacks; returns their sizes by hex digest."""
    sent: dict[str, int] = {}
    total, done = sum(entry["size"] for entry in blobs.values()), 0
    changing = threading.Lock()
    is_failed = threading.Event()

    def send(entry: dict[str, Any]) -> None:
        nonlocal done
        if is_failed.is_set():
            return
        is_sent = not arrival.has_blob(target, entry["sha256"], entry["size"])
        if is_sent:
            _send_blob(source, target, entry, folder / entry["sha256"], sketches)
            failpoints.step("push", "2-blob-copied")
        with changing:
            done += entry["size"]
            if is_sent:
                sent[entry["sha256"]] = entry["size"]
            if watch:
                watch(done, total)

    workers = CLOUD_WORKERS if is_url(source.location) or is_url(target.location) else 1
    with ThreadPoolExecutor(workers) as pool:
        tasks = [pool.submit(send, entry) for entry in blobs.values()]
        try:
            for task in wait(tasks, return_when=FIRST_EXCEPTION).done:
                task.result()
        finally:
            is_failed.set()  # the others end before the folder under them goes; nothing is left to do otherwise
    return sent


def _send_blob(source: "Registry", target: "Registry", entry: dict[str, Any], file: Path, sketches: Sketches) -> None:
    materialise.copy_blob(source.store, entry, file)  # by digest
    arrival.require_sound(file, entry, entry["sha256"], source.location)
    sketches.keep(file, entry["sha256"])
    target.store.put_blob(file, entry["sha256"])
    file.unlink(missing_ok=True)


def _read_manifests(source: "Registry", digests: Iterable[str]) -> dict[str, bytes]:
    stored = {}
    for digest in digests:
        path = manifest_path(digest)
        stored[digest] = source.store.get(path)
        parse(stored[digest], digest, source.store.describe(path))  # what was read for the closure may be of before
    return stored


def _attestations(source: "Registry", digests: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    for digest in digests:
        paths = [attestations.path_of(found) for found in attestations.of(source, digest)]
        yield from ((digest, data) for data in source.store.get_many(paths).values())
