"""Attestations: what somebody says of a version after it was published. Written once, found by its digest."""

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from baton.errors import UserError
from baton.registry import manifest as manifests
from baton.registry import provenance

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry

TYPES = ("evaluation", "approval", "signature", "origin")
"""evaluation: metrics measured later; approval: by a person; signature: of a manifest; origin: where it came from."""
_TRIES, _PAUSE_S = 30, 0.1
_FIELDS = {"type": str, "subject": str, "by": str, "time": str, "body": dict}


@dataclass(frozen=True)
class Attestation:
    """What `by` said of the version with the manifest digest `subject`, at `time` (UTC, ISO 8601)."""

    digest: str  # sha256:<hex> of the record itself
    type: str
    subject: str
    by: str
    time: str
    body: dict[str, Any]


def folder_of(subject: str) -> str:
    """Where the attestations of a manifest lie."""
    return f"attestations/{subject.removeprefix('sha256:')}"


def attest(registry: "Registry", subject: str, kind: str, body: dict[str, Any], by: str | None = None) -> Attestation:
    """Say something of a version (`subject`: its manifest digest); kind: one of `TYPES`."""
    assert kind in TYPES, kind
    by = provenance.user() if by is None else by.strip()
    check_who(by)
    registry.manifest(subject)  # nothing is said of what is not there
    elsewhere = arrived(registry, subject)
    for _ in range(_TRIES):
        record = {"type": kind, "subject": subject, "by": by, "time": provenance.now(), "body": body}
        data = manifests.canonical(record)
        attestation = parse(data, subject, "the new attestation")
        if attestation.digest not in elsewhere:
            break
        time.sleep(_PAUSE_S)  # the very same was said over there in this second: ours must be told from it
    else:
        raise UserError(f"{by} said this at this time in another registry already; say it with another --note.")
    registry.store.put_if_absent(path_of(attestation), data)
    return attestation


def canonical(attestation: Attestation) -> bytes:
    """The bytes of an attestation's record, whose sha256 is its digest; what a signature of it signs."""
    return manifests.canonical({key: getattr(attestation, key) for key in _FIELDS})


def check_who(name: str) -> None:
    """Raise UserError unless `name` can say who someone is, on one line and in a terminal."""
    if not name.strip() or len(name) > 200 or not name.isprintable():
        raise UserError(f"bad name {name!r}: say who you are in 1 to 200 printable characters (--as NAME).")


def path_of(attestation: Attestation) -> str:
    """Where an attestation lies."""
    return f"{folder_of(attestation.subject)}/{attestation.digest.removeprefix('sha256:')}.json"


def of(registry: "Registry", subject: str, kind: str | None = None) -> list[Attestation]:
    """What was said of a version, oldest first; raises UserError that names a damaged record."""
    folder = folder_of(subject)
    names = registry.store.list(folder)
    found = registry.store.get_many([f"{folder}/{name}" for name in names])
    parsed = [parse(data, subject, registry.store.describe(path)) for path, data in found.items()]
    for path, attestation in zip(found, parsed, strict=True):
        if path != path_of(attestation):
            raise UserError(
                f"{registry.store.describe(path)} is damaged: its content has the digest {attestation.digest}. "
                "Restore it from a backup or another registry."
            )
    return sorted((a for a in parsed if kind in (None, a.type)), key=lambda a: (a.time, a.digest))


def arrived(registry: "Registry", subject: str) -> set[str]:
    """The digests of what was said of a version in another registry and came here with it, by any origin's word.

    Whoever may write there, or into a bundle, wrote the names in it: no gate here takes it for more than their claim.
    """
    listed = (found.body.get("attestations") for found in of(registry, subject, "origin"))
    return {digest for digests in listed if isinstance(digests, list) for digest in digests if isinstance(digest, str)}


def parse(data: bytes, subject: str, where: str) -> Attestation:
    """Check an attestation's form and that it is about `subject`; raises UserError that names `where`."""
    try:
        record = json.loads(data)
        is_sound = (
            isinstance(record, dict)
            and set(record) == set(_FIELDS)
            and all(isinstance(record[key], expected) for key, expected in _FIELDS.items())
            and record["type"] in TYPES
            and manifests.canonical(record) == data
        )
    except (ValueError, RecursionError):
        is_sound = False
    if not is_sound:
        raise UserError(f"{where} is damaged: not an attestation. Restore it from a backup or another registry.")
    if record["subject"] != subject:
        raise UserError(f"{where} is about {record['subject']}, but lies under {subject}.")
    return Attestation(manifests.digest_of(data), **record)
