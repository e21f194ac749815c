"""From texts to HTML: everything escaped, every character kept, code readable."""

import json
import re
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined

# A fence opens with three or more of one sign and closes with as many: what is between is code. One that is never
# closed, as of a reply that was cut off, reaches to the end.
_FENCED = re.compile(r"^ {0,3}(?P<fence>```+|~~~+)[^\n]*\n.*?(?:^ {0,3}(?P=fence)[ \t]*(?:\n|\Z)|\Z)", re.M | re.S)


class Piece(NamedTuple):
    """A stretch of a text; all of them together are the text."""

    text: str
    is_code: bool


@cache
def environment() -> Environment:
    """The templates; whatever they print is escaped, and an unknown name is a defect."""
    found = Environment(
        loader=PackageLoader("reward.labelling"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    found.filters |= {"pieces": pieces, "query": urlencode, "json": _json}
    return found


def render(template: str, context: dict[str, Any]) -> str:
    """A whole page."""
    return environment().get_template(template).render(context)


def pieces(text: str) -> list[Piece]:
    """Prose and fenced code, in turn."""
    found, end = [], 0
    for match in _FENCED.finditer(text):
        found += [Piece(text[end : match.start()], False), Piece(match[0], True)]
        end = match.end()
    return [piece for piece in [*found, Piece(text[end:], False)] if piece.text]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)
