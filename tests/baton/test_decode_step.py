"""A decoding step by few operations against transformers' forward pass: logits, who joins and leaves, who may."""

from typing import Any

import pytest
import torch

from baton import decode_step
from baton.adapter_roles import attach_new
from baton.decode import decode
from baton.lora import Acting, families, join_families
from baton.recipe import Lora
from baton.slot_cache import SlotCache

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
PROMPTS = [[3, 9, 41, 7], [5, 17], [12], [8, 33, 2, 44, 11]]


def shared(kind: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Acting]:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    acting = Acting()
    attach_new(model, "x", Lora(r=3), acting, seed=1)
    for name, parameter in model.named_parameters():
        if ".additions." in name or name.endswith("bias"):
            parameter.data = 0.2 * torch.randn_like(parameter)
    model.to(dtype)
    join_families(model)
    return model, acting


@pytest.mark.parametrize("is_held", [True, False])
@pytest.mark.parametrize("role", ["x", None])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_logits_are_those_of_a_plain_forward(kind: str, role: str | None, is_held: bool) -> None:
    """In float32, where the two may differ by rounding alone; rows have different lengths, and one leaves."""
    model, acting = shared(kind, torch.float32)
    acting.role = role
    slots = SlotCache(2, 4, torch.float32, torch.device("cpu"))
    slots.add(None, [0, 0, 0])
    told: list[list[int]] = [[3], [5], [12]]
    with torch.no_grad():
        for family in families(model) if is_held else []:
            family.hold(role)
        read = decode_step.Step(model)
        for step in range(6):
            depths = torch.tensor([len(row) - 1 for row in told])
            ours = read(torch.tensor([row[-1] for row in told]), depths, slots)
            slots.stepped()
            for row, logits in zip(told, ours, strict=True):
                theirs = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1]
                torch.testing.assert_close(logits, theirs, rtol=0, atol=2e-5)
            for at, row in enumerate(told):
                row.append((7 * step + at) % 50)
            if step == 2:
                told = [told[place] for place in slots.drop([True, False, False])]


def test_decoding_takes_it_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 two ways to round may choose another token where two are as likely: the weights leave none such."""
    model, acting = shared("Llama")
    acting.role = "x"
    model.lm_head.weight.data *= 8
    calls = []
    plain = decode_step.Step.__call__

    def spied(step: Any, tokens: torch.Tensor, *given: Any) -> torch.Tensor:
        calls.append(len(tokens))
        return plain(step, tokens, *given)

    monkeypatch.setattr(decode_step.Step, "__call__", spied)
    settings: dict[str, Any] = {"max_new_tokens": 6, "stop_ids": [], "pad_id": 0, "max_rows": 3}
    for family in families(model):
        family.hold("x")
    found = decode(model, PROMPTS, **settings)
    assert calls and max(calls) == 3
    monkeypatch.setattr(decode_step, "can_compute", lambda *given: False)
    taken = len(calls)
    assert decode(model, PROMPTS, **settings) == found
    assert len(calls) == taken


def test_the_step_does_not_see_columns_to_come() -> None:
    """It reads the cache's tensors whole: what a former row left in later columns must weigh nothing."""
    model, acting = shared("Llama", torch.float32)
    acting.role = "x"
    slots = SlotCache(2, 2, torch.float32, torch.device("cpu"))
    slots.add(None, [0, 0])
    read = decode_step.Step(model)
    with torch.no_grad():
        first = read(torch.tensor([3, 5]), torch.zeros(2, dtype=torch.long), slots)
        for layer in slots.cache.layers:
            layer.keys[:, :, 1:], layer.values[:, :, 1:] = 3.0, 1e4
        again = read(torch.tensor([3, 5]), torch.zeros(2, dtype=torch.long), slots)
    assert torch.equal(first, again)


def test_who_may() -> None:
    model, _ = shared("Llama")
    assert decode_step.can_compute(model)
    assert decode_step.can_compute(shared("Llama", torch.float32)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert not decode_step.can_compute(model)
    model.model.layers[0].self_attn.q_proj = model.model.layers[0].self_attn.q_proj.base
    assert not decode_step.can_compute(model)
