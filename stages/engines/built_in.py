"""The built-in engine: cached decoding with the trainer's own weights, and noise that belongs to the episode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from baton.decode import Reply
from baton.ppo_sections import Rollout
from stages.rollout import sample_with


class BuiltIn:
    """A reply depends on seed, episode, prompt and policy alone, up to the rounding of the matrix products."""

    def __init__(
        self,
        rollout: Rollout,
        *,
        model_of: Callable[[], AbstractContextManager[Any]],
        seed: int,
        stop_ids: Sequence[int],
        pad_id: int,
        agree: Callable[[bool], bool] | None = None,
    ) -> None:
        self._rollout, self._model_of, self._seed = rollout, model_of, seed
        self._stop_ids, self._pad_id, self._agree = list(stop_ids), pad_id, agree

    def push(self) -> None:
        """Nothing to do: the weights are the trainer's."""

    def close(self) -> None:
        """Nothing to do."""

    def generate(self, prompts: Sequence[list[int]], indices: Sequence[int]) -> list[Reply]:
        with self._model_of() as model:
            return sample_with(
                model,
                prompts,
                indices,
                seed=self._seed,
                temperature=self._rollout.temperature,
                max_new_tokens=self._rollout.max_new_tokens,
                stop_ids=self._stop_ids,
                pad_id=self._pad_id,
                rows=self._rollout.rows,
                agree=self._agree,
            )
