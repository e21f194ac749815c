"""A byte-level BPE tokenizer trained on text, with the chat tokens reserved from the start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from baton.chat import DOCUMENT_END, PAD, SPECIAL_TOKENS, TURN_END, TURN_START

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def train_tokenizer(texts: Iterable[str], vocab_size: int, sample_bytes: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) of at most `vocab_size` tokens, special ones included.

    Every byte is a token, so no text is unknown; digits stand alone. At most `sample_bytes` of UTF-8 are read.
    Deterministic in its inputs.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_bytes(texts, sample_bytes), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=DOCUMENT_END,
        eos_token=DOCUMENT_END,
        pad_token=PAD,
        additional_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
    )


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        limit -= len(text.encode())
        yield text
