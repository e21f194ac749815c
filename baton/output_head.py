"""Whether a model's logits are what its output head makes of its decoder's states, so that the head can act alone."""

from __future__ import annotations

from typing import Any

import torch

CHANGES_LOGITS = (
    "final_logit_softcapping",  # Gemma
    "logits_soft_cap",  # RecurrentGemma
    "output_logit_soft_cap",  # xLSTM
    "logits_scaling",  # Granite
    "logit_scale",  # Cohere
    "output_multiplier_scale",
    "lm_head_multiplier",  # FalconH1
)
"""Settings by which architectures change their logits after the head."""

_LOUD = 1e3
"""The largest logit that is compared: a cap bends what is beyond it, and an untrained model's logits are small."""


def changes_logits(config: Any) -> list[str]:
    """Those of CHANGES_LOGITS that a model's configuration uses: its head alone does not give its logits."""
    settings = config.get_text_config()
    return [name for name in CHANGES_LOGITS if getattr(settings, name, None) not in (None, 1, 1.0)]


@torch.no_grad()
def head_makes_logits(model: Any) -> bool:
    """Whether head(decoder(ids).last_hidden_state) is model(ids).logits, compared on a few tokens.

    The head's output is made loud in both, so that a cap after it shows. Mode and attention of the model are kept.
    """
    head = model.get_output_embeddings()
    decoder = getattr(model, model.base_model_prefix, model)
    if head is None or decoder is model or changes_logits(model.config):
        return False
    kind, was_training = model.config._attn_implementation, model.training
    model.config._attn_implementation = "eager"  # a kernel for packed rows wants their borders
    model.eval()
    ids = torch.arange(min(8, len(head.weight)), device=model.get_input_embeddings().weight.device)[None]
    hook = None
    try:
        states = decoder(input_ids=ids, use_cache=False).last_hidden_state
        ours = head(states).float()
        factor = _LOUD / float(ours.abs().max().clamp(min=1e-6))
        hook = head.register_forward_hook(lambda module, given, found: found * factor)
        theirs = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        if hook is not None:
            hook.remove()
        model.config._attn_implementation = kind
        model.train(was_training)
    return torch.allclose(theirs, ours * factor, rtol=1e-2, atol=1e-2 * _LOUD)
