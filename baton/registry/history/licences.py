"""Licences: what a version inherits from its ancestors and their data, and whether an allow-list permits it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from baton.errors import UserError

if TYPE_CHECKING:
    from baton.registry.catalogue import Registry

UNKNOWN = "unknown"
_MAX_CHARACTERS = 400  # longer is no licence expression; it bounds how deep brackets can nest as well
_TOKEN = re.compile(r"[()]|[^\s()]+")


class Holding(NamedTuple):
    """One licence, as it was stated; None where none was."""

    licence: str | None
    kind: Literal["model", "data"]
    what: str  # a data source's path and use, or a model's role
    digest: str | None  # the version that states it; None for what is about to be published


@dataclass(frozen=True)
class Licences:
    """Every licence that a version stands under: its own, its data's, and all its ancestors' and theirs."""

    registry: "Registry"
    holdings: tuple[Holding, ...]


def gather(own: str | None, ancestors: Sequence[Mapping[str, Any]], data: Sequence[Any]) -> dict[str, list[str]]:
    """The manifest's field `licences`: `{"models": [...], "data": [...]}`, sorted, each once, in SPDX's spelling.

    ancestors: the manifests of the base and the parents, whose own fields hold their ancestors' licences. What states
    none is listed as "unknown".
    """
    models, sources = {spelling(own)}, {spelling(_licence_of(row)) for row in data}
    for manifest in ancestors:
        inherited = manifest["licences"]
        models |= set(inherited["models"])
        sources |= set(inherited["data"])
    return {"models": sorted(models), "data": sorted(sources)}


def licences_of(registry: "Registry", content: Mapping[str, Any]) -> Licences:
    """Who states which licence, for a manifest or for the parts of one that is about to be published.

    content: `licence`, `data`, `base` and `parents`, as in a manifest; a part left out is empty.
    """
    holdings = list(_stated(content, "the version itself", None))
    seen: set[str] = set()
    waiting = list(_ancestors(content))
    while waiting:
        role, digest = waiting.pop(0)
        if digest not in seen:
            seen.add(digest)
            manifest = registry.manifest(digest)
            holdings += _stated(manifest, role, digest)
            waiting += _ancestors(manifest)
    return Licences(registry, tuple(holdings))


def refuse(licences: Licences, allowed: Sequence[str]) -> None:
    """Raise UserError that names every ancestor and data source whose licence is not among `allowed`."""
    if found := conflicts(licences, allowed):
        raise UserError(
            f"licences outside the allowed ones ({', '.join(allowed) or 'none'}):\n"
            + "".join(f"  {line}\n" for line in found)
            + "Leave these out, or add their licence to allowed_licences if your use is permitted. Where none is "
            "stated, find out and state it: licence: in the recipe, on the data source, or --licence on publishing."
        )


def conflicts(licences: Licences, allowed: Sequence[str]) -> list[str]:
    """A line for each model and data source whose licence is not among `allowed`; empty when all are."""
    check_allowed(allowed)
    wrong = [holding for holding in licences.holdings if not is_allowed(holding.licence, allowed)]
    references = licences.registry.references() if any(holding.digest for holding in wrong) else {}
    return [_line(holding, references) for holding in wrong]


def is_allowed(licence: str | None, allowed: Sequence[str]) -> bool:
    """Whether a licence is among `allowed`, capitals aside.

    Of `A OR B` one must be, of `A AND B` both. A licence that is not stated is allowed only by the entry "unknown".
    """
    names = {spelling(entry).casefold() for entry in allowed}
    text = spelling(licence)
    if text.casefold() in names:
        return True
    tokens = _TOKEN.findall(text) if _canonical(text) else [text]
    return _either(tokens, names)


def check_allowed(allowed: Sequence[str]) -> None:
    """Raise UserError unless every entry of an allow-list is one licence."""
    for entry in allowed:
        if not entry.strip() or {"AND", "OR"} & set(_TOKEN.findall(entry.upper())):
            raise UserError(
                f"allowed_licences: {entry!r} is not one licence; list SPDX identifiers one by one, such as "
                '[MIT, Apache-2.0], and "unknown" to allow what states none.'
            )


def spelling(licence: str | None) -> str:
    """SPDX's spelling of an identifier or expression; "unknown" for none, anything else as it is."""
    text = (licence or "").strip()
    if not text or text.casefold() == UNKNOWN:
        return UNKNOWN
    return _canonical(text) or text


@lru_cache(maxsize=1024)
def _canonical(text: str) -> str | None:
    """The expression in SPDX's spelling; None for what SPDX does not know, such as `llama3.1`."""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    if len(text) > _MAX_CHARACTERS:
        return None
    try:
        return str(canonicalize_license_expression(text))
    except InvalidLicenseExpression:
        return None


def _either(tokens: list[str], names: set[str]) -> bool:
    """Evaluate a valid expression from its tokens, which are consumed; AND binds more closely than OR."""
    holds = _both(tokens, names)
    while tokens and tokens[0] == "OR":
        tokens.pop(0)
        holds = _both(tokens, names) or holds  # in this order: the tokens must be consumed
    return holds


def _both(tokens: list[str], names: set[str]) -> bool:
    holds = True
    while True:
        word = tokens.pop(0)
        if word == "(":
            holds = _either(tokens, names) and holds
            tokens.pop(0)
        else:
            if tokens[:1] == ["WITH"]:  # an exception makes another licence of it
                word = f"{word} WITH {tokens[1]}"
                del tokens[:2]
            holds = word.casefold() in names and holds
        if tokens[:1] != ["AND"]:
            return holds
        tokens.pop(0)


def _ancestors(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from (content.get("parents") or {}).items()
    if content.get("base"):
        yield "base", content["base"]


def _stated(content: Mapping[str, Any], role: str, digest: str | None) -> Iterator[Holding]:
    yield Holding(_text(content.get("licence")), "model", role, digest)
    for row in content.get("data") or []:
        facts = row if isinstance(row, dict) else {}
        use = f" ({facts['use']})" if facts.get("use") else ""
        yield Holding(_licence_of(row), "data", f"{facts.get('path') or 'a source without a name'}{use}", digest)


def _licence_of(row: Any) -> str | None:
    return _text(row.get("licence")) if isinstance(row, dict) else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _line(holding: Holding, references: Mapping[str, list[str]]) -> str:
    says = "states no licence" if spelling(holding.licence) == UNKNOWN else f"has {holding.licence}"
    ref = next(iter(references.get(holding.digest or "", [])), holding.digest)
    if holding.kind == "data":
        return f"data {holding.what}{f' of {ref}' if ref else ''} {says}"
    return f"{holding.what}{f' {ref}' if ref else ''} {says}"
