"""The registry's policy: licences, gates and signatures that nobody has to remember to ask for.

    publish: {licences: [apache-2.0, mit]}        # of what is published, its ancestors and all their data
    aliases:                                      # a gate for each alias that a pattern covers
      prod: {metrics: [reward_accuracy >= 0.7], signatures: {keys: [team.pub]}}
      "release-*": {approvals: {at_least: 2, not_by_publisher: true}}
      "team-a/*:candidate": {lineage: {verified: true}}
    resolve: {signatures: {at_least: 1, keys: [team.pub]}}      # or it is not loaded, merged or handed out

A version is published unsigned, as there is nothing to sign before; with `resolve` it stays where it is until it is
signed. All patterns that cover an alias hold, and a gate given besides holds as well. A pattern with a ':' is
compared with `team/name:alias`, another with the alias. Rolling back asks no gate: it goes to what the alias has
meant before, and must work on the day when everything else fails.

Policies are records at policies/0000001.json and on, each replacing the one before; public keys lie in them as text.

This policy binds programs, not attackers: whoever can write to the store can write records around it, and a policy
that is stored beside what it guards can be replaced by another. What holds in spite of that is what a reader checks
by itself: digests from the manifest down, and signatures by keys that the reader had before. So a reader who does not
trust the store names a policy file of its own in the environment variable BATON_POLICY; it holds besides the
registry's. Even then a signature says that a manifest is genuine, not that it is the newest: who can write to the store
can show an older signed version under an alias. Pin a digest where that matters.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError, field_validator

from baton.errors import UserError
from baton.registry import provenance, records
from baton.registry.history import licences
from baton.registry.stores.files import storage_errors_are_user_errors
from baton.registry.trust.attestations import check_who
from baton.registry.trust.gates import Gate, Licences, Signatures, judge_signatures, read_yaml
from baton.registry.version import Version
from baton.strict import Strict, explain

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry

FOLDER = "policies"
OWN = "BATON_POLICY"
"""The environment variable that names a reader's own policy file."""


class PublishRules(Strict):
    """What may be published."""

    licences: Licences


class ResolveRules(Strict):
    """What may be loaded, merged and handed out."""

    signatures: Signatures


class Rules(Strict):
    """A policy's content; an empty one asks for nothing."""

    publish: PublishRules | None = None
    aliases: dict[str, Gate] = {}
    resolve: ResolveRules | None = None

    @field_validator("aliases")
    @classmethod
    def _patterns(cls, aliases: dict[str, Gate]) -> dict[str, Gate]:
        for pattern in aliases:
            if not pattern.strip() or pattern != pattern.strip().lower():
                raise ValueError(f"{pattern!r} covers no alias: they are of lower-case letters, digits, '.', '_', '-'")
        return aliases


@dataclass(frozen=True)
class Policy:
    """Rules with who set them; number: of the registry's record, None for a reader's own file."""

    number: int | None
    rules: Rules
    by: str
    time: str
    source: str


def current(registry: Registry) -> Policy | None:
    """The registry's policy; None when it has none. Raises UserError for one that cannot be read."""
    numbers = records.numbers(registry.store, FOLDER)
    return _stored(registry, numbers[-1]) if numbers else None


def history(registry: Registry) -> list[Policy]:
    """Every policy that the registry has had, oldest first."""
    return [_stored(registry, number) for number in records.numbers(registry.store, FOLDER)]


def in_force(registry: Registry) -> list[Policy]:
    """The registry's policy, and the reader's own where BATON_POLICY names one."""
    found = [stored] if (stored := current(registry)) else []
    if path := os.environ.get(OWN):
        found.append(Policy(None, load_rules(Path(path)), provenance.user(), "", f"{OWN}={path}"))
    return found


def load_rules(path: Path) -> Rules:
    """Read a policy file; public keys are read from the files that it names."""
    return _rules(str(path), read_yaml(path), {"folder": path.parent})


