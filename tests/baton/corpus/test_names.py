"""Names of sources: short where that tells them apart, and never shared."""

from typing import Any

import pytest

from baton.corpus.names import names_of
from baton.corpus_sections import CorpusSource


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ([{"path": "a/books.jsonl.gz"}, {"path": "b/wiki.txt"}], ["books", "wiki"]),
        ([{"path": "en/test.jsonl"}, {"path": "ja/test.jsonl"}, {"path": "x.txt"}], ["en/test", "ja/test", "x"]),
        ([{"path": "a/*.jsonl"}, {"path": "b/*.jsonl"}], ["a/*", "b/*"]),
        ([{"path": "x/en/a.txt"}, {"path": "y/en/a.txt"}, {"path": "a.txt"}], ["x/en/a", "y/en/a", "a"]),
        (
            [{"path": "org/wiki", "subset": "simple"}, {"path": "org/wiki", "subset": "en"}],
            ["org/wiki simple", "org/wiki en"],
        ),
        (
            [{"path": "b.jsonl", "rows": [None, 44]}, {"path": "b.jsonl", "rows": [45, None]}],
            ["b 0-44", "b 45-"],
        ),
        ([{"path": "b.txt"}, {"path": "b.txt"}], ["b (1)", "b (2)"]),
        ([{"path": "folder/"}], ["folder"]),
        ([], []),
    ],
)
def test_names_are_short_and_distinct(sources: list[dict[str, Any]], expected: list[str]) -> None:
    assert names_of([CorpusSource.model_validate(source) for source in sources]) == expected
