"""Reading a registry for people: what is damaged becomes a message beside what is whole."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from baton.errors import UserError
from baton.registry import records
from baton.registry.trust import attestations
from baton.registry.trust.attestations import Attestation

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry

Found = TypeVar("Found")
# A record or manifest may be whole by its digest and still hold what nobody would write: the page then says so.
ODD = (UserError, LookupError, TypeError, ValueError, AttributeError, RecursionError, AssertionError)


class Problems(list[str]):
    """What could not be shown on a page, in words."""

    def attempt(self, what: str, read: Callable[[], Found]) -> Found | None:
        """What `read` gives; None, and a problem noted, when it cannot."""
        try:
            return read()
        except ODD as error:
            self.append(str(error) if isinstance(error, UserError) else f"{what} cannot be shown: {error!r}")
            return None


class Row(NamedTuple):
    """A version in a list; `record` is None when it is damaged or deleted, and `note` says why."""

    number: int
    record: dict[str, Any] | None
    aliases: list[str]
    note: str | None = None
    is_deleted: bool = False

    @property
    def kind(self) -> str:
        """Its kind, as the record says."""
        return str(self.record.get("kind", "")) if self.record else ""


def rows(registry: "Registry", name: str, numbers: list[int], aliases: dict[str, int]) -> list[Row]:
    """The versions with these numbers, in their order; only their own records are read."""
    deleted = set(registry.deleted_numbers(name))
    found = []
    for number in numbers:
        named = sorted(alias for alias, target in aliases.items() if target == number)
        problems = Problems()
        if number in deleted:
            stone = problems.attempt("its deletion", lambda n=number: tombstone(registry, name, n))  # type: ignore[misc]
            note = f"deleted by {stone.get('by')}: {stone.get('why')}" if stone else problems[0]
            found.append(Row(number, None, named, note, is_deleted=True))
            continue
        record = problems.attempt("its record", lambda n=number: version_record(registry, name, n))  # type: ignore[misc]
        found.append(Row(number, record, named, problems[0] if problems else None))
    return found


def version_record(registry: "Registry", name: str, number: int) -> dict[str, Any]:
    """A version's record: `{number, digest, kind, identity, by, time, …}`."""
    return records.read(registry.store, records.versions_folder(name), number, "digest")


def tombstone(registry: "Registry", name: str, number: int) -> dict[str, Any]:
    """A deleted version's record: `{why, by, time, …}`."""
    return records.read(registry.store, records.tombstones_folder(name), number, "why")


def aliases(registry: "Registry", name: str, problems: Problems) -> dict[str, int]:
    """Each alias with the number that it means now, without those whose last record is damaged."""
    found = {}
    for alias in records.alias_names(registry.store, name):
        folder = records.alias_folder(name, alias)
        if moves := records.numbers(registry.store, folder):
            record = problems.attempt(f"the alias {alias}", lambda f=folder, m=moves: _move(registry, f, m[-1]))  # type: ignore[misc]
            if record and record["to"] is not None:
                found[alias] = int(record["to"])
    return found


class Alias(NamedTuple):
    """An alias with all its moves, newest first, and the gates that a policy puts before it: (where, what)."""

    name: str
    to: int | None
    moves: list[dict[str, Any]]
    gates: list[tuple[str, dict[str, Any]]]


def alias_histories(registry: "Registry", name: str, problems: Problems) -> list[Alias]:
    """Every alias of a model with its whole history."""
    found = []
    for alias in records.alias_names(registry.store, name):
        folder = records.alias_folder(name, alias)
        moves = []
        numbers = records.numbers(registry.store, folder)
        for number in reversed(numbers):
            record = problems.attempt(f"the alias {alias}", lambda f=folder, n=number: _move(registry, f, n))  # type: ignore[misc]
            if record:
                moves.append({**record, "move": number})
        is_whole = bool(moves) and moves[0]["move"] == numbers[-1]
        gates = problems.attempt(f"the gates of {alias}", lambda a=alias: _gates(registry, name, a)) or []  # type: ignore[misc]
        found.append(Alias(alias, moves[0]["to"] if is_whole else None, moves, gates))
    return found


def _gates(registry: "Registry", name: str, alias: str) -> list[tuple[str, dict[str, Any]]]:
    from baton.registry.trust import policy

    asked = policy.gates_for(registry, name, alias)
    return [(source, gate.model_dump(mode="json", by_alias=True, exclude_defaults=True)) for source, gate in asked]


def _move(registry: "Registry", folder: str, number: int) -> dict[str, Any]:
    return records.read(registry.store, folder, number, "to")


def said(registry: "Registry", digest: str, problems: Problems) -> list[Attestation]:
    """What was said of a version, oldest first, without damaged records."""
    folder = attestations.folder_of(digest)
    stored = registry.store.get_many([f"{folder}/{name}" for name in registry.store.list(folder)])
    found = []
    for path, data in stored.items():
        where = registry.store.describe(path)
        parsed = problems.attempt(where, lambda d=data, w=where: attestations.parse(d, digest, w))  # type: ignore[misc]
        if parsed and attestations.path_of(parsed) != path:
            problems.append(f"{where} is damaged: its content has the digest {parsed.digest}.")
        elif parsed:
            found.append(parsed)
    return sorted(found, key=lambda a: (a.time, a.digest))
