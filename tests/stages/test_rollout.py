"""Which prompts, which noise, which tokens."""

from typing import Any

import numpy as np
import pytest
import torch

from baton.decode import Reply
from stages.rollout import (
    episode_prompts,
    inverse_cdf,
    sample_replies,
    sample_with,
    sampling_noise,
)


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


def test_tokens_are_drawn_by_inverse_cdf(tiny_llama: Any) -> None:
    prompt = [3, 11, 7]
    with torch.no_grad():
        logits = tiny_llama(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    for temperature in (1.0, 0.5):
        cdf = np.cumsum((logits / temperature).softmax(-1).numpy())
        uniform = np.linspace(0.0005, 0.9995, 500)
        replies = sampled(tiny_llama, [prompt] * 500, uniform[:, None], temperature)
        expected = [int(np.argmax(cdf > u)) for u in uniform]
        found = [reply.ids[0] for reply in replies]
        # a draw that falls on the very edge of a token's share may go either way
        assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 1


def test_frequencies_follow_the_softmax(tiny_llama: Any) -> None:
    prompt, count = [4, 4, 30], 1500
    with torch.no_grad():
        probabilities = tiny_llama(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1).numpy()
    noise = np.stack([sampling_noise(0, index, 1) for index in range(count)])
    replies = sampled(tiny_llama, [prompt] * count, noise)
    found = np.bincount([reply.ids[0] for reply in replies], minlength=48)
    deviation = np.sqrt(count * probabilities * (1 - probabilities)) + 1
    assert (np.abs(found - count * probabilities) < 4.5 * deviation).all()
    assert 1 < found.max() < count


def test_extreme_draws_stay_inside_the_vocabulary(tiny_llama: Any) -> None:
    replies = sampled(tiny_llama, [[3], [3]], np.array([[0.0], [1.0 - 1e-16]]))
    assert replies[0].ids == [0] and 0 < replies[1].ids[0] < 48


def plain_inverse_cdf(logits: torch.Tensor, uniform: float) -> tuple[int, float, float]:
    """(token, log-probability, distance of the draw from the nearest edge) by the formula, in float64."""
    probabilities = np.exp(logits.double().numpy() - logits.double().numpy().max())
    probabilities /= probabilities.sum()
    cdf = np.cumsum(probabilities)
    token = int(np.argmax(cdf > uniform))
    return token, float(np.log(probabilities[token])), float(np.abs(cdf - uniform).min())


@pytest.mark.parametrize("size", [1, 7, 255, 256, 257, 1000, 49152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_cdf_by_the_formula(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(64, size, generator=generator, dtype=dtype) + 40
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    choice = inverse_cdf(logits, uniform)
    assert choice.logprobs is not None
    # float32 weights move the edges by some 1e-7 of the whole
    bound = 1e-6 if dtype is torch.float32 else 1e-12
    compared = 0
    for row, (token, logprob) in enumerate(zip(choice.ids.tolist(), choice.logprobs.tolist(), strict=True)):
        expected, expected_logprob, distance = plain_inverse_cdf(logits[row], float(uniform[row]))
        if distance > bound:
            compared += 1
            assert token == expected and logprob == pytest.approx(expected_logprob, abs=10 * bound)
    assert compared > 55


def test_inverse_cdf_at_the_edges() -> None:
    logits = torch.full((4, 600), -torch.inf)
    logits[:, [3, 300, 520]] = torch.tensor([0.5, 0.25, 0.25]).log()
    assert inverse_cdf(logits, torch.tensor([0.0, 0.5, 0.75, 1 - 2**-53]).double()).ids.tolist() == [3, 300, 520, 520]
    # one token holds everything that float32 can tell apart
    logits = torch.zeros(3, 600)
    logits[:, 77] = 200.0
    assert inverse_cdf(logits, torch.tensor([0.0, 0.5, 1 - 2**-53]).double()).ids.tolist() == [77, 77, 77]


def test_logits_that_are_no_numbers_stop_the_run(tiny_llama: Any) -> None:
    import copy

    broken = copy.deepcopy(tiny_llama)
    torch.nn.init.constant_(broken.lm_head.weight[5], torch.nan)
    with pytest.raises(RuntimeError, match="not finite at token 0 of the reply to prompt 0"):
        sampled(broken, [[3, 4]], np.array([[0.5, 0.5]]))


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


def test_log_probabilities_are_those_of_the_sampled_distribution(tiny_llama: Any) -> None:
    prompts = [[3, 9], [5], [7, 7, 7]]
    noise = np.stack([sampling_noise(1, index, 6) for index in range(3)])
    for temperature in (1.0, 0.6):
        for prompt, reply in zip(prompts, sampled(tiny_llama, prompts, noise, temperature), strict=True):
            with torch.no_grad():
                logits = tiny_llama(input_ids=torch.tensor([prompt + reply.ids])).logits[0].double()
            table = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
            expected = table.gather(-1, torch.tensor(reply.ids)[:, None]).squeeze(-1).tolist()
            assert reply.logprobs == pytest.approx(expected, abs=1e-4)
