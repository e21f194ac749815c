"""Where replies come from while PPO runs: engines behind one small interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from baton.decode import Reply
from baton.ppo_sections import Rollout


class Engine(Protocol):
    """Samples replies from the policy as it was at the last `push`."""

    def push(self) -> None:
        """The policy's weights have changed: the engine's become the same. Called once before the first `generate`."""

    def generate(self, prompts: Sequence[list[int]], indices: Sequence[int]) -> list[Reply]:
        """One reply a prompt, with the log-probability of each token; `indices` of the episodes choose the noise."""

    def close(self) -> None:
        """The run ends: leave nothing behind."""


def open_engine(
    rollout: Rollout,
    *,
    model_of: Callable[[], AbstractContextManager[Any]],
    save_policy: Callable[[Path], None],
    seed: int,
    stop_ids: Sequence[int],
    pad_id: int,
    folder: Path,
    agree: Callable[[bool], bool] | None = None,
    agreed: Callable[[str], str] = str,
    is_main: bool = True,
) -> Engine:
    """The engine that `rollout.engine` names.

    `model_of` gives the causal language model that acts as the policy; `save_policy` writes the policy's adapter into
    a folder; `folder` is where an engine may keep files, and may be deleted between runs.

    For several processes: `agree` where the weights are spread over them, see `baton.decode.decode`; `agreed` gives the
    main process's string on all, and `is_main` says which one that is. All call `push` together, and in it
    `save_policy` of the same folder, which the main process must have written when its own call returns.

    Raises UserError where the engine cannot work here.
    """
    if rollout.engine == "vllm":
        from stages.engines.vllm import VLLM

        return VLLM(
            rollout,
            save_policy=save_policy,
            seed=seed,
            stop_ids=stop_ids,
            folder=folder,
            agreed=agreed,
            is_main=is_main,
        )
    if rollout.engine == "transformers":
        from stages.engines.continuous import ContinuousBatching

        return ContinuousBatching(
            rollout, model_of=model_of, seed=seed, stop_ids=stop_ids, pad_id=pad_id, alone=agree is None
        )
    from stages.engines.built_in import BuiltIn

    return BuiltIn(rollout, model_of=model_of, seed=seed, stop_ids=stop_ids, pad_id=pad_id, agree=agree)
