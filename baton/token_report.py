"""How well a tokenizer fits texts: bytes a token by language and by script, and how many tokens are single bytes."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

    from baton.corpus.shards import PreparedSource

SAMPLE_BYTES = 1_000_000
"""Read of each language at most: more does not change the third digit."""

OTHER = "other"

RANGES = [
    (0x0041, 0x005A, "Latin"),
    (0x0061, 0x007A, "Latin"),
    (0x00AA, 0x00AA, "Latin"),
    (0x00BA, 0x00BA, "Latin"),
    (0x00C0, 0x00D6, "Latin"),
    (0x00D8, 0x00F6, "Latin"),
    (0x00F8, 0x02B8, "Latin"),
    (0x0370, 0x03FF, "Greek"),
    (0x0400, 0x052F, "Cyrillic"),
    (0x0590, 0x05FF, "Hebrew"),
    (0x0600, 0x06FF, "Arabic"),
    (0x0750, 0x077F, "Arabic"),
    (0x08A0, 0x08FF, "Arabic"),
    (0x0900, 0x097F, "Devanagari"),
    (0x0E00, 0x0E7F, "Thai"),
    (0x1100, 0x11FF, "Hangul"),
    (0x1C80, 0x1C8F, "Cyrillic"),
    (0x1E00, 0x1EFF, "Latin"),
    (0x1F00, 0x1FFF, "Greek"),
    (0x2C60, 0x2C7F, "Latin"),
    (0x2DE0, 0x2DFF, "Cyrillic"),
    (0x2E80, 0x2FDF, "Han"),
    (0x3005, 0x3007, "Han"),
    (0x3041, 0x309F, "Hiragana"),
    (0x30A1, 0x30FF, "Katakana"),
    (0x3130, 0x318F, "Hangul"),
    (0x31F0, 0x31FF, "Katakana"),
    (0x3400, 0x4DBF, "Han"),
    (0x4E00, 0x9FFF, "Han"),
    (0xA640, 0xA69F, "Cyrillic"),
    (0xA720, 0xA7FF, "Latin"),
    (0xA8E0, 0xA8FF, "Devanagari"),
    (0xA960, 0xA97F, "Hangul"),
    (0xAC00, 0xD7FF, "Hangul"),
    (0xF900, 0xFAFF, "Han"),
    (0xFB00, 0xFB06, "Latin"),
    (0xFB1D, 0xFB4F, "Hebrew"),
    (0xFB50, 0xFDFF, "Arabic"),
    (0xFE70, 0xFEFC, "Arabic"),
    (0xFF21, 0xFF3A, "Latin"),
    (0xFF41, 0xFF5A, "Latin"),
    (0xFF66, 0xFF9F, "Katakana"),
    (0x20000, 0x323AF, "Han"),
]
"""(first, last, script) of letters and marks, by Unicode's Blocks and Scripts; ascending. All else is `other`."""

SCRIPTS = [OTHER, *dict.fromkeys(script for _, _, script in RANGES)]
_FIRST = np.asarray([first for first, _, _ in RANGES], dtype=np.uint32)
_LAST = np.asarray([last for _, last, _ in RANGES], dtype=np.uint32)
_INDEX = np.asarray([SCRIPTS.index(script) for _, _, script in RANGES])


@dataclass
class Tally:
    """Sums over texts. The tokens of a script are parts of tokens: a token's bytes share it evenly."""

    num_bytes: int = 0
    num_tokens: float = 0.0
    num_single: float = 0.0  # tokens of one byte of a character that has several

    def add(self, num_bytes: int, num_tokens: float, num_single: float) -> None:
        """Add a text's sums."""
        self.num_bytes += num_bytes
        self.num_tokens += num_tokens
        self.num_single += num_single

    @property
    def bytes_per_token(self) -> float:
        """How much text a token carries."""
        return self.num_bytes / self.num_tokens if self.num_tokens else 0.0

    @property
    def single_byte_share(self) -> float:
        """The share of the tokens for which the tokenizer knows no more than a byte."""
        return self.num_single / self.num_tokens if self.num_tokens else 0.0


@dataclass
class TokenReport:
    """What `measure_tokens` found."""

    vocabulary: int
    languages: dict[str, Tally] = field(default_factory=dict)
    scripts: dict[str, Tally] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """For a manifest: `tokenizer/bytes_per_token`, the share of single bytes, and both by language or script."""
        total = _sum(self.languages.values())
        found = {
            "tokenizer/vocabulary": self.vocabulary,
            "tokenizer/bytes_per_token": total.bytes_per_token,
            "tokenizer/single_byte_share": total.single_byte_share,
        }
        for table in (self.languages, self.scripts):
            for name, tally in table.items():
                found[f"tokenizer/bytes_per_token/{name}"] = tally.bytes_per_token
        return {name: round(number, 4) for name, number in found.items()}


