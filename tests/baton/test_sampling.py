"""Sampled tokens against the formula, and noise that hangs on what is sampled alone."""

from typing import Any

import numpy as np
import pytest
import torch

from baton.decode import Reply
from baton.sampling import inverse_cdf, sample_replies, text_noise


def sampled(model: Any, prompts: list[list[int]], noise: np.ndarray, temperature: float = 1.0) -> list[Reply]:
    return sample_replies(
        model, prompts, noise, temperature=temperature, max_new_tokens=noise.shape[1], stop_ids=[1], pad_id=2
    )


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
    noise = np.stack([text_noise(0, str(index), 1) for index in range(count)])
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


def test_log_probabilities_are_those_of_the_sampled_distribution(tiny_llama: Any) -> None:
    prompts = [[3, 9], [5], [7, 7, 7]]
    noise = np.stack([text_noise(1, str(index), 6) for index in range(3)])
    for temperature in (1.0, 0.6):
        for prompt, reply in zip(prompts, sampled(tiny_llama, prompts, noise, temperature), strict=True):
            with torch.no_grad():
                logits = tiny_llama(input_ids=torch.tensor([prompt + reply.ids])).logits[0].double()
            table = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
            expected = table.gather(-1, torch.tensor(reply.ids)[:, None]).squeeze(-1).tolist()
            assert reply.logprobs == pytest.approx(expected, abs=1e-4)


def test_noise_is_a_function_of_seed_text_and_position() -> None:
    noise = text_noise(1, "who?", 8)
    assert ((noise >= 0) & (noise < 1)).all() and len(set(noise.tolist())) == 8
    assert text_noise(1, "who?", 8).tolist() == noise.tolist()
    assert text_noise(1, "who?", 3).tolist() == noise[:3].tolist()
    assert len({tuple(text_noise(seed, key, 8)) for seed in (1, 2) for key in ("who?", "who", "")}) == 6
