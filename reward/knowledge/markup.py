"""HTML and SVG elements whose text is always escaped."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape


class Markup(str):
    """A text that is markup already: the one kind that `element` does not escape."""

    __slots__ = ()


VOID = frozenset({"meta", "line", "rect", "circle", "path", "polyline"})
"""Elements that this page writes without content."""


def element(name: str, attributes: Mapping[str, str | float] | None = None, *children: str) -> Markup:
    """An element; attributes and children are escaped unless they are Markup."""
    given = "".join(f' {key}="{escape(_shown(value))}"' for key, value in (attributes or {}).items())
    if name in VOID and not children:
        return Markup(f"<{name}{given}>" if name == "meta" else f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{joined(*children)}</{name}>")


def joined(*children: str) -> Markup:
    """Children one after another, escaped unless they are Markup."""
    return Markup("".join(child if isinstance(child, Markup) else escape(child) for child in children))


def _shown(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
