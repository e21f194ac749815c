"""A small prepared corpus out of given token ids, for tests of what reads one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from baton.corpus.shards import FORMAT, MANIFEST, Corpus, ShardWriter, write_json

END = 0
"""The end token of the corpora made here."""


def make_corpus(
    folder: Path,
    train: dict[str, Sequence[Sequence[int]]],
    held_out: dict[str, Sequence[Sequence[int]]] | None = None,
    documents_per_shard: int = 1000,
    languages: dict[str, str] | None = None,
) -> Corpus:
    """Write {source name: documents}, a document being its ids without the end tokens, and open it.

    A document's bytes are twice its ids. `languages` gives a source's language; the others are `und`.
    """
    sources = []
    for use, named in (("train", train), ("eval", held_out or {})):
        for at, (name, documents) in enumerate(named.items()):
            place, code = f"{use}-{at:02d}", (languages or {}).get(name, "und")
            shards = []
            for number, start in enumerate(range(0, len(documents), documents_per_shard)):
                writer = ShardWriter(folder / place, number, np.dtype("<u2"))
                for ids in documents[start : start + documents_per_shard]:
                    writer.add(np.array([END, *ids, END]), [len(ids) + 2], [2 * len(ids)], [0])
                shards.append(writer.close({}, {}))
            facts = {"documents": len(documents), "tokens": sum(shard["tokens"] for shard in shards)}
            facts["bytes"] = sum(shard["bytes"] for shard in shards)
            sources.append(
                {
                    "use": use,
                    "folder": place,
                    "path": f"{name}.txt",
                    "name": name,
                    "licence": None,
                    **facts,
                    "dropped": {},
                    "languages": {code: facts},
                    "shards": shards,
                }
            )
    manifest = {"format": FORMAT, "key": "0" * 64, "tokenizer_digest": "0" * 64, "dtype": "uint16", "sources": sources}
    write_json(folder / MANIFEST, manifest)
    return Corpus.open(folder)
