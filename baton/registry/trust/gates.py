"""Gates: what must hold of a version before an alias may mean it, as a GATE.yaml states it.

    metrics:                    # each must hold of every value: the publisher's and every evaluation's
      - reward_accuracy >= 0.7
      - eval/win_rate > current     # better than what the alias means now; holds while it means nothing
    lineage: {verified: true, licences: [apache-2.0, mit]}      # of the version, its ancestors and all their data
    approvals: {at_least: 2, from: [ann, bob, eve], not_by_publisher: true, keys: [ann.pub, bob.pub]}
    signatures: {at_least: 1, keys: [team.pub]}

What was approved or measured in another registry, and came here with a bundle or a push, counts only when one of the
gate's keys signed it; its measurements can make a condition fail all the same.

A key is a PEM file beside the gate, or its text. `approvals.keys` makes every approval that counts a signed one:
without it a name is only a claim of who may write to the registry, and so is the publisher's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, model_validator

from baton.errors import UserError, nearest
from baton.registry import manifest as manifests
from baton.registry.history import licences
from baton.registry.trust import approvals, conditions, evaluations, signing
from baton.registry.trust.conditions import Condition
from baton.registry.trust.evaluations import Value
from baton.registry.version import Version
from baton.strict import Positive, Strict, explain

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry

SHOWN = 5  # of a long list in a message


def _condition(text: str) -> str:
    try:
        return str(conditions.parse(text))
    except UserError as error:
        raise ValueError(str(error)) from None


def _allowed(names: list[str]) -> list[str]:
    try:
        licences.check_allowed(names)
    except UserError as error:
        raise ValueError(str(error)) from None
    return names


def _public_key(text: str, info: ValidationInfo) -> str:
    folder = info.context["folder"] if info.context else None
    try:
        return signing.read_public_key(text, folder)
    except UserError as error:
        raise ValueError(str(error)) from None


_Names = Annotated[list[str], Field(min_length=1)]
PublicKeys = Annotated[list[Annotated[str, AfterValidator(_public_key)]], Field(min_length=1)]
Licences = Annotated[list[str], Field(min_length=1), AfterValidator(_allowed)]


class Lineage(Strict):
    """verified: all files and records of the version and its ancestors; licences: an allow-list for all of them."""

    verified: bool = False
    licences: Licences | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.verified and self.licences is None:
            raise ValueError("says nothing; set verified: true, or licences: [...]")
        return self


class Approvals(Strict):
    """How many people must approve, and which of them count."""

    at_least: Positive = 1
    wanted: Annotated[_Names | None, Field(alias="from")] = None
    not_by_publisher: bool = False
    keys: PublicKeys | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for key, listed in (("from", self.wanted), ("keys", self.keys)):
            if listed is not None and len(set(listed)) < self.at_least:
                raise ValueError(f"at_least {self.at_least} can never hold: {key} lists only {len(set(listed))}")
        return self


class Signatures(Strict):
    """How many of these keys must have signed the manifest."""

    at_least: Positive = 1
    keys: PublicKeys

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if len(set(self.keys)) < self.at_least:
            raise ValueError(f"at_least {self.at_least} can never hold: keys lists only {len(set(self.keys))}")
        return self


class Gate(Strict):
    """Conditions that must all hold."""

    metrics: list[Annotated[str, AfterValidator(_condition)]] = []
    lineage: Lineage | None = None
    approvals: Approvals | None = None
    signatures: Signatures | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not (self.metrics or self.lineage or self.approvals or self.signatures):
            raise ValueError("a gate without conditions lets everything pass; state metrics, lineage, approvals or …")
        return self

    @property
    def keys(self) -> list[str]:
        """All its public keys, as PEM texts."""
        parts = (self.approvals, self.signatures)
        return [key for part in parts if part is not None for key in part.keys or []]

    @property
    def digest(self) -> str:
        """`sha256:<hex>` of what it demands, keys included."""
        return manifests.digest_of(manifests.canonical(self.model_dump(mode="json", by_alias=True)))


@dataclass(frozen=True)
class Outcome:
    """One condition, whether it holds, and what was found."""

    condition: str
    holds: bool
    found: str


@dataclass(frozen=True)
class Judged:
    """A gate's outcomes; source: the file's name, or the policy that demands it."""

    source: str
    digest: str
    outcomes: list[Outcome]

    def record(self) -> dict[str, Any]:
        """As an alias's record keeps it."""
        return asdict(self)


