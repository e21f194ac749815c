"""Approvals: people, or programs, who say that a version may be used."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from baton.registry import provenance
from baton.registry.trust import attestations
from baton.registry.trust.attestations import Attestation
from baton.registry.version import Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry


def approve(
    registry: "Registry", version: Version, by: str | None = None, note: str | None = None, key: Path | None = None
) -> Attestation:
    """Approve a version; key: a private key (PEM) that signs the approval.

    Approving again adds nothing unless the note is another. Without a key the name is only a claim: anybody who may
    write to the registry can make it.
    """
    by = provenance.user() if by is None else by.strip()
    elsewhere = attestations.arrived(registry, version.digest)
    mine = (
        said
        for said in attestations.of(registry, version.digest, "approval")
        if (said.by, said.body) == (by, {"note": note}) and said.digest not in elsewhere
    )
    approval = next(mine, None) or attestations.attest(registry, version.digest, "approval", {"note": note}, by)
    if key is not None:
        from baton.registry.trust import signing

        signing.sign(registry, version.digest, key, by, of=approval.digest)
    return approval


@dataclass(frozen=True)
class Count:
    """How many approve, by distinct names (and distinct keys); `counted` and `others` say who, and why not."""

    number: int
    counted: list[str]
    others: list[str]


def count(
    registry: "Registry",
    version: Version,
    wanted: Sequence[str] | None = None,
    not_by_publisher: bool = False,
    keys: Sequence[str] | None = None,
) -> Count:
    """Count a version's approvals: only by `wanted` names, by others than who published it, signed by one of `keys`.

    With keys, one key counts once whatever names it signs: a key is proof, a name is not. Without, what was approved in
    another registry does not count: who may write here did not write it.
    """
    publishers = {_same(name) for name in publishers_of(registry, version)} if not_by_publisher else set()
    names: dict[str, str] = {}
    used: set[str] = set()
    others = []
    elsewhere = attestations.arrived(registry, version.digest)
    for approval in attestations.of(registry, version.digest, "approval"):
        name, by = _same(approval.by), approval.by
        signed_by = _keys_of(registry, approval, keys) if keys is not None else set()
        if wanted is not None and name not in {_same(other) for other in wanted}:
            others.append(f"{by} is not asked for")
        elif name in publishers:
            others.append(f"{by} published it")
        elif keys is not None and not signed_by:
            others.append(f"{by}'s is signed by none of the keys")
        elif keys is None and approval.digest in elsewhere:
            others.append(f"{by}'s came from another registry; it counts where the gate has keys that signed it")
        else:
            names.setdefault(name, by)
            used |= signed_by
    number = len(names) if keys is None else min(len(names), len(used))
    return Count(number, list(names.values()), list(dict.fromkeys(others)))


def publishers_of(registry: "Registry", version: Version) -> set[str]:
    """Everybody who published this content, here, under another name, or in a registry that it came from."""
    origins = attestations.of(registry, version.digest, "origin")
    found = {str(origin.body["published_by"]) for origin in origins if "published_by" in origin.body}
    everywhere = registry.every_record(with_deleted=True)
    return found | {str(record.get("by")) for _, _, record, _ in everywhere if record["digest"] == version.digest}


def _keys_of(registry: "Registry", approval: Attestation, keys: Sequence[str]) -> set[str]:
    from baton.registry.trust import signing

    checked = signing.verify_signatures(registry, approval.subject, keys, of=approval.digest)
    return {signature.key for signature in checked if signature.problem is None}


def _same(name: str) -> str:
    """Ann and `ann ` are one person."""
    return " ".join(name.split()).casefold()
