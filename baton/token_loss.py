"""The loss of next tokens from hidden states, a few positions at a time: the table of all logits is never made.

N positions, H hidden size, V vocabulary. As Cut Cross-Entropy (Wijmans et al. 2024) and Liger (Hsu et al. 2024), the
gradients are made in the forward pass, while a chunk's logits are at hand, so that no logit is computed twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

CHUNK = {"cpu": 1 << 23, "cuda": 1 << 28}
"""Logits of one chunk: 1,024 positions of 8,192 tokens on a CPU; larger ones leave its cache."""


class TokenLoss(NamedTuple):
    """Sums over the positions in the loss."""

    loss: torch.Tensor  # () nats and z-loss; has the gradient
    nats: torch.Tensor  # ()
    num_tokens: torch.Tensor  # ()


def token_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, z: float = 0.0) -> TokenLoss:
    """Cross entropy of softmax(hidden weight^T) at `labels`, plus z times the squared log of its normaliser.

    hidden (N, H), weight (V, H) of one number format, labels (N,), negative where not in the loss. The z-loss keeps
    the logits from drifting (Chowdhery et al. 2022, section 5). A head without bias.
    """
    loss, nats = _Loss.apply(hidden, weight, labels, z)  # type: ignore[no-untyped-call]
    return TokenLoss(loss, nats, (labels >= 0).sum())


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, z: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        wants = ctx.needs_input_grad
        to_hidden = torch.empty_like(hidden) if wants[0] else None
        # a bfloat16 sum over many chunks would lose what each adds; rounded once, at the end
        to_weight = torch.zeros_like(weight, dtype=wide) if wants[1] else None
        loss, nats = torch.zeros(2, dtype=wide, device=hidden.device)
        size = max(1, CHUNK.get(hidden.device.type, CHUNK["cuda"]) // len(weight))
        for at in range(0, len(hidden), size):
            part = slice(at, at + size)
            targets, is_in_loss = labels[part].clamp(min=0)[:, None], labels[part] >= 0
            logits = hidden[part] @ weight.t()
            scores = logits.to(wide)
            norms = scores.logsumexp(-1, keepdim=True)
            spent = ((norms - scores.gather(1, targets)).squeeze(1) * is_in_loss).sum()
            nats = nats + spent
            loss = loss + spent
            slope: torch.Tensor | float = 1.0
            if z:
                loss = loss + z * (norms.squeeze(1).square() * is_in_loss).sum()
                slope = 1.0 + 2.0 * z * norms
            if to_hidden is None and to_weight is None:
                continue
            p = scores.sub_(norms).exp_() if scores is not logits else (scores - norms).exp_()
            p.mul_(slope * is_in_loss[:, None])
            p.scatter_add_(1, targets, -is_in_loss[:, None].to(wide))
            to_logits = p.to(hidden.dtype)
            if to_hidden is not None:
                torch.mm(to_logits, weight, out=to_hidden[part])
            if to_weight is not None:
                if to_weight.dtype == hidden.dtype:
                    to_weight.addmm_(to_logits.t(), hidden[part])
                else:
                    to_weight += to_logits.t() @ hidden[part]
        ctx.save_for_backward(to_hidden, None if to_weight is None else to_weight.to(weight.dtype))
        ctx.mark_non_differentiable(nats)
        return loss, nats

    @staticmethod
    def backward(ctx: Any, given: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        to_hidden, to_weight = ctx.saved_tensors
        return (
            None if to_hidden is None else to_hidden * given.to(to_hidden.dtype),
            None if to_weight is None else to_weight * given.to(to_weight.dtype),
            None,
            None,
        )
