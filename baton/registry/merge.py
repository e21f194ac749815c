"""Merge an adapter into its base: the plain model that a serving team receives."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.errors import UserError
from baton.registry import probe
from baton.registry.inspection import HEAD
from baton.registry.materialise import copy_blob, new_folder
from baton.registry.stores import Store
from baton.registry.stores.files import full_disk_is_user_error
from baton.registry.version import HEAD_KINDS, Version
from baton.registry.vocabulary import TOKENIZER_FILES
from baton.registry.weights import Tensor, read_model

if TYPE_CHECKING:
    import torch


def merge(store: Store, version: Version, adapter: Path, base: Path, target: Path) -> Path:
    """Merge in float32, prove it by the adapter's probe, cast to the base's dtypes, and save to `target`.

    adapter, base: materialised folders. target: absent or empty. A reward or value version becomes a sequence
    classifier with its head. Raises UserError when merging changes nothing, ProbeMismatch when it gives
    another model than the adapter on its base.
    """
    assert version.base is not None, version.kind
    from peft import PeftModel

    with (
        full_disk_is_user_error(f"merging {version.ref} into {target} failed"),
        new_folder(target.absolute()) as folder,
        probe.quiet_loading(),
    ):
        stored = read_model(base)
        pad = version.manifest["vocabulary"]["special_tokens"]["pad"]
        model = probe.load_whole(base, version.kind in HEAD_KINDS, pad)
        before = _fingerprints(model, stored)
        model = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu").merge_and_unload(safe_merge=True)
        probe.compare(model.eval(), version.manifest["probe"], f"{version.ref}, merged into its base,")
        # After the cast: in a narrow dtype a small change can round away, and the base would be shipped.
        after = _fingerprints(model, stored)
        if not any(before.get(name) != fingerprint for name, fingerprint in after.items()):
            raise UserError(f"{version.ref} leaves every weight of its base unchanged: it was not trained.")
        _cast(model, stored)
        model.save_pretrained(folder)
        _require_dtypes(folder, stored)
        for entry in version.manifest["files"]:
            if entry["path"] in TOKENIZER_FILES:
                copy_blob(store, entry, folder / entry["path"])
    return target.absolute()


def _stored_dtype(name: str, stored: dict[str, Tensor]) -> "torch.dtype":
    import torch

    # A new tensor (the score head) takes the dtype that most of the base has.
    usual = Counter(tensor.dtype for tensor in stored.values()).most_common(1)[0][0]
    dtype: torch.dtype = getattr(torch, stored[name].dtype if name in stored else usual)
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


def _require_dtypes(folder: Path, stored: dict[str, Tensor]) -> None:
    for name, tensor in read_model(folder).items():
        wanted = str(_stored_dtype(name, stored)).removeprefix("torch.")
        assert tensor.dtype == wanted, f"{name} was saved as {tensor.dtype}, not {wanted}"
        assert name in stored or name == HEAD, f"{name} is not a tensor of the base"
