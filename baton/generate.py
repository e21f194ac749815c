"""One reply at a time, token by token, with exact probabilities; and how surprising a given text is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from baton.chat import DOCUMENT_END, encode_scored
from baton.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

UNREADABLE = "\ufffd"


class Candidate(NamedTuple):
    """A token that could come next, and its probability under the model."""

    token_id: int
    probability: float


class Step(NamedTuple):
    """One generated token."""

    token_id: int
    probability: float  # under the model at temperature 1, whatever it was sampled at
    candidates: list[Candidate]  # the likeliest, best first


class Surprisal(NamedTuple):
    """One token of a scored text: -log2 of its probability given the tokens before it."""

    token_id: int
    bits: float


def generate(
    model: Any,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    candidates: int = 0,
    seed: int = 0,
) -> Iterator[Step]:
    """Yield the continuation of `prompt_ids` up to and including a stop token, or `max_new_tokens`.

    Temperature 0 takes the likeliest token; above 0 it is sampled, from the whole vocabulary. Ends early where the
    model's context is full; raises UserError when the prompt leaves no room in it at all.
    """
    import torch
    from transformers import DynamicCache

    room = context_length(model) - len(prompt_ids)
    if room <= 0:
        raise UserError(
            f"the text is {len(prompt_ids)} tokens long; the model reads at most {context_length(model)}, so shorten it"
        )
    random = torch.Generator().manual_seed(seed)
    cache = DynamicCache(config=model.config)
    input_ids = torch.tensor([list(prompt_ids)], device=model.device)
    for _ in range(min(max_new_tokens, room)):
        # not around the whole loop: a generator would leave gradients switched off in its caller between two tokens
        with torch.no_grad():
            output = model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        log_probabilities = output.logits[0, -1].float().cpu().log_softmax(-1)
        token = _choose(log_probabilities, temperature, random)
        likeliest = log_probabilities.topk(min(candidates, len(log_probabilities)))
        yield Step(
            token,
            math.exp(log_probabilities[token]),
            [
                Candidate(int(token_id), math.exp(log_probability))
                for token_id, log_probability in zip(likeliest.indices, likeliest.values, strict=True)
            ],
        )
        if token in stop_ids:
            return
        input_ids = torch.tensor([[token]], device=model.device)


def _choose(log_probabilities: torch.Tensor, temperature: float, random: torch.Generator) -> int:
    if temperature == 0:
        return int(log_probabilities.argmax())
    return int((log_probabilities / temperature).softmax(-1).multinomial(1, generator=random))


def surprisals(model: Any, tokenizer: PreTrainedTokenizerBase, text: str) -> list[Surprisal]:
    """The surprisal of each token of `text`, read as the beginning of a document, as in pretraining.

    The sum over the text's UTF-8 bytes is its bits per byte. Raises UserError on empty text, or more than the model
    can read at once.
    """
    import torch

    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise UserError("there is no text to score")
    whole = [document_start(tokenizer), *ids]
    if len(whole) > context_length(model):
        raise UserError(
            f"the text is {len(ids)} tokens long; the model reads at most {context_length(model) - 1}, so shorten it"
        )
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([whole], device=model.device), use_cache=False).logits[0, :-1]
    chosen = logits.float().log_softmax(-1).gather(-1, torch.tensor(ids, device=logits.device)[:, None])[:, 0]
    return [Surprisal(token, -nats / math.log(2)) for token, nats in zip(ids, chosen.tolist(), strict=True)]


def reward(model: Any, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> float:
    """What a reward model gives the last message of `messages` as a reply to those before it; an ensemble's mean.

    Each adapter of a model with several is a member.
    """
    import torch

    ids = encode_scored(tokenizer, messages)
    if len(ids) > context_length(model):
        raise UserError(f"prompt and reply are {len(ids)} tokens long; the model reads at most {context_length(model)}")
    members = list(getattr(model, "peft_config", {}))
    scores = []
    with torch.no_grad():
        for member in members if len(members) > 1 else [None]:
            if member is not None:
                model.set_adapter(member)
            scores.append(float(model(input_ids=torch.tensor([ids], device=model.device)).logits[0, 0]))
    return math.fsum(scores) / len(scores)


def document_start(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands before a document in training: the one that ended the document before."""
    vocabulary = tokenizer.get_vocab()
    if DOCUMENT_END in vocabulary:
        return int(vocabulary[DOCUMENT_END])
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise UserError("the tokenizer has neither a bos nor an eos token to stand before the text's first token")
    return int(start)


def context_length(model: Any) -> int:
    """How many tokens the model can read at once."""
    return int(getattr(model.config, "max_position_embeddings", 0) or 1 << 30)


class TextStream:
    """Tokens in, text out, in whole characters: a Japanese or Chinese one may be spread over several tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # from here the ids are decoded, so that a token's leading space is kept
        self._shown = 0  # up to here they have been given out

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete, and for special tokens."""
        self._ids.append(token_id)
        text = self._pending()
        if text.endswith(UNREADABLE):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        """What is left when no more tokens come: bytes that make no character are shown as U+FFFD."""
        text = self._pending()
        self._context = self._shown = len(self._ids)
        return text

    def _pending(self) -> str:
        shown = self._decode(self._ids[self._context : self._shown])
        return self._decode(self._ids[self._context :])[len(shown) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """How a single token is shown: its text, its name if it is special, or its bytes where they make no character."""
    text = str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
    if UNREADABLE not in text:
        return text
    name = str(tokenizer.convert_ids_to_tokens(token_id))
    byte_of = _byte_alphabet()
    if all(character in byte_of for character in name):
        return "".join(f"<{byte_of[character]:02X}>" for character in name)
    return name


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
