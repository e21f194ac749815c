"""Episodes: which prompts a step takes, how replies are sampled, and how they become tensors with exact masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from baton.decode import Reply
from baton.sampling import sample_replies

SAMPLING_STREAM, ORDER_STREAM = 0, 1


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
