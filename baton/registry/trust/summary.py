"""What was said of a version, as lines for people: approvals, evaluations, signatures, where it came from."""

import json
from typing import TYPE_CHECKING

from baton.registry.trust import attestations
from baton.registry.trust.attestations import Attestation
from baton.registry.version import Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry


def lines(registry: "Registry", version: Version) -> list[str]:
    """One line an attestation, oldest first; plain text without control characters, whatever was attested.

    Signatures are listed and not checked, which takes a public key: `baton signatures REF --key team.pub`.
    """
    found = attestations.of(registry, version.digest)
    elsewhere = attestations.arrived(registry, version.digest)
    signed: dict[str, list[Attestation]] = {}
    for said in found:
        if said.type == "signature":
            signed.setdefault(str(said.body.get("of")), []).append(said)
    shown = [
        _line(said, signed.get(said.digest, []), said.digest in elsewhere)
        for said in found
        if not _is_seal(said, version)
    ]
    return ["".join(c if c.isprintable() else "\ufffd" for c in line) for line in shown]


def _is_seal(said: Attestation, version: Version) -> bool:
    """Whether it is the signature of another attestation, and shown with that."""
    return said.type == "signature" and said.body.get("of") != version.digest


def _line(said: Attestation, seals: list[Attestation], is_from_elsewhere: bool) -> str:
    body = said.body
    if said.type == "approval":
        text = f"approved by {said.by}"
    elif said.type == "evaluation":
        metrics = body.get("metrics")
        measured = metrics if isinstance(metrics, dict) else {}
        text = " ".join(f"{name}={json.dumps(value)}" for name, value in measured.items()) + f" measured by {said.by}"
    elif said.type == "signature":
        text = f"signature by {said.by}, {_key(said)} (unchecked)"
    else:
        text = f"{said.type} by {said.by}: {json.dumps(body, ensure_ascii=False)}"
    text += f", {said.time}" + (", in another registry" if is_from_elsewhere else "")
    text += "".join(f", with a signature, {_key(seal)} (unchecked)" for seal in seals)
    return f"{text}: {body['note']}" if body.get("note") else text


def _key(signature: Attestation) -> str:
    return f"key {str(signature.body.get('key'))[:19]}…"