def set_policy(registry: Registry, path: Path, by: str | None = None) -> Policy:
    """Make a file the registry's policy from now on; the same again adds nothing."""
    rules = load_rules(path)
    registry.store.see_latest(FOLDER)
    before = current(registry)
    if before is not None and before.rules == rules:
        return before
    by = by or provenance.user()
    check_who(by)
    number = before.number + 1 if before is not None and before.number else 1
    content = rules.model_dump(mode="json", by_alias=True, exclude_none=True)
    record = {"policy": content, "by": by, "time": provenance.now()}
    with storage_errors_are_user_errors(f"setting the policy of {registry.location} failed"):
        if not records.write(registry.store, FOLDER, number, record):
            raise UserError("someone set another policy meanwhile; look again: `baton policy`.")
    return _stored(registry, number)


def gates_for(registry: Registry, name: str, alias: str) -> list[tuple[str, Gate]]:
    """The gates that the policies in force put before `name:alias`, each with where it stands."""
    return [
        (f"{policy.source}, {pattern}", gate)
        for policy in in_force(registry)
        for pattern, gate in policy.rules.aliases.items()
        if fnmatchcase(f"{name}:{alias}" if ":" in pattern else alias, pattern)
    ]


def allowed_licences(registry: Registry, asked: list[str] | None) -> list[str] | None:
    """The licences that may be published: those that the publisher and every policy in force allow; None: any."""
    allowed = asked
    for policy in in_force(registry):
        if policy.rules.publish is not None:
            listed = policy.rules.publish.licences
            allowed = listed if allowed is None else [name for name in allowed if licences.is_allowed(name, listed)]
    return allowed


def check_arrival(registry: Registry, closure: Mapping[str, dict[str, Any]]) -> None:
    """Refuse what comes from another registry with a licence that the policies in force do not let in.

    closure: manifests by digest with all their ancestors, which need not be stored here yet.
    """
    allowed = allowed_licences(registry, None)
    if allowed is None:
        return
    wrong = []
    for digest, content in closure.items():
        own = licences.licences_of(registry, {"licence": content["licence"], "data": content["data"]})
        wrong += [f"  {digest}: {line}\n" for line in licences.conflicts(own, allowed)]
    if wrong:
        raise UserError(
            f"the policy of {registry.location} lets in only the licences {', '.join(allowed) or 'none'}:\n"
            + "".join(wrong)
            + "Nothing was brought in. Leave it, or change the policy: `baton policy FILE`."
        )


def problems(registry: Registry, version: Version) -> list[str]:
    """Why the policies in force do not let a version be loaded; empty when they do."""
    found = []
    for policy in in_force(registry):
        if policy.rules.resolve is not None:
            try:
                outcome = judge_signatures(registry, version, policy.rules.resolve.signatures)
            except UserError as error:  # a damaged attestation
                found.append(f"{version.ref} cannot be held against {policy.source}: {error}")
                continue
            if not outcome.holds:
                found.append(f"{version.ref} must be {outcome.condition} ({policy.source}): {outcome.found}")
    return found


def check_loading(registry: Registry, version: Version) -> None:
    """Raise UserError unless the policies in force let a version be loaded, merged or handed out."""
    if found := problems(registry, version):
        raise UserError("; ".join(found) + f". To sign it: `baton sign {version.ref} --key PRIVATE.pem`.")


def _stored(registry: Registry, number: int) -> Policy:
    record = records.read(registry.store, FOLDER, number, "policy")
    where = registry.store.describe(records.record_path(FOLDER, number))
    rules = _rules(where, record["policy"], None)
    return Policy(number, rules, str(record.get("by")), str(record.get("time")), f"policy {number}")


def _rules(where: str, content: Any, context: dict[str, Any] | None) -> Rules:
    try:
        return Rules.model_validate(content, context=context)
    except ValidationError as error:
        raise UserError(explain(where, Rules, error)) from None
