"""Short causal attention against torch's own."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from stages import attention


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("strided", [False, True])
def test_equals_torchs_attention_and_its_gradients(heads: tuple[int, int], strided: bool) -> None:
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


@pytest.mark.parametrize(("length", "chosen"), [(512, attention.NAME), (513, "sdpa")])
def test_long_rows_take_the_fused_kernel(tiny_llama: torch.nn.Module, length: int, chosen: str) -> None:
    before = tiny_llama.config._attn_implementation
    attention.choose_attention(tiny_llama, length)
    assert tiny_llama.config._attn_implementation == chosen
    tiny_llama.config._attn_implementation = before
