"""Near duplicates: estimated likeness against the exact one, what is kept, wherever the others lie."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("datasketch")

from baton.corpus import near_duplicates
from baton.corpus.near_duplicates import LIKE_HELD_OUT, NEAR_DUPLICATE, NearDuplicateIndex, Signer
from baton.corpus.prepare import prepare

DRAW = random.Random(7)
WORDS = [f"word{number}" for number in range(300)]


def some_text(count: int = 120) -> str:
    return " ".join(DRAW.choices(WORDS, k=count))


def edited(text: str, places: int) -> str:
    """The text with `places` words replaced by others, evenly."""
    words = text.split()
    for at in range(places):
        words[(at + 1) * len(words) // (places + 1)] = f"other{at}"
    return " ".join(words)


def likeness(one: str, other: str) -> float:
    """Jaccard similarity of the sets of runs of five words."""
    runs = [{tuple(words[at : at + 5]) for at in range(len(words) - 4)} for words in (one.split(), other.split())]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


@pytest.mark.parametrize("places", [0, 1, 3, 8])
def test_signatures_agree_as_often_as_texts_are_alike(places: int) -> None:
    text = some_text(400)
    sign = Signer(1024)
    agreement = float((sign(text) == sign(edited(text, places))).mean())
    assert agreement == pytest.approx(likeness(text, edited(text, places)), abs=0.06)  # 4 deviations of the estimate


def test_case_marks_and_spaces_do_not_matter_and_characters_are_the_words_of_japanese() -> None:
    sign = Signer(64)
    assert (sign("The brown fox, it jumps!") == sign("the  brown fox it\njumps")).all()
    assert (sign("吾輩は猫である") == sign("吾輩は犬である")).mean() < 0.7
    assert (sign("吾輩は猫である。") == sign("吾輩は猫である")).all()


@pytest.mark.parametrize("recent", [10, 1 << 18])
def test_alike_documents_are_found_wherever_they_lie(
    recent: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(near_duplicates, "_RECENT", recent)
    sign, texts = Signer(128), [some_text() for _ in range(60)]
    index = NearDuplicateIndex(0.7, 128)
    keep, _ = index.judge(np.stack([sign(text) for text in texts[:5]]), "eval")
    assert keep.all()
    for start in range(5, 60, 11):
        part = np.stack([sign(text) for text in texts[start : start + 11]])
        assert index.judge(part, "train")[0].all()
        np.save(tmp_path / f"{start}.npy", part if start > 5 else np.concatenate([first_five(sign, texts), part]))
        index.settle(tmp_path / f"{start}.npy")
    near = [edited(text, 2) for text in texts]
    assert min(likeness(*pair) for pair in zip(texts, near, strict=True)) > 0.8
    keep, reasons = index.judge(np.stack([sign(text) for text in [*near, some_text()]]), "train")
    assert not keep[:60].any() and keep[60]
    assert [reason for _, reason in reasons] == [LIKE_HELD_OUT] * 5 + [NEAR_DUPLICATE] * 55


def first_five(sign: Signer, texts: list[str]) -> np.ndarray:
    return np.stack([sign(text) for text in texts[:5]])


def test_a_corpus_is_prepared_without_them(tmp_path: Path, make_recipe: Any, tokenizer_folder: Path) -> None:
    first, second = some_text(), some_text()
    texts = [first, edited(first, 1), second, first, edited(second, 30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = {}
    for threshold in (None, 0.5, 0.99):
        data: dict[str, Any] = {"train": [{"path": "a.jsonl", "language": "en"}]}
        if threshold is not None:
            data["near_duplicates"] = {"threshold": threshold}
        corpus = prepare(make_recipe(data), tokenizer_folder, workers=1)
        sizes = [corpus.train[0].document_bytes(at) for at in range(corpus.train[0].num_documents)]
        dropped = corpus.train[0].facts["dropped"]
        found[threshold] = (sizes, {reason: facts["count"] for reason, facts in dropped.items()})
    sizes = [len(text) for text in texts]
    assert found[None] == ([*sizes[:3], sizes[4]], {"duplicate": 1})
    assert found[0.5] == ([sizes[0], sizes[2], sizes[4]], {"duplicate": 1, "near duplicate": 1})
    assert found[0.99] == found[None]
