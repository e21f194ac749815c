"""Episodes: which prompts a step takes, how replies are sampled, and how they become tensors with exact masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from baton.decode import Reply, decode

SAMPLING_STREAM, ORDER_STREAM = 0, 1


@dataclass(frozen=True)
class Episode:
    """One prompt and the reply that was sampled for it."""

    index: int  # position in the run: step x episodes_per_batch + place in the batch
    prompt: list[int]
    reply: Reply


@dataclass
class MicroBatch:
    """Right-padded episodes. B rows, L tokens, T response positions; masks come from lengths, never from ids."""

    input_ids: torch.Tensor  # (B, L)
    attention_mask: torch.Tensor  # (B, L)
    position_ids: torch.Tensor  # (B, L)
    response_ids: torch.Tensor  # (B, T), 0 where there is no response token
    before_response: torch.Tensor  # (B, T): position of the hidden state that predicts each response token
    is_response: torch.Tensor  # (B, T)
    last: torch.Tensor  # (B,): position of the last real token
    ended: torch.Tensor  # (B,): whether the reply stopped by itself


def episode_prompts(seed: int, num_prompts: int, first: int, count: int) -> list[int]:
    """Which prompt each episode from `first` on takes: every prompt once an epoch, each epoch in a seeded order."""
    chosen = []
    for index in range(first, first + count):
        epoch, place = divmod(index, num_prompts)
        chosen.append(int(_epoch_order(seed, epoch, num_prompts)[place]))
    return chosen


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_prompts: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, (epoch << 1) | ORDER_STREAM])).permutation(num_prompts)


def sampling_noise(seed: int, index: int, length: int) -> np.ndarray:
    """Uniform numbers (length,) for episode `index`: one a token, a function of seed, episode and position alone."""
    return np.random.Generator(np.random.Philox(key=[seed, (index << 1) | SAMPLING_STREAM])).random(length)


def sample_replies(
    model: Any,
    prompts: Sequence[Sequence[int]],
    noise: np.ndarray,
    *,
    temperature: float,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
) -> list[Reply]:
    """Sample from softmax(logits / temperature) by inverse CDF with `noise` (len(prompts), max_new_tokens).

    Neither top-k nor top-p: the distribution that is sampled is the one that is trained.
    """
    uniform = torch.as_tensor(noise, dtype=torch.float64)

    def pick(logits: torch.Tensor, rows: torch.Tensor, position: int) -> torch.Tensor:
        cdf = (logits.double() / temperature).softmax(-1).cumsum(-1)
        drawn = uniform[rows.cpu(), position].to(cdf.device)[:, None] * cdf[:, -1:]
        return torch.searchsorted(cdf, drawn, right=True).squeeze(-1).clamp(max=cdf.shape[-1] - 1)

    return decode(model, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids, pad_id=pad_id, pick=pick)


def make_micro_batch(episodes: Sequence[Episode], pad_id: int, device: torch.device) -> MicroBatch:
    """Stack episodes, padded on the right to the longest."""
    rows = [episode.prompt + episode.reply.ids for episode in episodes]
    lengths = torch.tensor([len(row) for row in rows])
    prompts = torch.tensor([len(episode.prompt) for episode in episodes])
    responses = lengths - prompts
    width, steps = int(lengths.max()), int(responses.max())
    positions = torch.arange(width)
    offsets = torch.arange(steps)
    is_response = offsets < responses[:, None]
    response_ids = torch.tensor([e.reply.ids + [0] * (steps - len(e.reply.ids)) for e in episodes])
    batch = MicroBatch(
        input_ids=torch.tensor([row + [pad_id] * (width - len(row)) for row in rows]),
        attention_mask=(positions < lengths[:, None]).long(),
        position_ids=positions.expand(len(rows), width),
        response_ids=response_ids,
        before_response=torch.where(is_response, prompts[:, None] - 1 + offsets, torch.zeros_like(offsets)),
        is_response=is_response,
        last=lengths - 1,
        ended=torch.tensor([episode.reply.ended for episode in episodes]),
    )
    for name, tensor in vars(batch).items():
        setattr(batch, name, tensor.to(device))
    return batch