def load_gate(source: Path | Mapping[str, Any]) -> Gate:
    """Read a GATE.yaml, or the same as a mapping; raises UserError with every mistake and the nearest valid key."""
    where, folder = (str(source), source.parent) if isinstance(source, Path) else ("the gate", Path())
    content = read_yaml(source) if isinstance(source, Path) else source
    try:
        return Gate.model_validate(content, context={"folder": folder})
    except ValidationError as error:
        raise UserError(explain(where, Gate, error)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; a key given twice is an error, as its first value would be ignored."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError:
        beside = sorted(str(p) for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        near = nearest(str(path), beside) or beside[:SHOWN]
        raise UserError(f"there is no file {path}" + (f"; there is {', '.join(near)}" if near else "")) from None
    except (YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no keys; expected a YAML mapping.")
    return {str(key): value for key, value in content.items()}


def evaluate(registry: Registry, version: Version, gate: Gate, alias: str) -> list[Outcome]:
    """Whether each condition of a gate holds of a version that `alias` of its model is to mean."""
    found = []
    if gate.metrics:
        keys = gate.keys
        mine = evaluations.values(registry, version, keys)
        current = _current(registry, version, alias)
        theirs = {} if isinstance(current, str) else evaluations.values(registry, current, keys)
        found += [_metric(conditions.parse(text), version, mine, alias, current, theirs) for text in gate.metrics]
    if gate.lineage:
        found += _lineage(registry, version, gate.lineage)
    if gate.approvals:
        found.append(_approvals(registry, version, gate.approvals))
    if gate.signatures:
        found.append(judge_signatures(registry, version, gate.signatures))
    return found


def judge_signatures(registry: Registry, version: Version, wanted: Signatures) -> Outcome:
    """Whether so many of the keys have signed the version's manifest."""
    keys, others = signing.require(registry, version.digest, wanted.keys)
    found = f"{len(keys)} signed it" + "".join(f"; {text}" for text in others[:SHOWN])
    return Outcome(
        f"signed by at least {wanted.at_least} of {_named(wanted.keys)}", len(keys) >= wanted.at_least, found
    )


def _metric(
    condition: Condition,
    version: Version,
    mine: dict[str, list[Value]],
    alias: str,
    current: Version | str,
    theirs: dict[str, list[Value]],
) -> Outcome:
    values, text = mine.get(condition.metric), str(condition)
    if values is None:
        return Outcome(text, False, f"{version.ref} has no metric {condition.metric}; {_known(condition, mine)}")
    if all(value.is_hearsay for value in values):
        return Outcome(text, False, f"{_listed(values)}; measure it here: `baton attest {version.ref} …`")
    listed = _listed(values)
    if not condition.is_relative:
        return Outcome(text, all(condition.holds(value.number) for value in values), listed)
    if isinstance(current, str):
        return Outcome(text, all(math.isfinite(value.number) for value in values), f"{listed}; {current}")
    others = theirs.get(condition.metric)
    if others is None or all(other.is_hearsay for other in others):
        found = (
            f"{current.ref} of {alias} has no metric {condition.metric}; {_known(condition, theirs)}. "
            f"Measure it: `baton attest {current.ref} {condition.metric}=… --as NAME`"
        )
        return Outcome(text, False, f"{listed}; {found}")
    holds = all(condition.holds(value.number, other.number) for value in values for other in others)
    return Outcome(text, holds, f"{listed}; against {current.ref} of {alias}: {_listed(others)}")


def _current(registry: Registry, version: Version, alias: str) -> Version | str:
    """What the alias means, or meant before it meant this very version; or why that is nothing, in words."""
    history = registry.alias_history(version.name, alias)
    number = history[-1]["to"] if history else None
    if number == version.number:
        number = history[-1].get("previous")  # so that promoting twice has one answer
    if number is None:
        is_first = not history or history[-1]["to"] != version.number
        return f"{version.name}:{alias} " + ("means nothing yet" if is_first else f"meant nothing before {version.ref}")
    if number in registry.deleted_numbers(version.name):
        return f"{version.name}:{number}, which {alias} meant, was deleted"
    return registry.resolve(f"{version.name}:{number}")


def _lineage(registry: Registry, version: Version, wanted: Lineage) -> list[Outcome]:
    found = []
    if wanted.verified:
        problems = registry.verify(version)
        found.append(Outcome("lineage: verified", not problems, _first(problems) or "every file and record is whole"))
    if wanted.licences is not None:
        wrong = licences.conflicts(licences.licences_of(registry, version.manifest), wanted.licences)
        condition = f"lineage: licences among {', '.join(wanted.licences)}"
        found.append(Outcome(condition, not wrong, _first(wrong) or "all are"))
    return found


def _approvals(registry: Registry, version: Version, wanted: Approvals) -> Outcome:
    counted = approvals.count(registry, version, wanted.wanted, wanted.not_by_publisher, wanted.keys)
    condition = f"approvals: at least {wanted.at_least}"
    if wanted.wanted is not None:
        condition += f" from {', '.join(wanted.wanted)}"
    if wanted.not_by_publisher:
        condition += ", not by the publisher"
    if wanted.keys is not None:
        condition += f", signed by {_named(wanted.keys)}"
    found = f"{counted.number}" + (f": {', '.join(counted.counted)}" if counted.counted else "")
    found += "".join(f"; {text}" for text in counted.others[:SHOWN])
    return Outcome(condition, counted.number >= wanted.at_least, found)


def _known(condition: Condition, values: dict[str, list[Value]]) -> str:
    near = nearest(condition.metric, list(values)) or sorted(values)[:SHOWN]
    return f"it has {', '.join(near) or 'none'}"


def _listed(values: list[Value]) -> str:
    return ", ".join(map(str, values))


def _first(lines: list[str]) -> str:
    more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return "; ".join(lines[:SHOWN]) + more


def _named(keys: list[str]) -> str:
    return ", ".join(f"key {signing.fingerprint(key)[:19]}…" for key in keys)
