"""Replies of the SFT model to held-out prompts: the scale on which PPO's rewards begin."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from baton.data.turns import Messages
from reward.knowledge.evenly import evenly
from reward.pairs import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from baton.decode import Choice


@dataclass(frozen=True)
class SftSample:
    """One sampled reply, as PPO would have it scored: prompt ids, then the reply's."""

    prompt: Messages
    prompt_ids: list[int]
    reply_ids: list[int]  # the stop token included where it ended by itself
    ended: bool

    @property
    def ids(self) -> list[int]:
        """What the reward reads."""
        return [*self.prompt_ids, *self.reply_ids]


def held_out_prompts(pairs: Sequence[Pair], most: int) -> list[Messages]:
    """The different prompts of `pairs` in their order, or `most` of them, evenly taken."""
    return evenly(list({prompt_key(pair.prompt): pair.prompt for pair in pairs}.values()), most)


def prompt_key(prompt: Messages) -> str:
    """Equal for equal prompts."""
    return json.dumps([[message["role"], message["content"]] for message in prompt])


def sample_sft(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    *,
    max_new_tokens: int,
    replies_per_prompt: int = 1,
    temperature: float = 1.0,
    max_rows: int = 64,
    seed: int = 0,
) -> list[SftSample]:
    """Sample `replies_per_prompt` replies to each prompt from a causal language model, the distribution left whole.

    The sample of a prompt depends on `seed` and its place in `prompts`, not on what else is in the batch. Prompts that
    leave no room for `max_new_tokens` in the model's context are left out.
    """
    from baton.chat import encode_prompt, stop_ids
    from baton.decode import decode
    from baton.generate import context_length

    room = context_length(model) - max_new_tokens
    encoded = [(prompt, encode_prompt(tokenizer, prompt)) for prompt in prompts]
    rows = [(prompt, ids) for prompt, ids in encoded if 0 < len(ids) <= room for _ in range(replies_per_prompt)]
    if not rows:
        return []
    assert tokenizer.pad_token_id is not None
    pad_id = int(tokenizer.pad_token_id)
    noise = torch.stack([_uniform(seed, at, max_new_tokens) for at in range(len(rows))])

    def pick(logits: torch.Tensor, at: torch.Tensor, positions: torch.Tensor) -> Choice:
        logits[:, pad_id] = -torch.inf  # a reward model would take it for padding
        return _inverse_cdf(logits / temperature, noise[at.cpu(), positions.cpu()].to(logits.device))

    replies = decode(
        model,
        [ids for _, ids in rows],
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids(tokenizer),
        pad_id=pad_id,
        pick=pick,
        max_rows=max_rows,
    )
    return [
        SftSample(prompt, list(ids), list(reply.ids), reply.ended)
        for (prompt, ids), reply in zip(rows, replies, strict=True)
    ]


def _uniform(seed: int, row: int, length: int) -> torch.Tensor:
    """Numbers in [0, 1) of one row, (length,)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63)
    return torch.rand(length, generator=generator, dtype=torch.double)


def _inverse_cdf(logits: torch.Tensor, uniform: torch.Tensor) -> Choice:
    """The token (N,) at which the cumulated probability of logits (N, V) first exceeds `uniform` (N,)."""
    from baton.decode import Choice

    cumulative = logits.double().softmax(-1).cumsum(-1)
    target = (uniform * cumulative[:, -1])[:, None]
    return Choice(torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1))
