"""What came from elsewhere appears in a registry: manifests, attestations, origins, and last the version records."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from baton.errors import UserError
from baton.registry import manifest as manifests
from baton.registry import provenance, records
from baton.registry.pickles import why_pickle
from baton.registry.stores import blob_path, is_url
from baton.registry.stores.files import file_sha256
from baton.registry.travel.closure import Named
from baton.registry.trust import attestations
from baton.registry.trust.attestations import Attestation
from baton.registry.version import WHOLE_KINDS, Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry


def without_credentials(location: str) -> str:
    """A registry's location as others may read it: no user, password or query, and no path of this machine."""
    if not is_url(location):
        return f"…/{Path(location).expanduser().absolute().name}"
    parts = urlsplit(location)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def has_blob(registry: "Registry", sha256: str, size: int) -> bool:
    """Whether a blob is there with its size; its bytes are hashed whenever it is read."""
    found = registry.store.stat(blob_path(sha256))
    return found is not None and found.size == size


def require_sound(file: Path, entry: Mapping[str, Any], found: str | None, where: str) -> None:
    """Refuse a file that arrived as another one, or that could run code; found: its hex digest, None to compute it."""
    found = found or file_sha256(file)
    size = file.stat().st_size
    if found != entry["sha256"] or size != entry["size"]:
        raise UserError(
            f"{where}: the file {entry['path']} is damaged: expected sha256:{entry['sha256']} and {entry['size']} "
            f"bytes, found sha256:{found} and {size}."
        )
    if reason := why_pickle(file):
        raise UserError(f"{where}: the file {entry['path']} is {reason}: loading it can run any code. It stays out.")


def require_bases(closure: Mapping[str, dict[str, Any]], where: str) -> None:
    """Refuse an adapter whose base is no whole model; `closure`: manifests by digest with all their ancestors."""
    for digest, manifest in closure.items():
        base = closure[manifest["base"]] if manifest["base"] else None
        if base and base["kind"] not in WHOLE_KINDS:
            raise UserError(
                f"{where}: {digest} of kind {manifest['kind']} has a base of kind {base['kind']}; "
                f"expected {' or '.join(WHOLE_KINDS)}."
            )


def register(
    registry: "Registry",
    stored: Mapping[str, bytes],
    said: Iterable[tuple[str, bytes]],
    named: Sequence[Named],
    origin: dict[str, Any],
    step: Callable[[str], None],
) -> list[Version]:
    """Make versions appear whose blobs are there; what is there already stays as it is, and nothing is there twice.

    stored: bytes of manifests by digest, ancestors first. said: (digest of the manifest, bytes of an attestation).
    named: the versions to register, ancestors first; one that was deleted here comes back only as the last, which was
    asked for. origin: where they come from, without the reference. step: called after each, with "manifest",
    "attestation" or "version".

    What was said over there is marked as such before it is here: an origin attestation lists it, and who published the
    version over there. A bundle's author can write any name under an approval, and any registry's id.
    """
    for digest, data in stored.items():
        _store_manifest(registry, digest, data)
        step("manifest")
    names = {one.digest: one for one in named}
    said_of: dict[str, list[tuple[Attestation, bytes]]] = {digest: [] for digest in names}
    for subject, data in said:
        attestation = attestations.parse(data, subject, "an attestation on its way")
        # What was once sent from here and comes back did not originate over there.
        if attestation.type != "origin" or attestation.body.get("registry") != registry.id:
            said_of.setdefault(subject, []).append((attestation, data))
    for digest, arriving in said_of.items():
        one = names.get(digest)
        is_new = one is not None and _registered(registry, one, one is not named[-1]) is None
        facts = {"ref": one.ref, "published_by": one.by} if one else {}
        _say_origin(registry, digest, origin | facts, [attestation for attestation, _ in arriving], is_new)
        for attestation, data in arriving:
            registry.store.put_if_absent(attestations.path_of(attestation), data)
            step("attestation")
    arrived = []
    for one in named:
        arrived.append(_record(registry, one, one is not named[-1]))
        step("version")
    return arrived


def _store_manifest(registry: "Registry", digest: str, data: bytes) -> None:
    """Store a manifest whose digest was verified; over an older copy that was damaged since."""
    path = manifests.manifest_path(digest)
    registry.store.put_if_absent(path, data)
    try:
        registry.read_manifest(digest)
    except UserError:
        registry.store.replace(path, data)
        registry.read_manifest(digest)


def _say_origin(
    registry: "Registry", digest: str, body: dict[str, Any], arriving: Sequence[Attestation], is_new: bool
) -> None:
    """Say where a version, or what is newly said of it, comes from, unless an earlier try has said so."""
    here = {found.digest for found in attestations.of(registry, digest)}
    new = {one.digest for one in arriving if one.type != "origin"} - here
    origins = [found.body for found in attestations.of(registry, digest, "origin")]
    is_said = any({key: value for key, value in known.items() if key != "attestations"} == body for known in origins)
    if new - attestations.arrived(registry, digest) or (is_new and not is_said):
        attestations.attest(registry, digest, "origin", body | {"attestations": sorted(new)})


def _record(registry: "Registry", one: Named, with_deleted: bool) -> Version:
    manifest = registry.manifest(one.digest)
    record = {
        "digest": one.digest,
        "kind": manifest["kind"],
        "identity": manifests.identity(manifest),
        "by": provenance.user(),
        "time": provenance.now(),
    }
    folder = records.versions_folder(one.name)
    registry.store.see_latest(folder)
    # Numbers before records: a version that appears in between takes the next number, and is looked at when that is
    # refused. The other way round, two pushes of one version could both register it.
    number = max([0, *registry.all_numbers(one.name)]) + 1
    if found := _registered(registry, one, with_deleted):
        return found
    while not records.write(registry.store, folder, number, {"number": number, **record}):
        if _is_record_of(registry, folder, number, one.digest):
            break
        number += 1
    return Version(one.name, number, one.digest, registry)


def _is_record_of(registry: "Registry", folder: str, number: int, digest: str) -> bool:
    try:
        return bool(records.read(registry.store, folder, number, "digest")["digest"] == digest)
    except UserError:
        return False  # a damaged record of another version must not stop this one


def _registered(registry: "Registry", one: Named, with_deleted: bool) -> Version | None:
    try:
        found = registry.version_records(one.name, with_deleted)
    except UserError:
        found = _sound_records(registry, one.name, with_deleted)
    for number, record in found.items():
        if record["digest"] == one.digest:
            return Version(one.name, number, one.digest, registry)
    return None


def _sound_records(registry: "Registry", name: str, with_deleted: bool) -> dict[int, dict[str, Any]]:
    found = {}
    for number in registry.all_numbers(name) if with_deleted else registry.numbers(name):
        try:
            found[number] = records.read(registry.store, records.versions_folder(name), number, "digest")
        except UserError:
            continue
    return found
