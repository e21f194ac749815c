"""FLOPs of a token by hand, and the measured rate's order."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from baton.throughput import flops_per_token, matrix_rate


def llama(tied: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            tie_word_embeddings=tied,
        )
    )


def test_flops_of_a_token() -> None:
    # a layer: q, o 32 x 32 each, k, v 32 x 16 each, three of 32 x 48; the head 100 x 32; attention 12 x 2 x 32 x 64
    expected = 6 * (2 * (2 * 1024 + 2 * 512 + 3 * 1536) + 3200) + 12 * 2 * 32 * 64
    assert flops_per_token(llama(tied=True), 64) == expected
    assert flops_per_token(llama(tied=False), 64) == expected  # a table that is only looked up multiplies nothing


def test_the_rate_is_that_of_products() -> None:
    assert matrix_rate(torch.device("cpu"), torch.float32, seconds=0.0) > 1e8
