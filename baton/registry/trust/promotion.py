"""Promotion: what an alias means, moved by numbered records that each name the one before, so that none can fork.

A record: `{to, previous, reason, by, time, nonce}`; with gates also `gates: [{source, digest, outcomes: [{condition,
holds, found}]}]`, and after a rollback `rolled_back_from`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.errors import UserError
from baton.registry import failpoints, provenance, records, reference
from baton.registry.stores.files import full_disk_is_user_error
from baton.registry.version import Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry
    from baton.registry.trust.gates import Judged


def promote(
    registry: "Registry", ref: str, alias: str, reason: str, by: str | None = None, gate: Path | None = None
) -> dict[str, Any]:
    """Make `alias` mean the version, if the policy's gates and `gate` hold; returns the record.

    That is the last record if the alias means the version already. Raises UserError with every condition that fails,
    and when another promoter came first.
    """
    reference.check_alias(alias)
    _check_reason(reason, "a promotion")
    version = registry.resolve(ref)
    registry.store.see_latest(records.alias_folder(version.name, alias))
    history = registry.alias_history(version.name, alias)
    passed = judge(registry, version, alias, gate)
    if failed := [outcome for judged in passed for outcome in judged.outcomes if not outcome.holds]:
        raise UserError(
            f"{version.ref} may not become {version.name}:{alias}; "
            f"{len(failed)} of {sum(len(judged.outcomes) for judged in passed)} conditions fail:\n"
            + "\n".join(f"  {outcome.condition}: {outcome.found}" for outcome in failed)
        )
    failpoints.step("promote", "1-gate-passed")
    if history and history[-1]["to"] == version.number:
        return history[-1]
    facts = {"gates": [judged.record() for judged in passed]} if passed else {}
    return _move(registry, version.name, alias, history, version.number, reason, by, facts)


def judge(registry: "Registry", version: Version, alias: str, gate: Path | None = None) -> "list[Judged]":
    """What `promote` would find: the outcomes of the policy's gates for the alias, and of `gate`."""
    from baton.registry.trust import policy
    from baton.registry.trust.gates import Judged, evaluate, load_gate

    gates = policy.gates_for(registry, version.name, alias)
    if gate is not None:
        gates.append((gate.name, load_gate(gate)))
    return [Judged(source, asked.digest, evaluate(registry, version, asked, alias)) for source, asked in gates]


def rollback(registry: "Registry", target: str, reason: str, by: str | None = None) -> dict[str, Any]:
    """Make `team/name:alias` mean what it meant before its last promotion; returns the new record.

    A promotion that was rolled back counts no longer: a second rollback goes one further back, and never forward to
    what was just found bad. No gate is asked. Raises UserError when nothing was there before, or it was deleted.
    """
    name, alias = _alias_of(target)
    _check_reason(reason, "a rollback")
    registry.store.see_latest(records.alias_folder(name, alias))
    history = registry.alias_history(name, alias)
    if not history:
        raise UserError(f"{_no_such(registry, name, alias)}: nothing to roll back.")
    meant = _still_standing(history)
    now = history[-1]["to"]
    if len(meant) < 2:
        raise UserError(
            f"{name}:{alias} means {name}:{now}, and before it nothing that was not rolled back. "
            f"Promote another version: `baton promote REF {alias} --reason TEXT`."
        )
    if meant[-2] in registry.deleted_numbers(name):
        raise UserError(
            f"{name}:{alias} would go back to {name}:{meant[-2]}, which was deleted. "
            f"Promote another version: `baton promote REF {alias} --reason TEXT`."
        )
    return _move(registry, name, alias, history, meant[-2], reason, by, {"rolled_back_from": now})


def _move(
    registry: "Registry",
    name: str,
    alias: str,
    history: list[dict[str, Any]],
    number: int,
    reason: str,
    by: str | None,
    facts: dict[str, Any],
) -> dict[str, Any]:
    record = {
        "to": number,
        "previous": history[-1]["to"] if history else None,
        "reason": reason,
        "by": by or provenance.user(),
        "time": provenance.now(),
        **facts,
    }
    with full_disk_is_user_error(f"promoting in {registry.location} failed"):
        # The number after those that were looked at: whoever looked at the same ones and comes later is refused.
        if not records.write(registry.store, records.alias_folder(name, alias), len(history) + 1, record):
            raise UserError(f"someone moved {name}:{alias} meanwhile; look again: `baton show {name}:{alias}`.")
    failpoints.step("promote", "2-alias-recorded")
    return record


def _still_standing(history: list[dict[str, Any]]) -> list[int]:
    """The versions that an alias was promoted to and not rolled back from, oldest first; the last is what it means."""
    meant: list[int] = []
    for move in history:
        if "rolled_back_from" not in move:
            meant.append(move["to"])
            continue
        meant = meant[:-1]
        while meant and meant[-1] != move["to"]:
            meant.pop()
        meant = meant or [move["to"]]
    return meant


def _alias_of(target: str) -> tuple[str, str]:
    parsed = reference.parse(target)
    if parsed.alias is None:
        raise UserError(f"{target!r} is a version, which never changes; a rollback needs NAME:ALIAS.")
    return parsed.name, parsed.alias


def _no_such(registry: "Registry", name: str, alias: str) -> str:
    try:
        registry.resolve(f"{name}:{alias}")
    except UserError as error:
        return str(error).rstrip(".")
    return f"{name}:{alias} was made just now"


def _check_reason(reason: str, what: str) -> None:
    if not reason.strip():
        raise UserError(f"{what} needs a reason: say why this version (--reason TEXT).")
