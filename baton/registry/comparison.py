"""Are the weights of two folders the same? Read from the files, in chunks, without loading a model."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.errors import UserError
from baton.registry.stores.files import file_sha256
from baton.registry.weights import Place, find_model

if TYPE_CHECKING:
    import numpy

_CHUNK_ELEMENTS = 1 << 22
_FLOATS = {"float64", "float32", "float16", "bfloat16"}


def same_model(folder: Path, reference: Path, files: list[dict[str, Any]]) -> bool:
    """Whether `folder` holds the weights of `reference`, whose manifest lists `files`: the same files, or values.

    Values are compared in the reference's dtypes, so that a copy saved in a wider one is still the same model.
    """
    digests = {entry["path"]: entry for entry in files if entry["path"].endswith(".safetensors")}
    if all((folder / path).is_file() and (folder / path).stat().st_size == e["size"] for path, e in digests.items()):
        strays = {path.name for path in folder.glob("*.safetensors")} - set(digests)
        if not strays and all(file_sha256(folder / path) == entry["sha256"] for path, entry in digests.items()):
            return True
    try:
        ours, theirs = find_model(folder), find_model(reference)
    except UserError:
        return False
    if any(name not in ours or ours[name].shape != place.shape for name, place in theirs.items()):
        return False
    # More tensors than the reference has: tied weights that one side stored twice, or a head.
    return not any(differs(place, ours[name]) for name, place in theirs.items())


def differs(first: Place, second: Place) -> bool:
    """Whether two stored tensors have other shapes or values; of two dtypes the narrower one decides."""
    if first.shape != second.shape:
        return True
    if first.dtype == second.dtype:
        import numpy

        ours, theirs = _raw(first), _raw(second)
        steps = range(0, len(ours), _CHUNK_ELEMENTS)
        return any(
            not numpy.array_equal(ours[i : i + _CHUNK_ELEMENTS], theirs[i : i + _CHUNK_ELEMENTS]) for i in steps
        )
    if not {first.dtype, second.dtype} <= _FLOATS:
        return True
    narrow = min(first, second, key=lambda place: place.num_bytes).dtype
    count = math.prod(first.shape)
    return any(
        (_values(first, start, narrow) != _values(second, start, narrow)).any()
        for start in range(0, count, _CHUNK_ELEMENTS)
    )


def _raw(place: Place) -> "numpy.ndarray":
    import numpy

    if place.num_bytes == 0:
        return numpy.zeros(0, numpy.uint8)
    return numpy.memmap(place.file, numpy.uint8, "r", place.start, (place.num_bytes,))


def _values(place: Place, start: int, dtype: str) -> "numpy.ndarray":
    """A chunk of a tensor as float64, rounded to `dtype` first."""
    import torch

    count = min(_CHUNK_ELEMENTS, math.prod(place.shape) - start)
    width = place.num_bytes // math.prod(place.shape)
    data = bytearray(_raw(place)[start * width : (start + count) * width])
    tensor = torch.frombuffer(data, dtype=getattr(torch, place.dtype)).to(getattr(torch, dtype)).double()
    values: numpy.ndarray = tensor.numpy()
    return values
