"""Text from outside inside Markdown: escaped so that it is shown as it is, and can be nothing else."""

import re

# All that can begin markup, an entity, an HTML tag, a table's cell or (`:`, `@`) an automatic link.
_MARKUP = re.compile(r"[\\`*_{}\[\]<>()#+!|&~:@$=^]")
_WWW = re.compile(r"(www)\.", re.IGNORECASE)


def clean(text: str) -> str:
    """Text on one line: whitespace and what cannot be printed (controls, direction marks) become single spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def inline(text: str) -> str:
    """Text within a line of Markdown, or a table's cell; a line does not begin with it."""
    return _WWW.sub(r"\1\\.", _MARKUP.sub(r"\\\g<0>", clean(text)))


def block(text: str, language: str = "") -> str:
    """Text as a fenced block, whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of texts, all escaped; empty without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head)] + [[inline(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
