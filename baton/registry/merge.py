"""Merge an adapter into its base: the plain model that a serving team receives."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.errors import UserError
from baton.registry import probe
from baton.registry.checks import CheckFailed, adapter_configs
from baton.registry.materialise import copy_blob, new_folder
from baton.registry.stores import Store
from baton.registry.stores.files import storage_errors_are_user_errors
from baton.registry.version import HEAD_KINDS, Version
from baton.registry.vocabulary import TOKENIZER_FILES
from baton.registry.weights import Tensor, read_model, stored_name

if TYPE_CHECKING:
    import torch


def merge(store: Store, version: Version, adapter: Path, base: Path, target: Path) -> Path:
    """Merge in float32, prove it by the adapter's probe, cast to the base's dtypes, and save to `target`.

    adapter, base: materialised folders. target: absent or empty. A reward or value version becomes a sequence
    classifier with its head. Raises CheckFailed when merging changes nothing or its result is not saved as it is,
    ProbeMismatch when it gives another model than the adapter on its base.
    """
    assert version.base is not None, version.kind
    members = len(adapter_configs(entry["path"] for entry in version.manifest["files"]))
    if members > 1:
        raise UserError(
            f"{version.ref} is an ensemble of {members} reward models, which no single model gives. Get it as it is "
            "(baton get without --merge); one member alone can be published by itself, and then be merged."
        )
    from peft import PeftModel

    with (
        storage_errors_are_user_errors(f"merging {version.ref} into {target} failed"),
        new_folder(target.absolute()) as folder,
        probe.quiet_loading(),
    ):
        stored = read_model(base)
        pad = version.manifest["vocabulary"]["special_tokens"]["pad"]
        model = probe.load_whole(base, version.kind in HEAD_KINDS, pad)
        before = _fingerprints(model, stored)
        tuned = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
        _untie(tuned.get_base_model())
        model = tuned.merge_and_unload(safe_merge=True)
        _keep_untied(model)
        probe.compare(model.eval(), version.manifest["probe"], f"{version.ref}, merged into its base,", "swapped-base")
        # After the cast: in a narrow dtype a small change can round away, and the base would be shipped.
        after = _fingerprints(model, stored)
        if not any(before.get(name) != fingerprint for name, fingerprint in after.items()):
            raise CheckFailed(
                "unchanged-merge",
                f"{version.ref} leaves every weight of its base unchanged: it was not trained, or its changes are too "
                "small for the base's dtype. Train it longer, or hand on the base.",
            )
        _cast(model, stored)
        _stop_as_tuned(model, version)
        model.save_pretrained(folder)
        _require_dtypes(folder, version, stored)
        _require_as_saved(folder, version, after, stored)
        for entry in version.manifest["files"]:
            if entry["path"] in TOKENIZER_FILES:
                copy_blob(store, entry, folder / entry["path"])
    return target.absolute()


def _stored_dtype(name: str, stored: dict[str, Tensor]) -> "torch.dtype":
    import torch

    # A new tensor (the score head) takes the dtype that most of the base has.
    usual = Counter(tensor.dtype for tensor in stored.values()).most_common(1)[0][0]
    known = stored_name(name, stored)
    dtype: torch.dtype = getattr(torch, usual if known is None else stored[known].dtype)
    return dtype


def _fingerprints(model: "torch.nn.Module", stored: dict[str, Tensor]) -> dict[str, bytes]:
    """A digest of each parameter as it will be stored: the base's copy need not stay in memory."""
    import torch

    fingerprints = {}
    for name, parameter in model.named_parameters():
        cast = parameter.detach().to(_stored_dtype(name, stored)).contiguous()
        fingerprints[name] = hashlib.sha256(cast.view(torch.uint8).numpy().data).digest()
    return fingerprints


def _cast(model: "torch.nn.Module", stored: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(_stored_dtype(name, stored))
    config: Any = model.config
    config.dtype = Counter(parameter.dtype for parameter in model.parameters()).most_common(1)[0][0]


def _stop_as_tuned(model: Any, version: Version) -> None:
    """The base's files know the token that ends a text; the adapter's tokenizer, the one that ends a turn."""
    special = version.manifest["vocabulary"]["special_tokens"]
    if version.kind in HEAD_KINDS or special["eos"] is None:
        return
    stops = [special["eos"], *(stop for stop in special["stop"] if stop != special["eos"])]
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = stops if len(stops) > 1 else stops[0]


def _untie(model: Any) -> None:
    # LoRA on a tied embedding changes the input side alone; merged into the shared weight it would change the head.
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if hasattr(embedding, "lora_embedding_A") and head is not None and head.weight is embedding.weight:
        import torch

        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _keep_untied(model: Any) -> None:
    # An adapter with an embedding of its own leaves the head on the base's: tied again, it would be another model.
    head = model.get_output_embeddings()
    if model.config.tie_word_embeddings and head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False


def _require_as_saved(folder: Path, version: Version, merged: dict[str, bytes], stored: dict[str, Tensor]) -> None:
    """What was saved must load as what was merged and proved; raises CheckFailed."""
    saved = probe.load_whole(folder, None, version.manifest["vocabulary"]["special_tokens"]["pad"])
    found = _fingerprints(saved, stored)
    wrong = sorted(name for name in merged.keys() | found.keys() if merged.get(name) != found.get(name))
    if wrong:
        raise CheckFailed(
            "probe",
            f"{version.ref}, merged and saved, loads with another {wrong[0]} than it was merged with; nothing is "
            "written. Load the adapter on its base instead.",
        )


def _require_dtypes(folder: Path, version: Version, stored: dict[str, Tensor]) -> None:
    for name, tensor in read_model(folder).items():
        wanted = str(_stored_dtype(name, stored)).removeprefix("torch.")
        if tensor.dtype != wanted:
            raise CheckFailed(
                "doubled-dtype",
                f"{version.ref}, merged, is saved with {name} as {tensor.dtype}, where its base has {wanted}; nothing "
                "is written. Load the adapter on its base instead.",
            )
