"""The engines that use the trainer's own weights: the built-in one and transformers' continuous batching."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.decode import Reply
from baton.errors import UserError
from baton.ppo_sections import Rollout
from baton.sampling import sample_replies
from stages.engines import Engine, open_engine
from stages.engines.agreement import check_engine
from stages.rollout import sampling_noise

PROMPTS = [[3, 4, 5], [7], [9, 9, 30, 9], [2, 40], [11], [1, 2, 3, 4, 5, 6]]
STOPS = [1, 20]


def opened(model_of: Any, seed: int = 3, **settings: Any) -> Engine:
    settings = {"max_new_tokens": 9, "temperature": 0.8} | settings

    def save_policy(folder: Path) -> None:
        raise AssertionError("an engine with the trainer's weights needs no file")

    return open_engine(
        Rollout(**settings),
        model_of=model_of,
        save_policy=save_policy,
        seed=seed,
        stop_ids=STOPS,
        pad_id=2,
        folder=Path("/nonexistent"),
    )


def logprobs(model: Any, prompt: list[int], reply: Reply, temperature: float) -> list[float]:
    ids = torch.tensor([prompt + reply.ids])
    with torch.no_grad():
        table = (model(input_ids=ids, use_cache=False).logits[0].float() / temperature).log_softmax(-1)
    return [float(table[len(prompt) + at - 1, token]) for at, token in enumerate(reply.ids)]


@pytest.mark.parametrize("engine", ["built-in", "transformers"])
def test_replies_with_the_log_probabilities_of_plain_forwards(tiny_llama: Any, model_of: Any, engine: str) -> None:
    found = opened(model_of, engine=engine, rows=4)
    found.push()
    replies = found.generate(PROMPTS, range(6))
    assert len(replies) == 6
    for reply in replies:
        assert reply.ended is (reply.ids[-1] in STOPS) and (reply.ended or len(reply.ids) == 9)
        assert not any(token in STOPS for token in reply.ids[:-1])
    theirs = [logprobs(tiny_llama, prompt, reply, 0.8) for prompt, reply in zip(PROMPTS, replies, strict=True)]
    assert check_engine([reply.logprobs for reply in replies], theirs, 1e-4) > 0


def test_built_in_noise_belongs_to_the_episode(tiny_llama: Any, model_of: Any) -> None:
    import numpy as np

    engine = opened(model_of)
    together = engine.generate(PROMPTS, [4, 5, 6, 7, 8, 9])
    assert [reply.ids for reply in engine.generate(PROMPTS[3:], [7, 8, 9])] == [reply.ids for reply in together[3:]]
    assert [r.ids for r in opened(model_of, rows=2).generate(PROMPTS, [4, 5, 6, 7, 8, 9])] == [r.ids for r in together]
    noise = np.stack([sampling_noise(3, index, 9) for index in range(4, 10)])
    plain = sample_replies(tiny_llama, PROMPTS, noise, temperature=0.8, max_new_tokens=9, stop_ids=STOPS, pad_id=2)
    assert plain == together
    assert engine.generate(PROMPTS, [14, 15, 16, 17, 18, 19]) != together
    assert opened(model_of, seed=4).generate(PROMPTS, [4, 5, 6, 7, 8, 9]) != together


def test_settings_reach_the_sampler(model_of: Any) -> None:
    assert all(len(reply.ids) <= 2 for reply in opened(model_of, max_new_tokens=2).generate(PROMPTS, range(6)))
    cold = opened(model_of, temperature=1e-4)
    assert [r.ids for r in cold.generate(PROMPTS, range(6))] == [r.ids for r in cold.generate(PROMPTS, range(6, 12))]


def test_continuous_batching_is_seeded_and_leaves_torchs_generator_alone(model_of: Any) -> None:
    engine = opened(model_of, engine="transformers")
    torch.manual_seed(0)
    first = engine.generate(PROMPTS, range(6))
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), drawn)
    assert engine.generate(PROMPTS, range(6)) == first
    assert engine.generate(PROMPTS, range(6, 12)) != first
    assert opened(model_of, engine="transformers", seed=4).generate(PROMPTS, range(6)) != first


def test_continuous_batching_samples_the_plain_softmax(tiny_llama: Any, model_of: Any) -> None:
    count, prompt = 600, [4, 4, 30]
    engine = opened(model_of, engine="transformers", max_new_tokens=1, rows=64, temperature=1.0)
    found = Counter(reply.ids[0] for reply in engine.generate([prompt] * count, range(count)))
    with torch.no_grad():
        probabilities = tiny_llama(input_ids=torch.tensor([prompt])).logits[0, -1].double().softmax(-1).tolist()
    for token, probability in enumerate(probabilities):
        deviation = (count * probability * (1 - probability)) ** 0.5 + 1
        assert abs(found[token] - count * probability) < 4.5 * deviation


def test_continuous_batching_under_autocast(tiny_llama: Any) -> None:
    import copy
    from contextlib import nullcontext

    model, seen = copy.deepcopy(tiny_llama).bfloat16(), set()
    model.lm_head.register_forward_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    engine = opened(lambda: nullcontext(model), engine="transformers")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(engine.generate(PROMPTS, range(6))) == 6
    assert seen == {True} and "forward" not in vars(model)
    mixed = opened(lambda: nullcontext(tiny_llama), engine="transformers")
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(UserError, match="float32.*bfloat16.*built-in"):
        mixed.generate(PROMPTS, range(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_built_in_under_autocast(tiny_llama: Any, dtype: torch.dtype, attention: str) -> None:
    """Weights in float32 that are computed with in bfloat16, and bfloat16 weights."""
    import copy
    from contextlib import nullcontext

    model = copy.deepcopy(tiny_llama).to(dtype)
    model.set_attn_implementation(attention)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        replies = opened(lambda: nullcontext(model), rows=2).generate(PROMPTS, range(6))
        theirs = [logprobs(model, prompt, reply, 0.8) for prompt, reply in zip(PROMPTS, replies, strict=True)]
    assert check_engine([reply.logprobs for reply in replies], theirs, 0.05) > 0


def test_continuous_batching_refuses_spread_weights(model_of: Any) -> None:
    with pytest.raises(UserError, match="built-in"):
        open_engine(
            Rollout(max_new_tokens=3, engine="transformers"),
            model_of=model_of,
            save_policy=lambda folder: None,
            seed=0,
            stop_ids=[],
            pad_id=2,
            folder=Path("/nonexistent"),
            agree=lambda going_on: going_on,
        )


def test_no_prompts(model_of: Any) -> None:
    assert opened(model_of).generate([], []) == []
    assert opened(model_of, engine="transformers").generate([], []) == []
