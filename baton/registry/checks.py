"""Named checks of a model against its base: what digests of files cannot see, and a loader does not refuse."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.errors import UserError
from baton.registry import weights
from baton.registry.comparison import differs, same_model
from baton.registry.weights import EMBEDDINGS, HEAD, Tensor

if TYPE_CHECKING:
    from baton.registry.version import Version

CHECKS = (
    "swapped-base",
    "lost-head",
    "unchanged-merge",
    "wrong-tokenizer",
    "doubled-dtype",
    "resized-vocabulary",
    "moved-base",
    "probe",
)
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_CONFIGS = re.compile(r"(members/[1-9][0-9]*/)?adapter_config\.json")
_EMBEDDING_PARTS = ("embed", "wte", "trainable_tokens")
_WIDER = 1.5  # a dtype twice as wide doubles the bytes; a few tensors kept in float32 do not


class CheckFailed(UserError):
    """A model is not what it is said to be. `check` names the check that found it."""

    def __init__(self, check: str, message: str) -> None:
        """check: one of `CHECKS`; the message is prefixed with it."""
        assert check in CHECKS, check
        super().__init__(f"check {check}: {message}")
        self.check = check
        self.message = message


def adapter_configs(paths: Iterable[str]) -> list[str]:
    """Among a version's relative paths the adapter configurations that name its base: an ensemble has several."""
    return [path for path in paths if _ADAPTER_CONFIGS.fullmatch(path)]


