"""Promotion: what an alias means, moved by numbered records that each name the one before, so that none can fork.

A record: `{to, previous, reason, by, time, nonce}`; with gates also `gates: [{source, digest, outcomes: [{condition,
holds, found}]}]`, and after a rollback `rolled_back_from`. A move to a version that was being deleted at that very
moment is undone by a record of its own with `undoes`, the number of the record before it; its `to` is what was there
before, or null where that was nothing, or has been deleted as well.

The protocol with deletion (care/tombstones.py): a promoter records its move and then looks for a tombstone; who
deletes puts the tombstone and then looks for an alias. At least one of the two sees the other and takes back its own.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from baton.errors import UserError
from baton.registry import failpoints, provenance, records, reference
from baton.registry.stores.files import storage_errors_are_user_errors
from baton.registry.version import Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry
    from baton.registry.trust.gates import Judged

_log = logging.getLogger(__name__)


class _Last(NamedTuple):
    """An alias as it stands: its last record, and the number of that; (0, None) of one that never was."""

    number: int
    record: dict[str, Any] | None

    @property
    def to(self) -> int | None:
        """The version number that the alias means."""
        return self.record["to"] if self.record else None


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
    last, missing = _last(registry, version.name, alias)
    if missing:
        _log.warning("%s. Restore it from a backup, or by `baton fsck --from REGISTRY`.", missing)
    passed = judge(registry, version, alias, gate)
    if failed := [outcome for judged in passed for outcome in judged.outcomes if not outcome.holds]:
        raise UserError(
            f"{version.ref} may not become {version.name}:{alias}; "
            f"{len(failed)} of {sum(len(judged.outcomes) for judged in passed)} conditions fail:\n"
            + "\n".join(f"  {outcome.condition}: {outcome.found}" for outcome in failed)
        )
    failpoints.step("promote", "1-gate-passed")
    if last.record and last.to == version.number:
        return last.record
    facts = {"gates": [judged.record() for judged in passed]} if passed else {}
    return _move(registry, version.name, alias, last, version.number, reason, by, facts)


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
    what was just found bad. No gate is asked. Raises UserError when nothing was there before, or it was deleted, or
    a record is missing, without which nobody can tell what was there before.
    """
    name, alias = _alias_of(target)
    _check_reason(reason, "a rollback")
    last, missing = _last(registry, name, alias)
    if last.record is None:
        raise UserError(f"{_no_such(registry, name, alias)}: nothing to roll back.")
    if missing:
        raise UserError(
            f"{missing}, so that nobody can tell what {name}:{alias} meant before. Restore it from a backup or by "
            f"`baton fsck --from REGISTRY`, or say what it shall mean: `baton promote REF {alias} --reason TEXT`."
        )
    history = registry.alias_history(name, alias)[: last.number]
    meant = _still_standing(history)
    now = f"{name}:{last.to}" if last.to else "nothing"
    if len(meant) < 2:
        raise UserError(
            f"{name}:{alias} means {now}, and before it nothing that was not rolled back. "
            f"Promote another version: `baton promote REF {alias} --reason TEXT`."
        )
    if meant[-2] in registry.deleted_numbers(name):
        raise UserError(
            f"{name}:{alias} would go back to {name}:{meant[-2]}, which was deleted. "
            f"Promote another version: `baton promote REF {alias} --reason TEXT`."
        )
    return _move(registry, name, alias, last, meant[-2], reason, by, {"rolled_back_from": last.to})


def _last(registry: "Registry", name: str, alias: str) -> tuple[_Last, str | None]:
    """An alias as it stands, and what to say of its first record that is missing, if any is."""
    folder = records.alias_folder(name, alias)
    registry.store.see_latest(folder)
    numbers = records.numbers(registry.store, folder)
    if not numbers:
        return _Last(0, None), None
    lost = min(set(range(1, numbers[-1])) - set(numbers), default=None)
    missing = lost and f"{registry.store.describe(records.record_path(folder, lost))} is missing"
    return _Last(numbers[-1], records.read(registry.store, folder, numbers[-1], "to")), missing or None


def _move(
    registry: "Registry",
    name: str,
    alias: str,
    last: _Last,
    number: int,
    reason: str,
    by: str | None,
    facts: dict[str, Any],
) -> dict[str, Any]:
    record = {
        "to": number,
        "previous": last.to,
        "reason": reason,
        "by": by or provenance.user(),
        "time": provenance.now(),
        **facts,
    }
    folder = records.alias_folder(name, alias)
    with storage_errors_are_user_errors(f"promoting in {registry.location} failed"):
        # The number after the last that was looked at: whoever looked at the same and comes later is refused.
        if not records.write(registry.store, folder, last.number + 1, record):
            raise UserError(f"someone moved {name}:{alias} meanwhile; look again: `baton show {name}:{alias}`.")
        failpoints.step("promote", "2-alias-recorded")
        if _is_deleted(registry, name, number):
            _undo(registry, name, alias, _Last(last.number + 1, record), last.to)
    return record


def _is_deleted(registry: "Registry", name: str, number: int) -> bool:
    folder = records.tombstones_folder(name)
    for changed in (f"models/{name}", folder):
        registry.store.see_latest(changed)
    return registry.store.exists(records.record_path(folder, number))


def _undo(registry: "Registry", name: str, alias: str, move: _Last, before: int | None) -> None:
    """Take back a move to a version that was deleted meanwhile, and raise UserError that says so."""
    folder = records.alias_folder(name, alias)
    is_lost = before is not None and _is_deleted(registry, name, before)
    before = None if is_lost else before
    undoing = {
        "to": before,
        "previous": move.to,
        "reason": f"{name}:{move.to} was deleted while {alias} was moved to it",
        "by": provenance.user(),
        "time": provenance.now(),
        "undoes": move.number,
    }
    # Where somebody has moved the alias on, there is nothing to undo.
    if records.write(registry.store, folder, move.number + 1, undoing):
        if before is not None and _is_deleted(registry, name, before):
            _undo(registry, name, alias, _Last(move.number + 1, undoing), before)
        found = f"{name}:{before}" if before else "nothing"
        means = f"{name}:{alias} means {found}{', for what it meant was deleted too' if is_lost else ' as before'}"
    else:
        means = f"somebody has moved {name}:{alias} on"
    raise UserError(
        f"{name}:{move.to} was deleted, or nearly, while {name}:{alias} was moved to it; {means}. Look which it is, "
        f"and try again: `baton show {name}:{move.to}`."
    )


def _still_standing(history: list[dict[str, Any]]) -> list[int]:
    """The versions that an alias was promoted to and not rolled back from, oldest first; the last is what it means."""
    meant: list[int] = []
    done: list[dict[str, Any]] = []
    for move in history:
        if "undoes" in move:
            done.pop()
        else:
            done.append(move)
    if history[-1]["to"] is None:
        return []
    for move in done:
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
