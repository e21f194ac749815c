"""Where the head acts alone: architectures that scale or cap their logits are seen, even while these are small."""

from typing import Any

import pytest
import torch

from baton import output_head
from baton.output_head import changes_logits, head_makes_logits

SMALL = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}


def made(name: str) -> Any:
    """A random model with small logits."""
    import transformers

    settings: dict[str, Any] = {
        "Llama": {},
        "Gemma2": {"final_logit_softcapping": 30.0},
        "RecurrentGemma": {"logits_soft_cap": 30.0, "lru_width": 32, "block_types": ["recurrent"]},
        "FalconH1": {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16},
        "Granite": {"logits_scaling": 4.0},
        "Cohere": {"logit_scale": 0.25},
    }[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **settings)
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize("name", ["Gemma2", "RecurrentGemma", "FalconH1", "Granite", "Cohere"])
def test_logits_that_are_changed_after_the_head(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(name)
    assert changes_logits(model.config) and not head_makes_logits(model)
    monkeypatch.setattr(output_head, "CHANGES_LOGITS", ())  # by figures alone, as of an architecture to come
    assert not head_makes_logits(model)


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product(has_bias: bool) -> None:
    model = made("Llama").train()
    if has_bias:
        model.get_output_embeddings().bias = torch.nn.Parameter(torch.ones(48))
    kind = model.config._attn_implementation
    assert head_makes_logits(model)
    assert model.training and model.config._attn_implementation == kind
    assert not model.get_output_embeddings()._forward_hooks


def test_a_cap_far_above_the_logits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("Gemma2")
    ids = torch.arange(8)[None]
    assert float(model(input_ids=ids).logits.detach().abs().max()) < 1
    monkeypatch.setattr(output_head, "CHANGES_LOGITS", ())
    monkeypatch.setattr(output_head, "_LOUD", 1e-2)
    assert head_makes_logits(model), "so small, a cap bends nothing"
