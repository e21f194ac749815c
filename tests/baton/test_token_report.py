"""The tokenizer's report: bytes a token by language and script, worked by hand; scripts as Unicode names them."""

import unicodedata
from typing import Any

import numpy as np
import pytest

from baton import token_report
from baton.bpe import train_tokenizer
from baton.token_report import RANGES, TokenReport, measure_sources, measure_tokens, report_table, script_of


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """It knows `the`, ` town` and `パン屋は` whole, and of other characters the bytes alone."""
    return train_tokenizer(["the town"] * 9 + ["パン屋は"] * 9, 300, 10_000)


@pytest.mark.parametrize(
    ("characters", "script"),
    [
        ("aZéßŁạﬁＡ", "Latin"),
        ("αΩἀ", "Greek"),
        ("жЯѐ", "Cyrillic"),
        ("עﬠ", "Hebrew"),
        ("عﻉ", "Arabic"),
        ("नि", "Devanagari"),
        ("ไ", "Thai"),
        ("한ㄱᄀ", "Hangul"),
        ("ひゟ", "Hiragana"),
        ("カーｶㇰ", "Katakana"),
        ("漢々〇㐀𠮷", "Han"),
        (" 1.,。、「」\n×÷€😀", "other"),
    ],
)
def test_scripts(characters: str, script: str) -> None:
    assert {character: script_of(character) for character in characters} == dict.fromkeys(characters, script)


def test_letters_are_named_after_their_script() -> None:
    """Against Unicode's own names: HANGUL SYLLABLE …, CJK UNIFIED IDEOGRAPH …, LATIN SMALL LETTER …"""
    names = {script: script.upper() for _, _, script in RANGES} | {"Han": "CJK"}
    for number in range(0x41, 0x20100):
        letter = chr(number)
        if unicodedata.category(letter) in ("Ll", "Lu", "Lt") or (
            unicodedata.category(letter) == "Lo" and number < 0xFE00
        ):
            name, script = unicodedata.name(letter), script_of(letter)
            for other, stem in names.items():
                if name.startswith((stem + " ", "FULLWIDTH " + stem, "HALFWIDTH " + stem)) and number < 0x10000:
                    assert script == other or (script == "other" and number > 0xFF), (hex(number), name)


def test_ranges_ascend() -> None:
    bounds = [bound for first, last, _ in RANGES for bound in (first, last + 1)]
    assert bounds == sorted(bounds)


def test_by_hand(tokenizer: Any) -> None:
    """the | ␣ | 3 bytes of 町 | ␣ | 2 bytes of é: 3 + 1 + 3 + 1 + 2 bytes in 1 + 1 + 3 + 1 + 2 tokens, 5 single."""
    report = measure_tokens(tokenizer, [("en", "the 町 é"), ("ja", "パン屋は"), ("en", "")])
    assert list(report.languages) == ["ja", "en"]
    english, japanese = report.languages["en"], report.languages["ja"]
    assert (english.num_bytes, english.num_tokens, english.num_single) == (10, 8, 5)
    assert (japanese.num_bytes, japanese.num_tokens, japanese.num_single) == (12, 1, 0)
    # a fourth of パン屋は's token belongs to each of its characters
    tallies = {name: (t.num_bytes, t.num_tokens, t.num_single) for name, t in report.scripts.items()}
    assert tallies == {
        "Katakana": (6, 0.5, 0),
        "Han": (6, 3.25, 3),
        "Latin": (5, 3, 2),
        "Hiragana": (3, 0.25, 0),
        "other": (2, 2, 0),
    }
    metrics = report.metrics()
    assert metrics["tokenizer/bytes_per_token"] == round(22 / 9, 4)
    assert metrics["tokenizer/single_byte_share"] == round(5 / 9, 4)
    assert metrics["tokenizer/bytes_per_token/ja"] == 12
    assert metrics["tokenizer/bytes_per_token/Han"] == round(6 / 3.25, 4)
    assert metrics["tokenizer/vocabulary"] == len(tokenizer)


def test_special_tokens_in_a_text_are_text(tokenizer: Any) -> None:
    report = measure_tokens(tokenizer, [("en", "<|im_end|>")])
    assert report.languages["en"].num_tokens == 10


def test_a_language_is_read_as_far_as_the_sample(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_report, "SAMPLE_BYTES", 10)
    report = measure_tokens(tokenizer, [("en", "the town"), ("en", "the town"), ("en", "the town"), ("ja", "パン屋は")])
    assert {name: tally.num_bytes for name, tally in report.languages.items()} == {"en": 10, "ja": 12}


def test_prepared_sources(tokenizer: Any, tmp_path: Any) -> None:
    from baton.corpus.shards import PreparedSource, ShardWriter

    texts = [("en", "the 町 é"), ("ja", "パン屋は")]
    rows = [[0, *tokenizer(text)["input_ids"], 0] for _, text in texts]
    writer = ShardWriter(tmp_path, 0, np.dtype("<u2"))
    writer.add(np.concatenate(rows), [len(row) for row in rows], [10, 12], [0, 1])
    facts = {"name": "", "path": "", "use": "eval", "languages": ["en", "ja"], "shards": [writer.close({}, {})]}
    found = measure_sources(tokenizer, [PreparedSource(tmp_path, facts, np.dtype("<u2"))])
    assert found == measure_tokens(tokenizer, texts)


def test_a_tokenizer_with_byte_fallback() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"<0x{number:02X}>": number for number in range(256)} | {"a": 256}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    plain.decoder = decoders.ByteFallback()
    report = measure_tokens(PreTrainedTokenizerFast(tokenizer_object=plain), [("ja", "a町")])
    assert (report.languages["ja"].num_tokens, report.languages["ja"].num_single) == (4, 3)


def test_the_table(tokenizer: Any) -> None:
    from rich.console import Console

    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    report = measure_tokens(tokenizer, [("en", "the 町")])
    console.print(report_table({"ours": report, "none": TokenReport(7)}))
    lines = console.export_text().splitlines()
    row = next(line for line in lines if " en " in line)
    assert "1.40 (60.0%)" in row and "0.00 (0.0%)" in row
    assert any("Han" in line and "1.00 (100.0%)" in line for line in lines)
