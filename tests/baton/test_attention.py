"""Short causal attention against torch's own."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from baton import attention


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("whole", [512, 6], ids=["whole", "blocks"])
def test_equals_torchs_attention_and_its_gradients(
    heads: tuple[int, int], strided: bool, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "WHOLE", whole)
    monkeypatch.setattr(attention, "BLOCK", 3)  # of 7 tokens
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> torch.Tensor:
        if strided:  # as a projection's output is seen: (B, L, heads, d) transposed
            return torch.randn(2, 7, count, 5, generator=generator, dtype=torch.float64).transpose(1, 2)
        return torch.randn(2, count, 7, 5, generator=generator, dtype=torch.float64)

    given = [draw(heads[0]), draw(heads[1]), draw(heads[1])]
    for tensor in given:
        tensor.requires_grad_(True)
    ours = attention.short_causal_attention(*given, 0.3)
    theirs = scaled_dot_product_attention(*given, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(attention.short_causal_attention(*given, 0.3), theirs, rtol=0, atol=1e-12)
    weights = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view(ours.shape)
    for mine, plain in zip(
        torch.autograd.grad((ours * weights).sum(), given),
        torch.autograd.grad((theirs * weights).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-12)


def test_a_whole_model_gives_the_same_by_every_attention(tiny_llama: torch.nn.Module) -> None:
    ids = torch.randint(0, 48, (3, 11), generator=torch.Generator().manual_seed(2))
    found = {}
    before = tiny_llama.config._attn_implementation
    for name in ("sdpa", "short"):
        tiny_llama.config._attn_implementation = "sdpa"
        if name == "short":
            attention.choose_attention(tiny_llama, 11)
            assert tiny_llama.config._attn_implementation == attention.NAME
        with torch.no_grad():
            found[name] = tiny_llama(input_ids=ids, use_cache=False).logits
    tiny_llama.config._attn_implementation = before
    torch.testing.assert_close(found["short"], found["sdpa"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "change", "is_short"),
    [
        (1024, {}, True),
        (1025, {}, False),
        (40, {"sliding_window": 8}, False),
        (40, {"sliding_window": 40}, True),
        (40, {"model_type": "gpt_oss"}, False),
    ],
)
def test_what_it_does_not_know_keeps_its_own_attention(length: int, change: dict[str, Any], is_short: bool) -> None:
    config = SimpleNamespace(**({"model_type": "mistral", "_attn_implementation": "own"} | change))
    attention.choose_attention(SimpleNamespace(config=config), length)
    assert config._attn_implementation == (attention.NAME if is_short else "own")


def test_autocast_is_left_before_the_backward_pass_needs_one_format() -> None:
    generator = torch.Generator().manual_seed(3)
    given = [torch.randn(2, 3, 7, 8, generator=generator, requires_grad=True) for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = attention.short_causal_attention(*given, 0.3)
    assert ours.dtype is torch.bfloat16
    gradients = torch.autograd.grad(ours.float().sum(), given)
    plain = scaled_dot_product_attention(*given, is_causal=True, scale=0.3)
    for mine, exact in zip(gradients, torch.autograd.grad(plain.sum(), given), strict=True):
        assert mine.dtype is torch.float32
        torch.testing.assert_close(mine, exact, rtol=0, atol=0.05)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2)])
def test_a_table_says_what_each_token_sees(heads: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(4)
    given = [
        torch.randn(2, count, 7, 5, generator=generator, dtype=torch.float64) for count in (heads[0], *heads[1:] * 2)
    ]
    for tensor in given:
        tensor.requires_grad_(True)
    is_hidden = torch.rand(2, 1, 7, 7, generator=generator) < 0.4
    is_hidden |= torch.ones(7, 7, dtype=torch.bool).triu(1)
    is_hidden &= ~torch.eye(7, dtype=torch.bool)
    table = torch.zeros(2, 1, 7, 7).masked_fill(is_hidden, -torch.inf)
    before = table.clone()
    query, key, value = given
    ours = attention.short_causal_attention(query, key, value, 0.3, table)
    theirs = scaled_dot_product_attention(query, key, value, attn_mask=~is_hidden, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weights = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view(ours.shape)
    for mine, plain in zip(
        torch.autograd.grad((ours * weights).sum(), given),
        torch.autograd.grad((theirs * weights).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-12)
    assert torch.equal(table, before)


@pytest.mark.parametrize(
    ("change", "takes"),
    [
        ({"_attn_implementation": "sdpa"}, True),
        ({"_attn_implementation": "flash_attention_2"}, False),
        ({"_attn_implementation": "sdpa", "sliding_window": 8}, False),
        ({"_attn_implementation": "sdpa", "model_type": "bloom"}, False),
    ],
)
def test_who_takes_tables(change: dict[str, Any], takes: bool) -> None:
    config = SimpleNamespace(**({"model_type": "llama"} | change))
    assert attention.takes_tables(SimpleNamespace(config=config), 9) is takes
