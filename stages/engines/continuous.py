"""transformers' continuous batching with the trainer's own weights: paged attention, prompts read in the same batch.

Made for GPUs with flash attention; it runs on a CPU, too. Its noise is torch's own, seeded by run and first episode:
a reply depends on the company that it is sampled in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

import torch

from baton.decode import Reply
from baton.errors import UserError
from baton.ppo_sections import Rollout
from stages.rollout import sampling_noise

PAGE_TOKENS = 32
BATCH_TOKENS = 2048
"""Tokens of one forward: those of prompts that are being read, and one for each other row."""


class ContinuousBatching:
    """`model.generate_batch` of the policy."""

    def __init__(
        self,
        rollout: Rollout,
        *,
        model_of: Callable[[], AbstractContextManager[Any]],
        seed: int,
        stop_ids: Sequence[int],
        pad_id: int,
        alone: bool = True,
    ) -> None:
        if not alone:
            raise UserError(
                "rollout.engine: transformers cannot sample from weights that are spread over processes (FSDP, "
                "ZeRO-3): each process would make another number of forward passes; use rollout.engine: built-in"
            )
        self._rollout, self._model_of, self._seed = rollout, model_of, seed
        self._stop_ids, self._pad_id = list(stop_ids), pad_id

    def push(self) -> None:
        """Nothing to do: the weights are the trainer's, and no keys or values outlive `generate`."""

    def close(self) -> None:
        """Nothing to do."""

    def generate(self, prompts: Sequence[list[int]], indices: Sequence[int]) -> list[Reply]:
        if not len(prompts):
            return []
        with self._model_of() as model, _everywhere(model):
            if not hasattr(model, "generate_batch"):
                raise UserError(
                    f"rollout.engine: transformers needs a model with generate_batch; {type(model).__name__} has none: "
                    "use rollout.engine: built-in"
                )
            kind = model.device.type
            if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is not model.dtype:
                raise UserError(
                    f"rollout.engine: transformers keeps its cache in the weights' number format, {model.dtype}, and "
                    f"this policy computes in {torch.get_autocast_dtype(kind)}; use rollout.engine: built-in"
                )
            # the sampler draws from torch's global generator, which belongs to the trainer
            devices = [model.device] if model.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices):
                results = model.generate_batch(
                    [list(prompt) for prompt in prompts],
                    generation_config=self._generation(),
                    continuous_batching_config=self._batching(model, prompts, indices[0]),
                    warmup=False,
                )
        failed = [result.error for result in results.values() if result.error is not None]
        if failed or len(results) != len(prompts):
            raise RuntimeError(
                f"continuous batching gave {len(results) - len(failed)} of {len(prompts)} replies; the first error: "
                f"{failed[0] if failed else 'its thread ended, see the log'}"
            )
        # in the order of the prompts
        return [self._reply(result) for result in results.values()]

    def _reply(self, result: Any) -> Reply:
        ids, logprobs = list(result.generated_tokens), [float(value) for value in result.logprobs]
        assert len(ids) == len(logprobs) <= self._rollout.max_new_tokens, (len(ids), len(logprobs))
        return Reply(ids, ids[-1] in self._stop_ids, logprobs)

    def _generation(self) -> Any:
        from transformers import GenerationConfig

        # neither top-k, which is 50 by default, nor top-p: the sampled distribution is the one that is trained
        return GenerationConfig(
            do_sample=True,
            temperature=self._rollout.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self._rollout.max_new_tokens,
            eos_token_id=self._stop_ids or None,
            pad_token_id=self._pad_id,
        )

    def _batching(self, model: Any, prompts: Sequence[list[int]], first: int) -> Any:
        from transformers import ContinuousBatchingConfig

        longest = max(len(prompt) for prompt in prompts) + self._rollout.max_new_tokens
        rows = min(self._rollout.rows, len(prompts))
        return ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            # by default it takes most of the memory that is free, which the trainer needs
            num_blocks=(rows + 1) * (-(-longest // PAGE_TOKENS) + 1),
            max_batch_tokens=max(BATCH_TOKENS, rows),
            max_requests_per_batch=rows,
            allow_block_sharing=False,
            return_logprobs=True,
            seed=int(sampling_noise(self._seed, first, 1)[0] * 2**31),
            auto_switch_to_flash=model.device.type == "cuda",
        )


@contextmanager
def _everywhere(model: Any) -> Iterator[None]:
    """Autocast, where it is on, in the thread that generates, too: it is a thread's own."""
    kind = model.device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    dtype, forward = torch.get_autocast_dtype(kind), model.forward

    @wraps(forward)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(kind, dtype=dtype):
            return forward(*args, **kwargs)

    model.forward = inside
    try:
        yield
    finally:
        del model.forward
