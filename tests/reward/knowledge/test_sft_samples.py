"""Samples of a tiny SFT model: reproducible, distributed as the model says, and never a pad token."""

from collections import Counter

import torch

from reward.knowledge.sft_samples import _inverse_cdf, held_out_prompts, sample_sft


def test_prompts_are_taken_once(make_pair) -> None:
    def asked(text):
        return [{"role": "user", "content": text}]

    pairs = [make_pair(1, 1, prompt=asked(text)) for text in ("a", "b", "a", "c")]
    assert [prompt[0]["content"] for prompt in held_out_prompts(pairs, 9)] == ["a", "b", "c"]
    assert [prompt[0]["content"] for prompt in held_out_prompts(pairs, 2)] == ["a", "b"]


def test_inverse_cdf_draws_what_the_model_says() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    uniform = (torch.arange(1000).double() + 0.5) / 1000
    found = Counter(_inverse_cdf(probabilities.log().expand(1000, 4), uniform).ids.tolist())
    assert found == {0: 500, 2: 200, 3: 300}


def test_samples_do_not_depend_on_their_company(tiny_chain) -> None:
    from baton.chat import encode_prompt
    from baton.models import load_policy

    model, tokenizer = load_policy(tiny_chain.registry, tiny_chain.versions["sft"], "float32")
    prompts = [[{"role": "user", "content": text}] for text in ("Who is it?", "What?", "Please name the animal.")]
    settings = {"max_new_tokens": 6, "replies_per_prompt": 2}
    found = sample_sft(model, tokenizer, prompts, **settings)
    assert len(found) == 6 and found[0].prompt == found[1].prompt == prompts[0]
    assert found[0].ids == encode_prompt(tokenizer, prompts[0]) + found[0].reply_ids
    assert found[0].reply_ids != found[1].reply_ids
    assert found == sample_sft(model, tokenizer, prompts, max_rows=1, **settings)
    assert found[:4] == sample_sft(model, tokenizer, prompts[:2], **settings)
    assert found != sample_sft(model, tokenizer, prompts, seed=1, **settings)
    assert all(tokenizer.pad_token_id not in sample.reply_ids for sample in found)
    assert sample_sft(model, tokenizer, prompts, max_new_tokens=10**6) == []
