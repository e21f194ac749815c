"""Base models from outside the registry: a local Hugging Face folder, a GGUF file, or a hub id with its revision."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.build import ModelSource
from baton.errors import UserError
from baton.registry.checks import require_base_in_place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_external(source: ModelSource) -> tuple[Any, PreTrainedTokenizerBase]:
    """(causal language model in its stored dtype, tokenizer), after a forward pass that must give finite logits.

    A GGUF file is de-quantised to bfloat16. Raises UserError when the files do not load or do not belong together.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loader: Any = AutoModelForCausalLM  # with the report it returns a pair, which its types do not know
    where = f"{source.path}@{source.revision}" if source.revision else source.path
    try:
        if source.kind == "gguf":
            folder, name = str(Path(source.path).parent), Path(source.path).name
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
            model, report = loader.from_pretrained(
                folder, gguf_file=name, dtype=torch.bfloat16, output_loading_info=True
            )
            _mark_dense(model)
        else:
            require_base_in_place(Path(source.path))  # where it is an adapter's folder
            revision = source.revision or "main"
            tokenizer = AutoTokenizer.from_pretrained(source.path, revision=revision)
            model, report = loader.from_pretrained(
                source.path, revision=revision, dtype="auto", use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"base: {where} does not load as a causal language model with its tokenizer: {reason}"
        ) from None
    absent = [*report["missing_keys"], *report["mismatched_keys"]]
    if absent:
        raise UserError(
            f"base: {where} lacks {len(absent)} of the weights of a causal language model, such as {absent[0]}: they "
            "would be random. Give a complete checkpoint"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise UserError(
            f"base: {where} has {rows} embedding rows for a tokenizer of {len(tokenizer)} tokens; they do not belong "
            "together"
        )
    ids = torch.arange(min(16, rows))[None]
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    if not torch.isfinite(logits).all():
        raise UserError(f"base: {where} loads, but its logits are not finite numbers; the weights are damaged")
    return model, tokenizer


def _mark_dense(model: Any) -> None:
    """The GGUF loader marks the model as quantised although its tensors are dense, and saving would refuse it."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
