"""Episodes: which prompts a step takes, how replies are sampled, and how they become tensors with exact masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from baton.decode import Choice, Reply, decode
from stages.logprobs import LEAST_EXPONENT

SAMPLING_STREAM, ORDER_STREAM = 0, 1

BLOCK = 256
"""Tokens whose weights `inverse_cdf` adds up at once."""


@dataclass(frozen=True)
class Episode:
    """One prompt and the reply that was sampled for it."""

    index: int  # position in the run: step x episodes_per_batch + place in the batch
    prompt: list[int]
    reply: Reply


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


def sample_with(
    model: Any,
    prompts: Sequence[Sequence[int]],
    indices: Sequence[int],
    *,
    seed: int,
    temperature: float,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    rows: int = 64,
    agree: Callable[[bool], bool] | None = None,
) -> list[Reply]:
    """A sampled reply to each prompt, with log-probabilities; `indices` choose the noise, `seed` the run's.

    `rows` replies are in the making at a time. For `agree` see `baton.decode.decode`.
    """
    noise = np.empty((len(prompts), max_new_tokens))
    for place, index in enumerate(indices):
        noise[place] = sampling_noise(seed, index, max_new_tokens)
    return sample_replies(
        model,
        prompts,
        noise,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        pad_id=pad_id,
        rows=rows,
        agree=agree,
    )


def sample_replies(
    model: Any,
    prompts: Sequence[Sequence[int]],
    noise: np.ndarray,
    *,
    temperature: float,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    rows: int = 64,
    agree: Callable[[bool], bool] | None = None,
) -> list[Reply]:
    """Sample from softmax(logits / temperature) by inverse CDF with `noise` (len(prompts), max_new_tokens).

    Neither top-k nor top-p: the distribution that is sampled is the one that is trained. Raises RuntimeError where the
    model's logits are not finite.
    """
    uniform = torch.as_tensor(noise, dtype=torch.float64).to(model.device)

    def pick(logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> Choice:
        return inverse_cdf(logits if temperature == 1.0 else logits / temperature, uniform[rows, positions])

    replies = decode(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        pad_id=pad_id,
        pick=pick,
        max_rows=rows,
        agree=agree,
    )
    for place, reply in enumerate(replies):
        if not np.isfinite(reply.logprobs).all():
            at = int(np.argmin(np.isfinite(reply.logprobs)))
            raise RuntimeError(f"the policy's logits are not finite at token {at} of the reply to prompt {place}")
    return replies


def inverse_cdf(logits: torch.Tensor, uniform: torch.Tensor) -> Choice:
    """The first token whose cumulative softmax exceeds `uniform`, and its log-probability.

    logits (N, V) of at least float32, uniform (N,) float64 in [0, 1). Weights are summed by blocks first, and the
    blocks' sums in float64: only the block that the draw falls into is summed token by token.
    """
    count, size = logits.shape
    blocks = -(-size // BLOCK)
    weights = logits.new_empty(count, blocks * BLOCK)
    weights[:, size:] = 0
    highest = logits.amax(-1, keepdim=True)
    shifted = torch.sub(logits, highest, out=weights[:, :size]).clamp_(min=LEAST_EXPONENT).exp_()
    torch.threshold_(shifted, 2 * math.exp(LEAST_EXPONENT), 0.0)  # what cannot be drawn weighs nothing
    weights = weights.view(count, blocks, BLOCK)
    below = weights.sum(-1).cumsum(-1, dtype=torch.float64)
    total = below[:, -1]
    block = _first_above(below, uniform * total)
    chosen = block[:, None]
    start = torch.where(block > 0, below.gather(-1, (chosen - 1).clamp(min=0)).squeeze(-1), 0.0)
    inside = weights.gather(1, chosen[..., None].expand(-1, -1, BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
    ids = block * BLOCK + _first_above(inside, uniform * total - start)
    ids = ids.clamp(max=size - 1)  # as above
    scaled = logits.gather(-1, ids[:, None]) - highest
    return Choice(ids, scaled.squeeze(-1).double() - total.log())


def _first_above(cumulative: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """The first place whose cumulative weight (N, K) exceeds `drawn` (N,); rounding must not lead past the last."""
    most = torch.nextafter(cumulative[:, -1], cumulative.new_zeros(()))
    found = torch.searchsorted(cumulative, torch.minimum(drawn, most)[:, None], right=True).squeeze(-1)
    return found.clamp(max=cumulative.shape[-1] - 1)  # logits that are not finite lead past the last
