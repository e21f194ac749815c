"""The reward of token ids: a sequence classifier's score at the last token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Scorer = Callable[[Sequence[Sequence[int]]], torch.Tensor]
"""Token ids of N sequences -> scores (K, N) of the K members of a reward model, in float32."""


@torch.no_grad()
def score(model: Any, sequences: Sequence[Sequence[int]], pad_id: int, max_tokens: int = 8192) -> torch.Tensor:
    """Scores (N,) in float32, on the CPU, of right-padded `sequences`; groups of like length hold at most `max_tokens`.

    The classifier reads its score at the last token that is not `pad_id`; so no sequence may end with it.
    """
    assert all(ids and ids[-1] != pad_id for ids in sequences), "a sequence ends with the pad token"
    device = next(model.parameters()).device
    scores = torch.empty(len(sequences))
    order = sorted(range(len(sequences)), key=lambda at: (-len(sequences[at]), at))
    while order:
        longest = len(sequences[order[0]])
        group, order = order[: max(1, max_tokens // longest)], order[max(1, max_tokens // longest) :]
        ids = [list(sequences[at]) for at in group]
        input_ids = torch.tensor([row + [pad_id] * (longest - len(row)) for row in ids], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        scores[torch.tensor(group)] = logits[:, 0].float().cpu()
    return scores
