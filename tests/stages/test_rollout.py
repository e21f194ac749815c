"""Which prompts, which noise, and whose replies."""

from typing import Any

import numpy as np
import pytest

from baton.decode import Reply
from baton.sampling import sample_replies
from stages.rollout import episode_prompts, sample_with, sampling_noise


def sampled(model: Any, prompts: list[list[int]], noise: np.ndarray, temperature: float = 1.0) -> list[Reply]:
    return sample_replies(
        model, prompts, noise, temperature=temperature, max_new_tokens=noise.shape[1], stop_ids=[1], pad_id=2
    )


def test_every_prompt_once_an_epoch_in_an_order_of_its_own() -> None:
    seen = [index for first in range(0, 30, 4) for index in episode_prompts(7, 10, first, 4)][:30]
    epochs = [seen[:10], seen[10:20], seen[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert episode_prompts(7, 10, 13, 5) == seen[13:18]
    assert episode_prompts(8, 10, 0, 10) != epochs[0]


def test_noise_is_a_function_of_seed_episode_and_position() -> None:
    noise = sampling_noise(1, 5, 8)
    assert ((noise >= 0) & (noise < 1)).all()
    assert sampling_noise(1, 5, 8).tolist() == noise.tolist()
    assert sampling_noise(1, 5, 3).tolist() == noise[:3].tolist()
    different = {tuple(sampling_noise(seed, index, 8)) for seed in (1, 2) for index in (5, 6, 1 << 40)}
    assert len(different) == 6
    assert len(set(noise.tolist())) == 8


def test_noise_and_order_of_prompts_do_not_share_a_stream() -> None:
    # had both used stream 0, the order of epoch e would be drawn from the noise of episode e
    order = np.random.Generator(np.random.Philox(key=[1, 0 << 1])).permutation(50).tolist()
    assert episode_prompts(1, 50, 0, 50) != order


def agree(found: list[Reply], expected: list[Reply]) -> None:
    assert [(reply.ids, reply.ended) for reply in found] == [(reply.ids, reply.ended) for reply in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


@pytest.mark.parametrize("rows", [3, 16, 64])
def test_replies_do_not_depend_on_order_or_company(tiny_llama: Any, rows: int) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 48, size=rng.integers(1, 9)).tolist() for _ in range(70)]
    settings: dict[str, Any] = dict(seed=3, temperature=1.0, max_new_tokens=12, stop_ids=[1], pad_id=2, rows=rows)
    together = sample_with(tiny_llama, prompts, range(70), **settings)
    assert len({reply.ended for reply in together}) == 2, "some replies should stop and some should not"
    order = rng.permutation(70)
    shuffled = sample_with(tiny_llama, [prompts[at] for at in order], order.tolist(), **settings)
    agree([shuffled[place] for place in np.argsort(order)], together)
    alone = [sample_with(tiny_llama, [prompts[at]], [at], **settings)[0] for at in range(0, 70, 7)]
    agree(alone, together[::7])
    noise = np.stack([sampling_noise(3, index, 12) for index in range(70)])
    agree(sampled(tiny_llama, prompts, noise), together)