def named_base(folder: Path) -> str | None:
    """What an adapter's configuration names as its base: a path, a hub id, `baton:<digest>` or nothing."""
    try:
        named = json.loads((folder / ADAPTER_CONFIG).read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return named if isinstance(named, str) and named else None


def is_local(name: str) -> bool:
    """Whether a base's name is a path of this machine and not a hub id: one that exists, or has a path's form."""
    return os.path.isabs(name) or name[:1] in (".", "~") or os.path.exists(name)


def require_base_in_place(folder: Path) -> None:
    """Raise CheckFailed `moved-base` when an adapter's folder names a local base that is not there."""
    named = named_base(folder)
    if named is not None and is_local(named) and not Path(named).expanduser().is_dir():
        raise CheckFailed(
            "moved-base",
            f"{folder / ADAPTER_CONFIG} names the base {named}, which is not there: the folder, or its base/, was "
            "moved or deleted. Get the version again (baton get), write the base's new place into "
            "base_model_name_or_path, or name the base's version (--base REF).",
        )


def check_adapter_against_base(folder: Path, tensors: dict[str, Tensor], base: "Version", base_folder: Path) -> None:
    """An adapter must have been trained on `base`, fit its layers, and keep its vocabulary; raises CheckFailed."""
    _check_named_base(folder, base, base_folder)
    stored = weights.read_model(base_folder)
    _check_shapes(folder, tensors, stored, base)
    rows = base.manifest["vocabulary"]["embedding_rows"]
    for name, tensor in tensors.items():
        if name.endswith(EMBEDDINGS) and len(tensor.shape) == 2 and tensor.shape[0] != rows:
            raise CheckFailed(
                "resized-vocabulary",
                f"{folder}: the adapter was saved with an embedding of {tensor.shape[0]} rows ({name}), its base "
                f"{base.ref} has {rows}. Publish the resized base and train on that, or merge before publishing.",
            )


def check_tokenizer(folder: Path, digest: str, tensors: dict[str, Tensor], base: "Version") -> None:
    """An adapter's tokenizer is its base's, unless it brings weights for an embedding; raises CheckFailed."""
    if digest == base.manifest["tokenizer_digest"] or any(_is_of_embedding(name) for name in tensors):
        return
    raise CheckFailed(
        "wrong-tokenizer",
        f"{folder / 'tokenizer.json'} is another tokenizer ({digest}) than that of its base {base.ref} "
        f"({base.manifest['tokenizer_digest']}), and the adapter brings no embedding of its own: tokens would get the "
        "wrong rows. Save the tokenizer of the training, or train the embedding too (modules_to_save).",
    )


def check_merged(folder: Path, digest: str, base: "Version", base_folder: Path) -> None:
    """A merged model must differ from its base, in the base's dtype and with its tokenizer; raises CheckFailed.

    digest: of the folder's tokenizer.
    """
    found_in_folder, theirs = weights.find_model(folder), weights.find_model(base_folder)
    ours = {weights.stored_name(name, theirs) or name: place for name, place in found_in_folder.items()}
    common = [name for name in ours if name in theirs]
    sizes = [sum(places[name].num_bytes for name in common) for places in (ours, theirs)]
    if common and sizes[0] > _WIDER * sizes[1] and all(ours[name].shape == theirs[name].shape for name in common):
        found, wanted = weights.dtype_of({n: ours[n] for n in common}), weights.dtype_of({n: theirs[n] for n in common})
        raise CheckFailed(
            "doubled-dtype",
            f"{folder} takes {sizes[0]:,} bytes where its base {base.ref} takes {sizes[1]:,}: it is stored as {found}, "
            f"the base as {wanted}. Cast it to the base's dtype and save it again.",
        )
    has_new_head = HEAD in set(ours) - set(theirs)
    if common and not has_new_head and not any(differs(ours[n], theirs[n]) for n in _quick_first(common)):
        raise CheckFailed(
            "unchanged-merge",
            f"{folder} has the very weights of {base.ref}: nothing was merged into it, or what was merged was not "
            "trained. Merge the adapter (baton get --merge) and publish that.",
        )
    if digest != base.manifest["tokenizer_digest"]:
        embeddings = [name for name in common if name.endswith(EMBEDDINGS)]
        if embeddings and not any(differs(ours[name], theirs[name]) for name in embeddings):
            raise CheckFailed(
                "wrong-tokenizer",
                f"{folder / 'tokenizer.json'} is another tokenizer ({digest}) than that of its base {base.ref} "
                f"({base.manifest['tokenizer_digest']}), but the embedding is the base's: tokens would get the wrong "
                "rows. Save the base's tokenizer beside the model.",
            )


def check_rows(folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """A whole model's embedding, head and configuration must agree on the vocabulary; raises CheckFailed."""
    wanted = settings.get("vocab_size")
    for name, tensor in tensors.items():
        is_head = name == "lm_head.weight"
        if isinstance(wanted, int) and (is_head or name.endswith(EMBEDDINGS)) and tensor.shape[0] != wanted:
            raise CheckFailed(
                "resized-vocabulary",
                f"{folder}: {name} has {tensor.shape[0]} rows but config.json says vocab_size {wanted}. Resize with "
                "model.resize_token_embeddings, which changes both, and save the model again.",
            )


def _check_named_base(folder: Path, base: "Version", base_folder: Path) -> None:
    named = named_base(folder)
    if named is None:
        return
    if named.startswith("baton:"):
        if named != f"baton:{base.digest}":
            raise _swapped(folder, named, base)
        return
    place = Path(named).expanduser()
    if not is_local(named) or not place.is_dir() or place.absolute() == base_folder:
        return
    if not same_model(place, base_folder, base.manifest["files"]):
        raise _swapped(folder, named, base)


def _swapped(folder: Path, named: str, base: "Version") -> CheckFailed:
    return CheckFailed(
        "swapped-base",
        f"{folder / ADAPTER_CONFIG} says that the adapter was trained on {named}, whose weights are not those of "
        f"{base.ref} ({base.digest}). Publish it on the base that it was trained on.",
    )


def _check_shapes(folder: Path, tensors: dict[str, Tensor], stored: dict[str, Tensor], base: "Version") -> None:
    for name, tensor in tensors.items():
        for part, side in ((".lora_A.weight", 1), (".lora_B.weight", 0)):
            target = stored.get(name.removeprefix("base_model.model.").removesuffix(part) + ".weight")
            if not name.endswith(part) or target is None or len(target.shape) != 2 or len(tensor.shape) != 2:
                continue
            # Either side: GPT-2's layers keep their weights transposed. PEFT itself checks the exact layout.
            if tensor.shape[side] not in target.shape:
                raise CheckFailed(
                    "swapped-base",
                    f"{folder} does not fit its base {base.ref}: {name} has shape {tensor.shape}, the layer has "
                    f"{target.shape}. Name the base that it was trained on.",
                )


def _is_of_embedding(name: str) -> bool:
    return any(part in name for part in _EMBEDDING_PARTS)


def _quick_first(names: list[str]) -> list[str]:
    # An adapter changes the layers and not the embedding, which is the largest tensor and often the first.
    return sorted(names, key=lambda name: (name.endswith((*EMBEDDINGS, "lm_head.weight")), name))
