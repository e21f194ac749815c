"""Safetensors files without torch: names, shapes and dtypes from the headers, checked for closure."""

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from baton.errors import UserError

HEAD = "score.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
"""The usual names of the input embedding."""

_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}
_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64"}
_NAMES |= {"I32": "int32"}
_NAMES |= {"I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
_NAMES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_MAX_HEADER_BYTES = 100 << 20
_MAX_METADATA_BYTES = 64 << 10


class Tensor(NamedTuple):
    """A tensor as its file's header describes it; `dtype` has torch's name for it."""

    shape: tuple[int, ...]
    dtype: str


class Place(NamedTuple):
    """Where a tensor's bytes lie in a file; `dtype` has torch's name for it."""

    shape: tuple[int, ...]
    dtype: str
    file: Path
    start: int
    num_bytes: int


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; raises UserError when the file is cut off or not one."""
    return {name: Tensor(place.shape, place.dtype) for name, place in read_places(path).items()}


def read_places(path: Path) -> dict[str, Place]:
    """As `read_header`, with the place of every tensor in the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise UserError(f"{path} is not a whole safetensors file ({size} bytes). Save the model again.")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        metadata = header.pop("__metadata__", {})
        if any(type(value) is not str for value in metadata.values()) or len(str(metadata)) > _MAX_METADATA_BYTES:
            raise ValueError("its metadata is no short list of texts")
        spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
        tensors = {
            name: Place(
                tuple(entry["shape"]),
                _NAMES.get(entry["dtype"], entry["dtype"].lower()),
                path,
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
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
    if [span[0] for span in spans] != ends[:-1] or ends[-1] != size - 8 - length:
        raise UserError(
            f"{path} is cut off or damaged: it should have {8 + length + ends[-1]} bytes and has {size}. "
            "Save the model again."
        )
    if not lengths_fit:
        raise UserError(f"{path} is damaged: a tensor's shape does not fit its number of bytes. Save the model again.")
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def read_model(folder: Path) -> dict[str, Tensor]:
    """The tensors of a whole model: `model.safetensors`, or every file that its index names."""
    return {name: Tensor(place.shape, place.dtype) for name, place in find_model(folder).items()}


def find_model(folder: Path) -> dict[str, Place]:
    """As `read_model`, with the place of every tensor. Index and shards must name each other completely."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        if index.is_file():
            raise UserError(f"{folder} has both {single.name} and {index.name}: two models. Delete the one not meant.")
        _refuse_strays(folder, [single.name])
        return read_places(single)
    if not index.is_file():
        raise UserError(f"{folder} has no model.safetensors. Save the model with save_pretrained.")
    try:
        content = json.loads(index.read_bytes(), object_pairs_hook=_without_duplicates)
        places: dict[str, str] = content["weight_map"]
        files = sorted(set(places.values()))
        total = (content.get("metadata") or {}).get("total_size")
        is_plain = all(Path(name).name == name for name in files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is not a safetensors index ({error}). Save the model again.") from error
    if not is_plain:
        raise UserError(f"{index} names files outside its folder: {', '.join(files[:3])}. Save the model again.")
    tensors: dict[str, Place] = {}
    for name in files:
        if not (folder / name).is_file():
            raise UserError(f"{index} names {name}, which is missing. Copy every shard, or save the model again.")
        shard = read_places(folder / name)
        placed = {tensor for tensor, place in places.items() if place == name}
        if missing := placed - set(shard):
            raise UserError(f"{folder / name} lacks {min(missing)}, which {index.name} places there.")
        if unnamed := set(shard) - placed:
            where = f"places in {places[min(unnamed)]}" if min(unnamed) in places else "does not name"
            raise UserError(f"{folder / name} holds {min(unnamed)}, which {index.name} {where}. Save the model again.")
        tensors |= shard
    _refuse_strays(folder, files)
    found = sum(place.num_bytes for place in tensors.values())
    if total is not None and total != found:
        raise UserError(f"{index} says total_size {total}, the shards hold {found} bytes. Save the model again.")
    return tensors


def _refuse_strays(folder: Path, files: list[str]) -> None:
    strays = sorted({path.name for path in folder.glob("model*.safetensors")} - set(files))
    if strays:
        raise UserError(
            f"{folder / strays[0]} is no part of the model ({', '.join(files[:3])}), left by another save. Delete it."
        )


def dtype_of(tensors: Mapping[str, Tensor | Place]) -> str | dict[str, int]:
    """The tensors' dtype; when they differ, the number of tensors of each dtype."""
    counts = Counter(tensor.dtype for tensor in tensors.values())
    return next(iter(counts)) if len(counts) == 1 else dict(counts)


def num_parameters(tensors: Mapping[str, Tensor | Place]) -> int:
    """Stored numbers in all (tied weights are stored, and counted, once)."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


def embedding_rows(tensors: Mapping[str, Tensor | Place]) -> int | None:
    """Rows of the input embedding, if it is among the tensors under one of its usual names."""
    for name, tensor in tensors.items():
        if name.endswith(EMBEDDINGS) and len(tensor.shape) == 2:
            return tensor.shape[0]
    return None


def stored_name(name: str, stored: Collection[str]) -> str | None:
    """What a tensor is called among `stored` names: some models are stored without the prefix they are saved with.

    GPT-2's `transformer.wte.weight` is `wte.weight` on the Hub. None when there is no such tensor, or there are two.
    """
    if name in stored:
        return name
    inner = name.partition(".")[2]
    # Never down to the last part: every layer has a `weight`.
    if "." in inner and inner in stored:
        return inner
    longer = [other for other in stored if "." in name and other.partition(".")[2] == name]
    return longer[0] if len(longer) == 1 else None
