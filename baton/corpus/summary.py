"""The figures of a prepared source: documents, tokens and bytes, by language, and how long its documents are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from baton.corpus.shards import PreparedSource


def summary(folder: Path, entries: list[dict[str, Any]], codes: list[str], dtype: np.dtype) -> dict[str, Any]:
    """Documents, tokens and bytes of a source and of each of its languages, and how long its documents are.

    A length's documents are counted, so that memory depends on how many lengths there are and not on the documents.
    """
    facts = {"name": "", "path": "", "use": "", "languages": codes, "shards": entries}
    source = PreparedSource(folder, facts, dtype)
    by_language = {code: {"documents": 0, "tokens": 0, "bytes": 0} for code in codes}
    lengths: dict[str, Counter[int]] = {code: Counter() for code in codes}
    for shard in range(len(entries)):
        sizes = np.diff(source.shard_ends(shard), prepend=0)
        num_bytes, languages = source.shard_bytes(shard), source.shard_languages(shard)
        for at, code in enumerate(codes):
            of_it = languages == at
            values, counts = np.unique(sizes[of_it], return_counts=True)
            lengths[code].update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
            by_language[code]["documents"] += int(of_it.sum())
            by_language[code]["tokens"] += int(sizes[of_it].sum())
            by_language[code]["bytes"] += int(num_bytes[of_it].sum())
    total = {key: sum(facts[key] for facts in by_language.values()) for key in ("documents", "tokens", "bytes")}
    languages_facts = {code: facts | {"length": _lengths(lengths[code])} for code, facts in by_language.items()}
    return {**total, "length": _lengths(sum(lengths.values(), Counter())), "languages": languages_facts}


def _lengths(counted: Counter[int]) -> dict[str, float]:
    """Mean, median, 99th percentile and maximum of documents' tokens; so many are at most that long."""
    total, below = sum(counted.values()), 0
    if not total:
        return {"mean": 0, "median": 0, "p99": 0, "max": 0}
    found: dict[str, float] = {"mean": round(sum(length * count for length, count in counted.items()) / total, 1)}
    for length, count in sorted(counted.items()):
        below += count
        for name, share in (("median", 0.5), ("p99", 0.99)):
            if below >= share * total:
                found.setdefault(name, length)
    return {**found, "max": max(counted)}
