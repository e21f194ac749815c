"""Safetensors files without torch: names, shapes and dtypes from the headers, checked for closure."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from baton.errors import UserError

_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}
_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64"}
_NAMES |= {"I32": "int32"}
_NAMES |= {"I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
_NAMES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_MAX_HEADER_BYTES = 100 << 20


class Tensor(NamedTuple):
    """A tensor as its file's header describes it; `dtype` has torch's name for it."""

    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; raises UserError when the file is cut off or not one."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise UserError(f"{path} is not a whole safetensors file ({size} bytes). Save the model again.")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
        tensors = {
            name: Tensor(tuple(entry["shape"]), _NAMES.get(entry["dtype"], entry["dtype"].lower()))
            for name, entry in header.items()
        }
        known = [entry for entry in header.values() if entry["dtype"] in _BYTES]
        lengths_fit = all(
            math.prod(entry["shape"]) * _BYTES[entry["dtype"]] == entry["data_offsets"][1] - entry["data_offsets"][0]
            for entry in known
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UserError(f"{path} has no valid safetensors header ({error}). Save the model again.") from error
    ends = [0, *(span[1] for span in spans)]
    if [span[0] for span in spans] != ends[:-1] or ends[-1] != size - 8 - length or not lengths_fit:
        raise UserError(
            f"{path} is cut off or damaged: it should have {8 + length + ends[-1]} bytes and has {size}. "
            "Save the model again."
        )
    return tensors


def read_model(folder: Path) -> dict[str, Tensor]:
    """The tensors of a whole model: `model.safetensors`, or every file that its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise UserError(f"{folder} has no model.safetensors. Save the model with save_pretrained.")
    try:
        places: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not a safetensors index ({error}). Save the model again.") from error
    tensors: dict[str, Tensor] = {}
    for name in files:
        if not (folder / name).is_file():
            raise UserError(f"{index} names {name}, which is missing. Copy every shard, or save the model again.")
        shard = read_header(folder / name)
        missing = {tensor for tensor, place in places.items() if place == name} - set(shard)
        if missing:
            raise UserError(f"{folder / name} lacks {min(missing)}, which {index.name} places there.")
        tensors |= shard
    return tensors


def dtype_of(tensors: dict[str, Tensor]) -> str | dict[str, int]:
    """The tensors' dtype; when they differ, the number of tensors of each dtype."""
    counts = Counter(tensor.dtype for tensor in tensors.values())
    return next(iter(counts)) if len(counts) == 1 else dict(counts)


def num_parameters(tensors: dict[str, Tensor]) -> int:
    """Stored numbers in all (tied weights are stored, and counted, once)."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def embedding_rows(tensors: dict[str, Tensor]) -> int | None:
    """Rows of the input embedding, if it is among the tensors under one of its usual names."""
    usual = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
    for name, tensor in tensors.items():
        if name.endswith(usual) and len(tensor.shape) == 2:
            return tensor.shape[0]
    return None
