"""What the sources of a corpus are called in tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from baton.corpus_sections import CorpusData, CorpusSource


def sources_of(data: CorpusData, use: str) -> list[CorpusSource]:
    """The sources of a use (train, eval), in the recipe's order."""
    return data.eval if use == "eval" else data.train


def names_of(sources: Sequence[CorpusSource]) -> list[str]:
    """What each source is called: its file, folder or dataset without suffixes, and what tells it from the others.

    Figures are told by name, so no two sources share one: folders are added first, then subset and rows, at last a
    number.
    """
    parts = [[part.split(".")[0] or part for part in source.path.rstrip("/").split("/")] for source in sources]
    depths = range(1, max(map(len, parts), default=0) + 1)
    ways: list[Callable[[int, str], str]] = [
        *(lambda at, name, depth=depth: "/".join(parts[at][-depth:]) for depth in depths),  # type: ignore[misc]
        lambda at, name: f"{name} {sources[at].subset or ''}".rstrip(),
        lambda at, name: f"{name} {_rows(sources[at])}".rstrip(),
        lambda at, name: f"{name} ({at + 1})",
    ]
    names = [""] * len(sources)
    for way in ways:
        shared = {name for name in names if names.count(name) > 1 or not name}
        names = [way(at, name) if name in shared else name for at, name in enumerate(names)]
    return names


def _rows(source: CorpusSource) -> str:
    if source.rows is None:
        return ""
    start, stop = source.rows
    return f"{start or 0}-{'' if stop is None else stop}"
