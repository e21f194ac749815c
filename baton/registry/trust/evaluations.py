"""Evaluations: metrics that somebody measured of a version after it was published, beside its publisher's own."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from baton.errors import UserError
from baton.registry.trust import attestations
from baton.registry.trust.attestations import Attestation
from baton.registry.version import Version

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry

PUBLISHER = "the publisher"
_NOT_FINITE = ("nan", "inf", "-inf")  # as a manifest spells what JSON cannot say


@dataclass(frozen=True)
class Value:
    """A metric's value, which may be nan, and who says so: a name, or `PUBLISHER`.

    is_hearsay: it was measured in another registry, and signed by no key that is trusted. It can make a condition fail
    and cannot make one hold.
    """

    number: float
    by: str
    is_hearsay: bool = False

    def __str__(self) -> str:
        """`0.75 by ann`."""
        text = f"{repr(self.number).removesuffix('.0')} by {self.by}"
        return f"{text} (elsewhere, signed by none of the gate's keys)" if self.is_hearsay else text


def record(
    registry: "Registry", version: Version, metrics: dict[str, float], by: str | None = None, note: str | None = None
) -> Attestation:
    """Attest metrics of a version, each a finite number under a name; raises UserError for anything else."""
    if not metrics:
        raise UserError("an evaluation needs a metric, such as win_rate=0.62.")
    for name, value in metrics.items():
        if not name or any(c.isspace() or c in "<>=!" or not c.isprintable() for c in name):
            raise UserError(f"bad metric name {name!r}: one word without '<', '>', '=' and '!', such as eval/win_rate.")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{name} is {value!r}; expected a finite number.")
    return attestations.attest(registry, version.digest, "evaluation", {"metrics": metrics, "note": note}, by)


def parse_assignments(words: list[str]) -> dict[str, float]:
    """`["win_rate=0.6"]` as `{"win_rate": 0.6}`; raises UserError for what is no number or comes twice."""
    metrics: dict[str, float] = {}
    for word in words:
        name, equals, text = word.rpartition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not equals or not math.isfinite(value):
            raise UserError(f"{word!r} is not METRIC=VALUE with a finite number, such as win_rate=0.62.")
        if name in metrics:
            raise UserError(f"{name} is given twice: {metrics[name]} and {value}.")
        metrics[name] = value
    return metrics


def values(registry: "Registry", version: Version, keys: Sequence[str] = ()) -> dict[str, list[Value]]:
    """Every value of every metric: the publisher's first, then each evaluation's, oldest first.

    A later evaluation does not replace an earlier one, not even of the same person: else one could measure until
    the number is good. Nested metrics are named by '/'. keys: public keys (PEM texts) whose signature makes an
    evaluation from another registry count. Raises UserError for an evaluation that it cannot read.
    """
    found: dict[str, list[Value]] = {}
    for name, number in _numbers(version.manifest["metrics"]):
        found.setdefault(name, []).append(Value(number, PUBLISHER))
    elsewhere = attestations.arrived(registry, version.digest)
    for said in attestations.of(registry, version.digest, "evaluation"):
        metrics = said.body.get("metrics")
        if not isinstance(metrics, dict):
            raise UserError(
                f"{registry.store.describe(attestations.path_of(said))} is an evaluation without metrics: "
                "no gate can be judged. Update Baton if a newer one wrote it."
            )
        for name, number in _numbers(metrics):
            is_hearsay = said.digest in elsewhere and not _is_signed(registry, said, keys)
            found.setdefault(name, []).append(Value(number, said.by, is_hearsay))
    return found


def _is_signed(registry: "Registry", said: Attestation, keys: Sequence[str]) -> bool:
    if not keys:
        return False
    from baton.registry.trust import signing

    checked = signing.verify_signatures(registry, said.subject, keys, of=said.digest)
    return any(signature.problem is None for signature in checked)


def _numbers(metrics: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif value in _NOT_FINITE or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            try:
                yield prefix + name, float(value)
            except OverflowError:  # an integer of more digits than a float can have
                yield prefix + name, math.inf
