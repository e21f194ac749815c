"""How much of the machine a training uses: its arithmetic against the measured rate of matrix products."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from baton.scaling import training_flops_per_token

if TYPE_CHECKING:
    import torch

SECONDS = 0.5
SIDE = {"cpu": 2048, "cuda": 8192}


def flops_per_token(model: Any, sequence_length: int) -> float:
    """Model FLOPs of training on one token: 6 N + 12 L H Q T (Chowdhery et al. 2022, appendix B).

    N counts the matrices that multiply: a table of embeddings only where it is the head too. Attention counts the
    whole row of T tokens, as is the convention, although causality and document borders spare much of it.
    """
    config, table = model.config, model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    matrices = sum(p.numel() for p in model.parameters() if p.dim() >= 2)
    if head is None or head.weight is not table:
        matrices -= table.numel()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return training_flops_per_token(matrices, config.num_hidden_layers, width, sequence_length)


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = SECONDS) -> float:
    """FLOP/s of a square product on this process's device: the best of those that fit in `seconds`."""
    import torch

    side = SIDE.get(device.type, SIDE["cuda"])
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    best, began = float("inf"), time.perf_counter()
    left @ right
    _wait(device)
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        left @ right
        _wait(device)
        best = min(best, time.perf_counter() - start)
    if best == float("inf"):  # a machine on which one product takes longer
        start = time.perf_counter()
        left @ right
        _wait(device)
        best = time.perf_counter() - start
    return 2.0 * side**3 / best


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
