"""A byte-level BPE tokenizer trained on a weighted sample of text, with the chat tokens reserved from the start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from baton.chat import DOCUMENT_END, PAD, SPECIAL_TOKENS
from baton.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLIT = "|".join(
    [
        r"['’](?i:s|t|re|ve|m|ll|d)(?![\p{L}\p{M}])",  # contractions, but not the quoted word 'some
        r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+",  # a word with the space, or one other sign, before it
        r"\p{N}",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",  # blank lines with the line break they end in
        r"\s+(?!\S)",  # indentation, all but the space that the next word takes
        r"\s+",
    ]
)
"""Where text is cut before byte pairs are merged: the pattern of GPT-4, Llama 3 and Qwen 2.5 with three differences.

Digits stand alone, as in Qwen, Gemma and SmolLM: runs of up to three (GPT-4, Llama 3) cut numbers from the left, which
harms arithmetic (Singh and Strouse 2024), and cost 1,100 of the few tokens of a small vocabulary. Combining marks
belong to their letters, as in GPT-4o: else every vowel sign of Devanagari and Thai would end a word. A contraction is a
whole word's end, so that 'some is not cut into 's and ome, and may have a typographic apostrophe.
"""

TOOL_TOKENS = ["<tool_call>", "</tool_call>"]
"""Marks of a tool call, as Qwen and Hermes write them; special, so that a text cannot forge one."""

RESERVED = 8
"""Spare tokens by default: a template of another family needs at most seven (Mistral's with tools)."""

PIECE_BYTES = 1 << 16
"""A longer document is read piece by piece when a sample is drawn, so that no book crowds out the other sources."""


EMPTY = "a source of the training text holds no text at all; take it out of data.train"


@dataclass(frozen=True)
class TextStream:
    """A source of the mixture that a tokenizer is trained on.

    `weight` multiplies the source's own bytes, `share` sets its part of the sample outright (every stream has one, or
    none has). `documents()` begins anew at every call. Without shares the text is counted before it is sampled, as far
    as the sample's size; for what is larger, `num_bytes` says about how large (the files' size will do).
    """

    documents: Callable[[], Iterable[str]]
    weight: float = 1.0
    share: float | None = None
    num_bytes: int | None = None


def reserved_tokens(count: int) -> list[str]:
    """The names of `count` spare tokens."""
    return [f"<|reserved_{number}|>" for number in range(count)]


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, sample_bytes: int, reserved: int = RESERVED
) -> PreTrainedTokenizerBase:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) of at most `vocab_size` tokens, special ones included.

    Every byte is a token, so no text is unknown and every text comes back as it was. The special tokens come first:
    baton.chat.SPECIAL_TOKENS, TOOL_TOKENS, `reserved` spare ones. At most `sample_bytes` of UTF-8 are read.
    Deterministic in its inputs. Raises UserError where bytes and special tokens alone exceed `vocab_size`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [*SPECIAL_TOKENS, *TOOL_TOKENS, *reserved_tokens(reserved)]
    if len(special) + 256 > vocab_size:
        raise UserError(
            f"tokenizer.vocab_size is {vocab_size}, but 256 bytes and {len(special)} special tokens need "
            f"{len(special) + 256}; raise vocab_size, or lower tokenizer.reserved ({reserved})"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_bytes(texts, sample_bytes), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=DOCUMENT_END,
        eos_token=DOCUMENT_END,
        pad_token=PAD,
        extra_special_tokens=[token for token in special if token not in (DOCUMENT_END, PAD)],
        clean_up_tokenization_spaces=False,
    )


def weighted_sample(streams: Sequence[TextStream], sample_bytes: int) -> Iterator[str]:
    """Text of all streams in the mixture's proportions, at most about `sample_bytes` of UTF-8; nothing is kept.

    The next piece always comes from the stream that is furthest behind its part. A stream that ends before its part is
    full begins anew, as it would in training. Deterministic. Raises UserError where a stream holds no text.
    """
    wanted = _parts(streams, sample_bytes)
    pieces = [_endless(stream) for stream in streams]
    given = [0] * len(streams)
    while True:
        at = min(range(len(streams)), key=lambda index: (given[index] / wanted[index], index))
        if given[at] >= wanted[at]:
            return
        piece = next(pieces[at])
        given[at] += len(piece.encode())
        yield piece


def _parts(streams: Sequence[TextStream], sample_bytes: int) -> list[float]:
    """How many bytes of each stream the sample wants; no more in all than the mixture holds."""
    shares = [stream.share for stream in streams if stream.share is not None]
    assert len(shares) in (0, len(streams)), "every stream has a share, or none has"
    if shares:
        return [sample_bytes * share / sum(shares) for share in shares]
    sizes = [stream.weight * _size(stream, sample_bytes) for stream in streams]
    if not all(sizes):
        raise UserError(EMPTY)
    return [size * min(1.0, sample_bytes / sum(sizes)) for size in sizes]


def _size(stream: TextStream, most: int) -> int:
    count = 0
    for text in stream.documents():
        count += len(text.encode())
        if count >= most:
            return max(most, stream.num_bytes or 0)
    return count


def _endless(stream: TextStream) -> Iterator[str]:
    while True:
        is_empty = True
        for text in stream.documents():
            for piece in _pieces(text):
                is_empty = False
                yield piece
        if is_empty:
            raise UserError(EMPTY)


def _pieces(text: str) -> Iterator[str]:
    """Pieces of at most PIECE_BYTES characters, cut before white space where there is some."""
    start = 0
    while start < len(text):
        stop = start + PIECE_BYTES
        if stop < len(text):
            space = max(text.rfind(mark, start + PIECE_BYTES // 2, stop) for mark in ("\n", " "))
            stop = space if space > 0 else stop
        yield text[start:stop]
        start = stop


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        limit -= len(text.encode())
        yield text