def measure_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[tuple[str, str]]) -> TokenReport:
    """The report over (language, text) pairs; of a language no more than some SAMPLE_BYTES are read."""
    report = TokenReport(len(tokenizer))
    languages: dict[str, Tally] = defaultdict(Tally)
    scripts: dict[str, Tally] = defaultdict(Tally)
    is_byte = _byte_tokens(tokenizer)
    for language, text in texts:
        left = SAMPLE_BYTES - languages[language].num_bytes
        if left > 0 and text:
            _count(tokenizer, is_byte, text[:left], languages[language], scripts)
    report.languages = _largest_first(languages)
    report.scripts = _largest_first(scripts)
    return report


def measure_sources(tokenizer: PreTrainedTokenizerBase, sources: Sequence[PreparedSource]) -> TokenReport:
    """The report over the first documents of every language of prepared sources, made by this very tokenizer."""
    return measure_tokens(tokenizer, _texts_of(tokenizer, sources))


def _texts_of(tokenizer: Any, sources: Sequence[PreparedSource]) -> Iterator[tuple[str, str]]:
    read: dict[str, int] = defaultdict(int)
    for source in sources:
        for number in range(source.num_documents):
            language = source.document_language(number)
            if read[language] < SAMPLE_BYTES:
                read[language] += source.document_bytes(number)
                ids = source.document(number)[1:-1][:SAMPLE_BYTES]
                yield language, tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
            elif all(read[code] >= SAMPLE_BYTES for code in source.languages):
                break


def script_of(character: str) -> str:
    """The script of a letter or mark; `other` for signs, digits, white space and scripts that are not listed."""
    return SCRIPTS[int(_scripts_of(character)[0])]


def _scripts_of(text: str) -> np.ndarray:
    """(characters,): each one's index in SCRIPTS."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    at = np.searchsorted(_FIRST, points, side="right") - 1
    inside = (at >= 0) & (points <= _LAST[at])
    return np.where(inside, _INDEX[at], 0)


def _count(tokenizer: Any, is_byte: np.ndarray, text: str, language: Tally, scripts: dict[str, Tally]) -> None:
    """Add one text; the tokenizer says which characters each token covers. is_byte (vocabulary,)."""
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    spans = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)  # bytes in UTF-8
    widths = spans[:, 1] - spans[:, 0]
    covers = widths > 0  # some tokenizers have marks that cover nothing
    # a row for each token and character that it covers
    owners = np.repeat(np.arange(len(spans)), widths)
    covered = np.arange(len(owners)) - np.repeat(np.cumsum(widths) - widths, widths) + np.repeat(spans[:, 0], widths)
    parts = (sizes / np.maximum(np.bincount(covered, minlength=len(points)), 1))[covered]
    parts /= np.bincount(owners, weights=parts, minlength=len(spans))[owners]
    is_single = np.zeros(len(spans), dtype=bool)
    is_single[covers] = is_byte[np.asarray(encoded["input_ids"], dtype=np.int64)][covers]
    is_single[covers] &= sizes[spans[covers, 0]] > 1
    kinds = _scripts_of(text)
    of_tokens = kinds[covered]
    language.add(int(sizes.sum()), float(len(spans)), float(is_single.sum()))
    num_bytes, num_tokens, num_single = (
        np.bincount(index, weights=weights, minlength=len(SCRIPTS))
        for index, weights in ((kinds, sizes), (of_tokens, parts), (of_tokens, parts * is_single[owners]))
    )
    for at, name in enumerate(SCRIPTS):
        if num_bytes[at]:
            scripts[name].add(int(num_bytes[at]), float(num_tokens[at]), float(num_single[at]))


def _byte_tokens(tokenizer: Any) -> np.ndarray:
    """(vocabulary,): which tokens are one byte, as byte-level tokenizers and byte fallback write them."""
    is_byte_level = "ByteLevel" in str(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    found = np.zeros(len(tokenizer), dtype=bool)
    for token, number in tokenizer.get_vocab().items():
        found[number] = len(token) == 1 if is_byte_level else bool(re.fullmatch("<0x[0-9A-F]{2}>", token))
    return found


def _largest_first(tallies: dict[str, Tally]) -> dict[str, Tally]:
    """The scripts and languages by their bytes; what no text had is left out."""
    return dict(sorted(((n, t) for n, t in tallies.items() if t.num_bytes), key=lambda item: -item[1].num_bytes))


def _sum(tallies: Iterable[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.add(tally.num_bytes, tally.num_tokens, tally.num_single)
    return total


def report_table(reports: dict[str, TokenReport]) -> Table:
    """A row a language and script, a column a tokenizer: bytes a token, and in brackets the share of single bytes."""
    from rich.table import Table

    table = Table(title="bytes a token (tokens that are one byte of a character)")
    table.add_column("text")
    for name, report in reports.items():
        table.add_column(f"{name}\n{report.vocabulary:,} tokens", justify="right")
    for kind in ("languages", "scripts"):
        table.add_section()
        names = dict.fromkeys(name for report in reports.values() for name in getattr(report, kind))
        for name in names:
            tallies = (getattr(report, kind).get(name, Tally()) for report in reports.values())
            table.add_row(name, *(f"{t.bytes_per_token:.2f} ({t.single_byte_share:.1%})" for t in tallies))
    return table
