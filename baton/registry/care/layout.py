"""What may lie where in a registry: every path that Baton writes, by kind."""

import re

from baton.registry.records import is_alias

_PART = r"[a-z0-9][a-z0-9._-]{0,99}"
_NUMBERED = r"(?P<number>[0-9]{7})\.json"
_MODEL = rf"models/(?P<name>{_PART}/{_PART})"
_KINDS = {
    "registry": r"registry\.json",
    "blob": r"blobs/sha256/(?P<digest>[0-9a-f]{64})",
    "manifest": r"manifests/sha256/(?P<digest>[0-9a-f]{64})\.json",
    "attestation": r"attestations/(?P<subject>[0-9a-f]{64})/(?P<digest>[0-9a-f]{64})\.json",
    "version": rf"{_MODEL}/versions/{_NUMBERED}",
    "tombstone": rf"{_MODEL}/tombstones/{_NUMBERED}",
    "alias": rf"{_MODEL}/aliases/(?P<alias>[^/]+)/{_NUMBERED}",
    "policy": rf"policies/{_NUMBERED}",
    "lease": r"leases/[0-9a-f]{32}\.json",
    "condemned": r"condemned/[0-9a-f]{32}\.json",
    "work": r"tmp/.*",
}
_PATTERNS = {kind: re.compile(pattern, re.DOTALL) for kind, pattern in _KINDS.items()}


def place(path: str) -> tuple[str, dict[str, str]]:
    """The kind of file that belongs at a path, and what the path says of it; ("stray", {}) for nothing of Baton's."""
    for kind, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(path):
            said = match.groupdict()
            if kind == "alias" and not is_alias(said["alias"]):
                break
            return kind, said
    return "stray", {}
