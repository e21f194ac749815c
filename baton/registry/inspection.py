"""Refuse a folder that must not be published, before anything is written."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from baton.adapters import MEMBERS, member_folders
from baton.errors import UserError
from baton.registry.checks import ADAPTER_CONFIG, CheckFailed, check_rows, require_base_in_place
from baton.registry.manifest import is_safe_path, lies_in_base
from baton.registry.pickles import why_pickle
from baton.registry.version import ADAPTER_KINDS, HEAD_KINDS, KINDS, WHOLE_KINDS, Version
from baton.registry.vocabulary import read_json, special_tokens, token_ids
from baton.registry.weights import HEAD, Tensor, embedding_rows, read_header, read_model

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PLAIN_DATA = ("tokenizer.json", "vocab.json")
_CODE = (".py", ".pyc", ".pyo", ".so", ".pyd", ".dll", ".dylib")


def inspect(folder: Path, kind: str, base: Version | None, allow_code: bool = False) -> list[str]:
    """The relative paths to publish, sorted; raises UserError for everything that must not travel.

    allow_code: let `auto_map` and Python files pass; nothing of Baton's ever runs them.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}; expected one of {', '.join(KINDS)}.")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected one written by save_pretrained.")
    paths = _regular_files(folder)
    if not paths:
        raise UserError(f"{folder} is empty; expected a folder written by save_pretrained.")
    for path in paths:
        reason = why_pickle(folder / path)
        if reason:
            raise UserError(
                f"{folder / path} is {reason}: loading it can run any code, so it is not published. "
                "Delete it (training_args.bin, optimizer.pt and the like) or save weights as safetensors."
            )
        if not allow_code:
            _refuse_code(folder / path)
    if base is None and ADAPTER_CONFIG in paths and kind in ADAPTER_KINDS:
        require_base_in_place(folder)
    _check_base(kind, base, is_adapter=ADAPTER_CONFIG in paths)
    if base is not None:
        tensors = _check_adapter(folder, kind, paths)
    else:
        tensors = _check_classifier(folder, kind) if kind in HEAD_KINDS else _check_whole(folder, kind)
    _check_vocabulary(folder, tensors, base)
    if base is None:
        check_rows(folder, read_json(folder / "config.json"), tensors)
    return paths


