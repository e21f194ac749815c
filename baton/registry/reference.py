"""References: `team/name:7`, `team/name:alias` and `team/name@sha256:<hex>`."""

import re
from dataclasses import dataclass

from baton.errors import UserError

# Each part starts with a letter or digit: no hidden files, no option-like names, no `..`.
_PART = r"[a-z0-9][a-z0-9._-]{0,99}"
_NAME = re.compile(rf"{_PART}/{_PART}")
_ALIAS = re.compile(_PART)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_FORMS = "team/name:7, team/name:alias or team/name@sha256:<64 hex digits>"


@dataclass(frozen=True)
class Reference:
    """A parsed reference; exactly one of `number`, `alias` and `digest` is set."""

    name: str
    number: int | None = None
    alias: str | None = None
    digest: str | None = None


def parse(text: str) -> Reference:
    """Read a reference; raises UserError that names the accepted forms."""
    if "@" in text:
        name, _, digest = text.partition("@")
        check_name(name, in_reference=text)
        if not _DIGEST.fullmatch(digest):
            raise UserError(f"{text!r} has {digest!r} after the '@'; expected sha256: and 64 hex digits.")
        return Reference(name, digest=digest)
    name, colon, selector = text.partition(":")
    check_name(name, in_reference=text)
    if not colon:
        raise UserError(f"{text!r} says no version; expected {_FORMS}. `baton list {text}` shows them.")
    if re.fullmatch(r"[0-9]{1,7}", selector):
        return Reference(name, number=int(selector))
    check_alias(selector)
    return Reference(name, alias=selector)


def is_reference(text: str) -> bool:
    """Whether `text` has the form of a reference (it need not exist)."""
    try:
        parse(text)
    except UserError:
        return False
    return True


def check_name(name: str, in_reference: str | None = None) -> None:
    """Raise UserError unless `name` is `team/name` in lower-case letters, digits, '.', '_' and '-'."""
    if _NAME.fullmatch(name):
        return
    found = f"{in_reference!r} is not a reference; expected {_FORMS}" if in_reference else f"bad name {name!r}"
    raise UserError(
        f"{found}. A name is team/name: two parts of lower-case letters, digits, '.', '_' and '-', "
        "each starting with a letter or digit."
    )


def check_alias(alias: str) -> None:
    """Raise UserError unless `alias` can name a version: never only digits, which would be a number."""
    if not _ALIAS.fullmatch(alias) or alias.isdigit():
        raise UserError(
            f"bad alias {alias!r}: use lower-case letters, digits, '.', '_' and '-', "
            "starting with a letter or digit, and not digits alone (that is a version number)."
        )
