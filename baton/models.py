"""Models out of the registry: the number format to compute in, a policy to talk to, a reward model to score with."""

from __future__ import annotations

import json
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from baton.registry import Registry, Version


def compute_dtype(setting: str, device: str | None = None) -> torch.dtype:
    """The dtype to compute in on `device` (`cpu`, `cuda`; by default what there is): `auto` asks the machine."""
    import torch

    if setting != "auto":
        return getattr(torch, setting)
    if device != "cpu" and torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _fast_bfloat16() else torch.float32


@lru_cache(maxsize=1)
def _fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices at least 1.5 times as fast as float32 ones (about 50 ms)."""
    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.ones(512, 512, dtype=dtype)
        left @ left
        runs = []
        for _ in range(5):
            start = time.perf_counter()
            left @ left
            runs.append(time.perf_counter() - start)
        seconds[dtype] = sorted(runs)[2]
    return seconds[torch.float32] > 1.5 * seconds[torch.bfloat16]


def quieten() -> None:
    """Keep transformers from telling a command's reader how it loads weights."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, padding on the right."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # never asks, never runs its files
    tokenizer.padding_side = "right"
    return tokenizer


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id and one more, which a table by id needs; len() leaves out ids that no token has."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def check_positions(folder: Path, length: int, key: str) -> None:
    """Raises UserError where `length`, the recipe's `key`, is beyond what the model in `folder` was made for."""
    from transformers import AutoConfig

    limit = getattr(AutoConfig.from_pretrained(folder).get_text_config(), "max_position_embeddings", None)
    if limit is not None and 0 < limit < length:
        raise UserError(f"{key} is {length}, but the base knows {limit} positions; lower it")


def write_stops(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make plain transformers end and pad replies of the complete model in `folder` as its tokenizer does.

    Its base's files name the token that ends a text, where SFT taught it the one that ends a turn.
    """
    from baton.chat import stop_ids

    stops = stop_ids(tokenizer)
    told = {"eos_token_id": stops if len(stops) > 1 else stops[0], "pad_token_id": tokenizer.pad_token_id}
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings |= told
        if "eos_token_id" in settings.get("text_config", {}):
            settings["text_config"] |= told
        path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def check_answers(version: Version) -> None:
    """Raises UserError where a version does not answer prompts: it writes no text, or has no chat template."""
    if version.kind not in ("base", "merged", "adapter"):
        raise UserError(
            f"{version.ref} is a {version.kind} model, which does not write text; give a base or an adapter"
        )
    if version.manifest["chat_template_digest"] is None:
        raise UserError(
            f"{version.ref} has no chat template: it continues text and has not learned to answer. Give a version of "
            "the sft or ppo stage"
        )


def load_policy(registry: Registry, version: Version, dtype: str = "auto") -> tuple[Any, PreTrainedTokenizerBase]:
    """(model, tokenizer) of a base, merged or adapter version, in evaluation mode. The base keeps one copy."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    kind = version.manifest["kind"]
    if kind not in ("base", "merged", "adapter"):
        raise UserError(f"{version.ref} is a {kind} model, which does not write text; give a base or an adapter")
    folder = registry.materialise(version)
    base = base_folder(registry, version)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=compute_dtype(dtype))
    if kind == "adapter":
        model = PeftModel.from_pretrained(model, folder)
    return model.eval(), load_tokenizer(folder)


def load_scorer(registry: Registry, version: Version, dtype: str = "auto") -> tuple[Any, PreTrainedTokenizerBase]:
    """(sequence classifier with one label, tokenizer) of a reward or value version, in evaluation mode.

    An adapter is put on its base; a whole classifier is loaded as it is.
    """
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    kind = version.manifest["kind"]
    if kind not in ("reward", "value"):
        raise UserError(f"{version.ref} is a {kind} model; scoring needs a reward model")
    folder = registry.materialise(version)
    tokenizer = load_tokenizer(folder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        base_folder(registry, version), num_labels=1, dtype=compute_dtype(dtype)
    )
    # a base's configuration knows nothing of padding; a whole classifier's was checked when it was published
    model.config.pad_token_id = tokenizer.pad_token_id
    if version.base is not None:
        model = PeftModel.from_pretrained(model, folder)
    return model.eval(), tokenizer


def load_ensemble(registry: Registry, version: Version, dtype: str = "auto") -> tuple[Any, PreTrainedTokenizerBase]:
    """`load_scorer`, with an ensemble's further members as adapters `member_1`, `member_2`, … of the one model."""
    from baton.adapters import member_folders

    model, tokenizer = load_scorer(registry, version, dtype)
    if version.base is not None:
        for at, folder in enumerate(member_folders(registry.materialise(version))[1:], start=1):
            model.load_adapter(folder, adapter_name=f"member_{at}")
    return model.eval(), tokenizer


def base_folder(registry: Registry, version: Version) -> Path:
    """The materialised folder of the base under `version` (itself, when it is no adapter)."""
    return registry.base_folder(version)