def _regular_files(folder: Path) -> list[str]:
    paths: list[str] = []
    for here, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(here, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                raise UserError(f"{path} is a symbolic link; copy the file it points to and publish again.")
            if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                raise UserError(f"{path} is neither a file nor a folder; remove it and publish again.")
            if stat.S_ISREG(mode) and path.lstat().st_nlink > 1:
                raise UserError(f"{path} is a hard link, also known under another name; copy it and publish again.")
        paths += [Path(here, name).relative_to(folder).as_posix() for name in files]
    lowered: dict[str, str] = {}
    for name in sorted(paths):
        if not is_safe_path(name):
            raise UserError(f"{folder / name!r} has a name that other systems cannot store; rename it.")
        other = lowered.setdefault(name.casefold(), name)
        if other != name:
            raise UserError(f"{folder} holds both {other} and {name}, one file on some systems; rename one.")
    return sorted(paths)


def has_code(folder: Path, paths: list[str]) -> bool:
    """Whether a folder brings code: files of it, or an `auto_map` that asks a loader to run some."""
    return any(path.endswith(_CODE) or _asks_for_code(folder / path) for path in paths)


def _asks_for_code(path: Path) -> bool:
    if path.suffix != ".json" or path.name in _PLAIN_DATA:
        return False
    data = path.read_bytes()
    # with an escape, "\\u0061uto_map" is the same key
    if b"auto_map" not in data and b"\\u" not in data:
        return False
    try:
        return _has_key(json.loads(data), "auto_map")
    except (ValueError, RecursionError):
        return False  # what is not JSON, no loader reads


def _has_key(value: Any, key: str) -> bool:
    if isinstance(value, dict):
        return bool(value.get(key)) or any(_has_key(item, key) for item in value.values())
    return isinstance(value, list) and any(_has_key(item, key) for item in value)


def _refuse_code(path: Path) -> None:
    if path.name.endswith(_CODE):
        raise UserError(
            f"{path} is code. Models travel without it: delete it, or publish with --allow-code, which sends it and "
            "says so in the manifest; Baton itself never runs it."
        )
    if _asks_for_code(path):
        raise UserError(
            f"{path} has auto_map, which runs Python files from the model's folder. Convert the model to an "
            "architecture of transformers and remove auto_map, or publish with --allow-code: it then travels, and "
            "Baton loads it without running it."
        )


def _check_base(kind: str, base: Version | None, is_adapter: bool) -> None:
    # a reward or value model may also be a whole classifier, which has no base
    if base is None and (kind == "adapter" or kind in HEAD_KINDS and is_adapter):
        raise UserError(f"kind {kind} is an adapter and needs its base model: name it with base (--base REF).")
    if kind not in ADAPTER_KINDS and base is not None:
        raise UserError(f"kind {kind} is a whole model and has no base; name {base.ref} as a parent instead.")
    if base is not None and base.kind not in WHOLE_KINDS:
        raise UserError(
            f"{base.ref} is of kind {base.kind}; an adapter's base is of kind {' or '.join(WHOLE_KINDS)}. "
            "Name the model that the adapter was trained on."
        )


def _check_adapter(folder: Path, kind: str, paths: list[str]) -> dict[str, Tensor]:
    # `get` puts the base at base/: publishing it again would send the whole model as part of the adapter.
    for path in filter(lies_in_base, paths):
        raise UserError(
            f"{folder / path.partition('/')[0]} lies in an adapter's folder; move it out and publish again."
        )
    members = member_folders(folder)
    if len(members) > 1 and kind != "reward":
        raise UserError(f"{folder} holds {MEMBERS}/, an ensemble's; only a reward is one. Publish it as kind reward.")
    tensors, *_ = [_check_one_adapter(member, kind) for member in members]
    return tensors


def _check_one_adapter(folder: Path, kind: str) -> dict[str, Tensor]:
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; kind {kind} is a PEFT adapter's folder (save_pretrained).")
    if not isinstance(read_json(folder / ADAPTER_CONFIG).get("peft_type"), str):
        raise UserError(f"{folder / ADAPTER_CONFIG} has no peft_type; expected PEFT's adapter configuration.")
    tensors = read_header(folder / ADAPTER_WEIGHTS)
    heads = [tensor for name, tensor in tensors.items() if name.endswith(HEAD)]
    if kind in HEAD_KINDS and not heads:
        raise CheckFailed(
            "lost-head",
            f"{folder / ADAPTER_WEIGHTS} has no {HEAD}: the {kind} head was not saved and would be random on "
            'loading. Train with task_type="SEQ_CLS" or modules_to_save=["score"].',
        )
    if kind in HEAD_KINDS and any(head.shape[0] != 1 for head in heads):
        raise UserError(f"{folder / ADAPTER_WEIGHTS}: {HEAD} has shape {heads[0].shape}; expected one row.")
    if kind == "adapter" and heads:
        raise UserError(f"{folder / ADAPTER_WEIGHTS} has a {HEAD}; publish it as kind reward or value.")
    return tensors


def _check_whole(folder: Path, kind: str) -> dict[str, Tensor]:
    if (folder / ADAPTER_CONFIG).exists():
        raise UserError(f"{folder} is an adapter; publish it as kind {', '.join(ADAPTER_KINDS)} with its base.")
    settings = read_json(folder / "config.json")
    tensors = read_model(folder)
    classes = settings.get("architectures") or []
    # A merged reward model may be of kind merged: what is called a classifier must have its head, whatever its kind.
    is_classifier = any(str(name).endswith("ForSequenceClassification") for name in classes)
    if kind in WHOLE_KINDS and is_classifier and HEAD not in tensors:
        raise CheckFailed(
            "lost-head",
            f"{folder} has no {HEAD}, but config.json names {', '.join(map(str, classes))}: the head was not saved, or "
            "has another name, and would be random on loading. Save the whole classifier.",
        )
    return tensors


def _check_classifier(folder: Path, kind: str) -> dict[str, Tensor]:
    """A whole reward or value model: plain transformers must load it with its head, and read it where padding ends."""
    tensors = _check_whole(folder, kind)
    settings = read_json(folder / "config.json")
    classes = settings.get("architectures") or []
    if not any(str(name).endswith("ForSequenceClassification") for name in classes):
        raise UserError(
            f"{folder / 'config.json'} names {', '.join(map(str, classes)) or 'no architecture'}; kind {kind} without "
            "a base is a sequence classifier with one label (AutoModelForSequenceClassification, save_pretrained)."
        )
    if HEAD not in tensors:
        raise CheckFailed(
            "lost-head",
            f"{folder} has no {HEAD}: the {kind} head was not saved, or has another name, and would be random on "
            f"loading. Kind {kind} without a base needs a decoder's sequence classifier, whose head is `score`.",
        )
    if tensors[HEAD].shape[0] != 1:
        raise UserError(f"{folder}: {HEAD} has shape {tensors[HEAD].shape}; expected one row (num_labels=1).")
    if (folder / "tokenizer.json").is_file():
        pad, configured = special_tokens(folder, token_ids(folder))["pad"], settings.get("pad_token_id")
        if pad is None or pad != configured:
            raise UserError(
                f"{folder}: the tokenizer pads with id {pad}, config.json says pad_token_id {configured}. A classifier "
                "reads its score at the last token that is not padding, so in a batch it would read another one. Give "
                "both the same pad token and save both again."
            )
    return tensors


def _check_vocabulary(folder: Path, tensors: dict[str, Tensor], base: Version | None) -> None:
    if not (folder / "tokenizer.json").is_file():
        if base is None:
            raise UserError(
                f"{folder} has no tokenizer.json. Save the tokenizer beside the model: "
                "AutoTokenizer.from_pretrained(…).save_pretrained(folder)."
            )
        return
    rows = rows_of(folder, tensors, base)
    size = vocabulary_size(token_ids(folder))
    if rows < size:
        raise CheckFailed(
            "resized-vocabulary",
            f"{folder}: the embedding has {rows} rows but the tokenizer has {size} tokens. Resize the "
            "embedding and save it (under LoRA: modules_to_save), or save the tokenizer of the training.",
        )


def rows_of(folder: Path, tensors: dict[str, Tensor], base: Version | None) -> int:
    """Rows of the input embedding: the folder's own, else its base's, else the configuration's."""
    rows = embedding_rows(tensors)
    if rows is None and base is not None:
        rows = base.manifest["vocabulary"]["embedding_rows"]
    if rows is None:
        settings: dict[str, Any] = read_json(folder / "config.json")
        rows = settings.get("vocab_size")
    if not isinstance(rows, int):
        raise UserError(f"{folder}: found no input embedding and no vocab_size in config.json.")
    return rows


def vocabulary_size(ids: dict[str, int]) -> int:
    """One more than the highest token id."""
    return max(ids.values(), default=-1) + 1
