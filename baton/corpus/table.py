"""The table of a prepared corpus: what each source holds by language, how long its documents are, what was dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from baton.corpus.shards import Corpus
from baton.data.files import place_unit

if TYPE_CHECKING:
    from rich.console import RenderableType


def corpus_table(corpus: Corpus) -> RenderableType:
    """One row a source and language; it fits a terminal of 80 columns."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("source", overflow="fold", min_width=8)
    for name in ("lang", "documents", "tokens", "bytes", "B/token", "median", "p99"):
        justify: Any = "left" if name == "lang" else "right"
        table.add_column(name, justify=justify, no_wrap=True, style="dim" if name in ("median", "p99") else "")
    notes: list[Text] = []
    for use in ("train", "eval"):
        for facts in (facts for facts in corpus.manifest["sources"] if facts["use"] == use):
            name = facts["name"] if use == "train" else f"held out: {facts['name']}"
            for code, of_it in _few(sorted(facts["languages"].items(), key=lambda item: -item[1]["tokens"])):
                table.add_row(name, "–" if code == "und" else code, *_figures(of_it))
                name = ""
            for reason, of_it in facts["dropped"].items():
                notes.append(Text(f"{facts['name']}: {_drop_line(reason, of_it)}"))
    if len(corpus.train) > 1:
        whole = {key: sum(facts[key] for facts in _trained(corpus)) for key in ("documents", "tokens", "bytes")}
        table.add_section()
        table.add_row("to train on", "", *_figures(whole), style="bold")
    if corpus.manifest["languages_by"] is None and any("und" in facts["languages"] for facts in _trained(corpus)):
        told = "languages are not told: set a source's `language`, or pip install 'baton[rules]'"
        notes.append(Text(told, style="dim"))
    return Group(table, Text("median and p99 are tokens of a document", style="dim"), *notes)


def _trained(corpus: Corpus) -> list[dict[str, Any]]:
    return [facts for facts in corpus.manifest["sources"] if facts["use"] == "train"]


def _drop_line(reason: str, facts: dict[str, Any]) -> str:
    file = str(facts["file"]).rsplit("/", 1)[-1]
    return f"{facts['count']:,} × {reason} left out, first at {file} {place_unit(file)} {facts['line']}"


def size(num_bytes: float) -> str:
    """Bytes in the unit that leaves one to three digits before the point."""
    return _scaled(num_bytes, (" B", " kB", " MB", " GB", " TB"))


def count(number: float) -> str:
    """A number whole up to 9,999, then in three digits and thousands (k), millions (M), billions (B) or trillions."""
    return f"{number:,.0f}" if number < 10_000 else _scaled(number, ("", "k", "M", "B", "T"))


def _scaled(number: float, units: tuple[str, ...]) -> str:
    at = 0
    while number >= 999.5 and at < len(units) - 1:
        number, at = number / 1000, at + 1
    places = 0 if not at or number >= 99.95 else 1 if number >= 9.995 else 2
    return f"{number:,.{places}f}{units[at]}"


def _figures(facts: dict[str, Any]) -> list[str]:
    length = facts.get("length")
    return [
        count(facts["documents"]),
        count(facts["tokens"]),
        size(facts["bytes"]),
        f"{facts['bytes'] / max(facts['tokens'], 1):.2f}",
        *([count(length["median"]), count(length["p99"])] if length else ["", ""]),
    ]


def _few(by_size: list[tuple[str, dict[str, Any]]], most: int = 6) -> list[tuple[str, dict[str, Any]]]:
    """The largest languages; a detector is sometimes wrong, and a long tail of single documents tells nothing."""
    if len(by_size) <= most + 1:
        return by_size
    rest = [facts for _, facts in by_size[most:]]
    others: dict[str, Any] = {key: sum(facts[key] for facts in rest) for key in ("documents", "tokens", "bytes")}
    longest = max(rest, key=lambda facts: facts["length"]["p99"])
    return [*by_size[:most], (f"{len(rest)} more", others | {"length": longest["length"]})]
