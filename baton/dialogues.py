"""Dialogue rows as documents to train on: rendered, masked, cut to a length, and counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from baton.chat import has_control_text, stop_ids
from baton.errors import UserError
from baton.rendering import Rendered, Unrenderable, encode, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Document = tuple[list[int], list[bool]]
OnLong = Literal["cut", "drop"]

CONTROL_TEXT = "they spell out a special token"
NOTHING_SAID = "no assistant's token was left"
TOO_LONG = "they are too long"
AT_ONCE = 256
"""Rows that are tokenised in one call."""


@dataclass
class Counts:
    """What became of the rows of one use."""

    rows: int = 0
    kept: int = 0
    cut: int = 0  # those longer than the limit, kept or not
    without_stop: int = 0  # of those cut and kept: no token is left that teaches to stop
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    tokens: int = 0
    trained: int = 0
    longest: int = 0  # tokens of the longest dialogue before it was cut

    @property
    def mean_length(self) -> float:
        """Tokens a document."""
        return self.tokens / self.kept if self.kept else 0.0


@dataclass(frozen=True)
class Encoded:
    """Documents for `packing.pack`: (ids, is_response) each; `rows` says which row each came from."""

    documents: list[Document]
    rows: list[int]
    counts: Counts

    def describe(self) -> str:
        """What was kept, cut and dropped, and why."""
        counts = self.counts
        dropped = [f"{count:,} dropped because {reason}" for reason, count in counts.dropped.most_common()]
        return f"{counts.kept:,} dialogues, {counts.tokens:,} tokens, {counts.trained:,} of them trained; " + ", ".join(
            [f"{counts.cut:,} dialogues cut", *dropped]
        )


def encode_dialogues(
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, Any]],
    max_length: int,
    use: str = "train",
    on_long: OnLong = "cut",
) -> Encoded:
    """Each row's dialogue (`messages`, and `tools` where it has them) as ids, and for each whether it is trained.

    A dialogue longer than `max_length` loses its end, or with `on_long: drop` is left out. Left out, too, are dialogues
    that spell out a special token, that the template refuses or renders in part, and in which nothing to train is left:
    all counted by reason. Raises UserError if none of the rows is left.
    """
    documents: list[Document] = []
    origins: list[int] = []
    counts = Counts(rows=len(rows))
    stops = set(stop_ids(tokenizer))
    for start in range(0, len(rows), AT_ONCE):
        rendered, numbers = _render(tokenizer, rows[start : start + AT_ONCE], counts)
        for (ids, is_response), number in zip(encode(tokenizer, rendered), numbers, strict=True):
            counts.longest = max(counts.longest, len(ids))
            is_long = len(ids) > max_length
            if is_long and on_long == "drop":
                counts.dropped[TOO_LONG] += 1
                continue
            if is_long:
                counts.cut += 1
                ids, is_response = _cut(ids, is_response, max_length)
            if not any(is_response):
                counts.dropped[NOTHING_SAID] += 1
                continue
            counts.without_stop += is_long and not any(
                said and token in stops for token, said in zip(ids, is_response, strict=True)
            )
            documents.append((ids, is_response))
            origins.append(start + number)
    counts.kept = len(documents)
    counts.tokens = sum(len(ids) for ids, _ in documents)
    counts.trained = sum(sum(is_response) for _, is_response in documents)
    if rows and not documents:
        raise UserError(_nothing_left(counts, max_length, use))
    return Encoded(documents, origins, counts)


def _render(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], counts: Counts
) -> tuple[list[Rendered], list[int]]:
    """(rendered dialogues, the number of each one's row); what cannot be trained on is counted."""
    rendered: list[Rendered] = []
    numbers: list[int] = []
    for number, row in enumerate(rows):
        messages, tools = row["messages"], row.get("tools")
        if has_control_text(tokenizer, messages, tools):
            counts.dropped[CONTROL_TEXT] += 1
            continue
        try:
            rendered.append(render(tokenizer, messages, tools))
        except Unrenderable as fault:
            counts.dropped[str(fault)] += 1
            continue
        numbers.append(number)
    return rendered, numbers


def _cut(ids: list[int], is_response: list[bool], max_length: int) -> Document:
    """The first `max_length` tokens, without those after the last one that is trained: nothing learns from them."""
    ids, is_response = ids[:max_length], is_response[:max_length]
    last = max((at for at, said in enumerate(is_response) if said), default=-1)
    return ids[: last + 1], is_response[: last + 1]


def _nothing_left(counts: Counts, max_length: int, use: str) -> str:
    lost = counts.dropped[NOTHING_SAID] + counts.dropped[TOO_LONG]
    others = {reason: count for reason, count in counts.dropped.items() if reason not in (NOTHING_SAID, TOO_LONG)}
    reasons = "; ".join(f"{count:,} × {reason}" for reason, count in Counter(others).most_common(5))
    if lost:
        return (
            f"data.{use}: no dialogue has an assistant's token within train.sequence_length = {max_length} tokens "
            f"({counts.rows:,} dialogues, the longest {counts.longest:,}{'; ' if reasons else ''}{reasons}); raise "
            "train.sequence_length"
        )
    return f"data.{use}: none of {counts.rows:,} dialogues is left: {reasons}"
