"""Decoders by size: the shape, learning rate and batch that the literature advises for a number of parameters."""

from __future__ import annotations

import math
from typing import NamedTuple

from baton.errors import UserError
from baton.scaling import learning_rate, tokens_per_batch

SIZES = {"2M": 2e6, "10M": 10e6, "50M": 50e6, "124M": 124e6, "350M": 350e6, "1B": 1e9}
"""Parameters in all, a tied embedding counted once: as SmolLM2-135M and GPT-2's 124M are named."""

ASPECT = 48.0
"""Width over depth. Kaplan et al. 2020 (section 3.1) find the loss flat from about 20 to 100; SmolLM2's (Allal et al.
2025) are 19 to 85, Llama 3.2 1B's is 128."""

TOLERANCE = 0.15
"""How far a preset's parameters may be from its name."""

GROUPED = 100e6
"""From so many parameters on several query heads share a key head."""

TOKENS_PER_PARAMETER = 20.0
"""Compute-optimal training (Hoffmann et al. 2022), for which the learning rate and the batch are chosen."""


class Shape(NamedTuple):
    """A Llama's shape (Touvron et al. 2023)."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int

    def num_parameters(self, vocabulary: int, tied: bool = True) -> int:
        """All of them, with an embedding of `vocabulary` rows, tied to the head or not."""
        width, head = self.hidden_size, self.hidden_size // self.heads
        attention = 2 * width * width + 2 * width * self.kv_heads * head
        layer = attention + 3 * width * self.intermediate_size + 2 * width
        return self.layers * layer + width + vocabulary * width * (1 if tied else 2)


def shape_of(size: str, vocabulary: int, tied: bool = True) -> Shape:
    """The shape nearest to `size` parameters and to the usual ratio of width to depth.

    Heads of 64 (32 in models narrower than 256); grouped queries, three to a key head, from 100M on (Ainslie et
    al. 2023; Llama 3, SmolLM2); a gated layer of 8/3 of the width (Shazeer 2020), in steps of 64 for the matrix units.
    Raises UserError where the embedding alone is too large for the size.
    """
    wanted = SIZES[size]
    best: tuple[float, Shape] | None = None
    # with grouped queries, a whole number of groups of three heads
    for width in range(64, 4097, 64) if SIZES[size] < GROUPED else range(192, 4097, 192):
        for layers in range(2, 65):
            shape = _shape(width, layers, wanted)
            miss = math.log(shape.num_parameters(vocabulary, tied) / wanted)
            if abs(miss) <= math.log1p(TOLERANCE) * 0.9:
                cost = (miss / 0.05) ** 2 + math.log2(width / layers / ASPECT) ** 2
                if best is None or cost < best[0]:
                    best = cost, shape
    if best is None:
        raise UserError(
            f"model.size: {size} with a vocabulary of {vocabulary:,}: the embedding leaves no parameters for the "
            "layers. Take a larger size or a smaller tokenizer.vocab_size, or give the shape (hidden_size, layers, "
            "heads, intermediate_size)"
        )
    return best[1]


def _shape(width: int, layers: int, wanted: float) -> Shape:
    heads = width // (64 if width >= 256 else 32)
    kv_heads = heads // 3 if wanted >= GROUPED else heads
    return Shape(width, layers, heads, kv_heads, 64 * max(1, round(width * 8 / 3 / 64)))


def compute_of(size: str) -> float:
    """FLOPs of a compute-optimal training: 6 for each parameter and token."""
    return 6.0 * SIZES[size] * TOKENS_PER_PARAMETER * SIZES[size]


def learning_rate_of(size: str) -> float:
    """The peak learning rate by the fit of DeepSeek LLM (Bi et al. 2024, equation 1) against compute."""
    return float(f"{learning_rate(compute_of(size)):.2g}")


def tokens_per_batch_of(size: str, sequence_length: int) -> int:
    """The batch by the same fit, as the nearest power of two of rows, so that processes share it evenly."""
    rows = tokens_per_batch(compute_of(size)) / sequence_length
    return int(2 ** max(0, round(math.log2(rows)))) * sequence_length
