"""From data to HTML: templates that escape everything, and model cards as safe HTML."""

import json
import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup


@cache
def environment() -> Environment:
    """The templates; whatever they print is escaped, and an unknown name prints nothing."""
    loader = PackageLoader("baton.registry.ui")
    found = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    found.filters |= {"short": short, "when": when, "size": size, "pretty": pretty, "plain": plain}
    return found


def render(template: str, context: dict[str, Any]) -> str:
    """A whole page."""
    return environment().get_template(template).render(context)


def markdown(card: str) -> Markup:
    """A model card as HTML: no raw HTML, no links and no images, whatever its text says; without its metadata."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False, "linkify": False}).enable("table")
    parser.disable(["html_block", "html_inline", "link", "image", "autolink", "reference"])
    body = re.sub(r"\A---\n.*?\n---\n", "", card, count=1, flags=re.DOTALL)
    # its headings go under the page's own
    body = re.sub(r"^(#{1,4}) ", r"##\1 ", body, flags=re.MULTILINE)
    return Markup(parser.render(body))  # noqa: S704 - made by the parser, which escapes


def short(digest: Any) -> str:
    """The beginning of a digest."""
    text = str(digest).removeprefix("sha256:")
    return text[:12]


def when(time: Any) -> str:
    """A record's time, to the minute."""
    text = str(time or "")
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\dZ", text)
    return f"{match[1]} {match[2]}" if match else text


def size(count: Any) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def plain(value: Any) -> str:
    """A value as text: numbers to six digits, lists and dicts as JSON."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def pretty(value: Any) -> str:
    """A nested value as YAML, for reading."""
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
