"""How far the weights of two versions lie apart: ||A - B|| / ||A|| by layer, read in chunks with flat memory."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from baton.errors import UserError
from baton.registry.history.lora_delta import Lora, apart, read_lora
from baton.registry.inspection import ADAPTER_WEIGHTS
from baton.registry.version import Version
from baton.registry.weights import Place, find_model, read_places

if TYPE_CHECKING:
    import torch

    from baton.registry.catalogue import Registry

_CHUNK = 1 << 22  # numbers read at a time: 16 MiB as float32
_LAYER = re.compile(r"(?:^|\.)((?:layers|h|blocks|block)\.\d+)\.")


class Change(NamedTuple):
    """How far a tensor, or a group of them, moved; Frobenius norms."""

    name: str
    num_parameters: int
    difference: float  # ||A - B||
    before: float  # ||A||
    after: float  # ||B||

    @property
    def relative(self) -> float | None:
        """||A - B|| / ||A||; None where A is zero and B is not, or where something is not finite."""
        if not self.difference:
            return 0.0
        found = self.difference / self.before if self.before else math.inf
        return found if math.isfinite(found) else None


@dataclass(frozen=True)
class WeightsDifference:
    """What was compared, and what came out; groups and tensors with the largest relative change first."""

    compared: str
    groups: list[Change]  # a layer each, and what lies outside the layers by its module
    tensors: list[Change]
    only_a: list[str]
    only_b: list[str]
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]]  # tensors of different shapes are not compared
    notes: list[str]

    @property
    def total(self) -> Change:
        """All compared tensors together."""
        return _together("all", self.tensors)


def weights_difference(registry: "Registry", a: Version, b: Version) -> WeightsDifference:
    """Compare two versions. Two adapters by their changes to the base, B @ A * scale; else by the whole weights.

    An adapter beside a whole model stands for its base with its change added. Raises UserError for an adapter that
    cannot be added up that way.
    """
    if _weight_files(a) == _weight_files(b) and a.base == b.base:
        return WeightsDifference("the same files", [], [], [], [], [], [])
    if a.base is None and b.base is None:
        return _compare("weights", _Whole(find_model(a.folder())), _Whole(find_model(b.folder())))
    if a.base is not None and b.base is not None:
        return _adapters(registry, a, b)
    return _compare("weights, the adapter added to its base", _effective(registry, a), _effective(registry, b))


def group_of(name: str) -> str:
    """`layers.3` for what belongs to a layer, else the module: `embed_tokens`, `lm_head`, `norm`, `score`."""
    if match := _LAYER.search(name):
        return match[1]
    parts = [part for part in name.split(".") if part not in ("base_model", "model", "transformer", "weight", "bias")]
    return ".".join(parts) or name


class _Whole:
    """A model's tensors: as they are stored, or with an adapter's change added."""

    def __init__(self, places: dict[str, Place], lora: Lora | None = None) -> None:
        self.places = places | (lora.whole if lora else {})
        self.lora = lora

    def rows(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Rows `start` to `stop` as float32, flat; a vector has rows of one number."""
        values = read(self.places[name], start, stop)
        if self.lora is None or name not in self.lora.factors:
            return values
        return values + self.lora.factors[name].rows(start, stop).flatten()


def read(place: Place, start: int, stop: int) -> "torch.Tensor":
    """Rows `start` to `stop` of a stored tensor as float32, flat."""
    import torch

    if not hasattr(torch, place.dtype):
        raise UserError(f"{place.file} has tensors of dtype {place.dtype}, which torch does not read.")
    num_rows = place.shape[0] if place.shape else 1
    width = place.num_bytes // num_rows if num_rows else 0
    data = bytearray((stop - start) * width)
    with open(place.file, "rb") as file:
        file.seek(place.start + start * width)
        if file.readinto(data) != len(data):
            raise UserError(f"{place.file} was cut off while it was read. Run the command again.")
    return torch.frombuffer(data, dtype=getattr(torch, place.dtype)).float() if data else torch.zeros(0)


def _effective(registry: "Registry", version: Version) -> _Whole:
    if version.base is None:
        return _Whole(find_model(version.folder()))
    lora = read_lora(version.folder())
    if lora is None:
        raise UserError(
            f"{version.ref} is not a plain LoRA adapter, so it cannot be compared with a whole model as it is. Merge "
            f"it first (baton get {version.ref} DIR --merge), publish the result as kind merged, and compare that."
        )
    places = find_model(registry.base_folder(version))
    if missing := sorted(set(lora.factors) - set(places)):
        raise UserError(f"{version.ref} changes {missing[0]}, which its base does not store. Merge and publish it.")
    return _Whole(places, lora)


def _adapters(registry: "Registry", a: Version, b: Version) -> WeightsDifference:
    folders = a.folder(), b.folder()
    first, second = (read_lora(folder) for folder in folders)
    note = [] if a.base == b.base else ["the adapters have different bases, which are compared by a diff of their own"]
    if first is None or second is None:
        note.append("not plain LoRA: the adapters' own tensors were compared, not the changes they make")
        places = [read_places(folder / ADAPTER_WEIGHTS) for folder in folders]
        return _compare("the adapters' tensors", _Whole(places[0]), _Whole(places[1]), note)
    tensors, shapes = [], []
    for name in sorted(set(first.factors) & set(second.factors)):
        one, other = first.factors[name], second.factors[name]
        if one.shape != other.shape:
            shapes.append((name, one.shape, other.shape))
        else:
            tensors.append(Change(name, math.prod(one.shape), *apart(one, other)))
    found = _compare("", _Whole(first.whole), _Whole(second.whole))
    return _result(
        "the changes that the adapters make to their base",
        [*tensors, *found.tensors],
        sorted({*found.only_a, *(set(first.factors) - set(second.factors))}),
        sorted({*found.only_b, *(set(second.factors) - set(first.factors))}),
        [*shapes, *found.shapes],
        note,
    )


def _compare(what: str, a: _Whole, b: _Whole, notes: list[str] | None = None) -> WeightsDifference:
    tensors, shapes = [], []
    for name in sorted(set(a.places) & set(b.places)):
        shape, other = a.places[name].shape, b.places[name].shape
        if shape != other:
            shapes.append((name, shape, other))
            continue
        squares = [0.0, 0.0, 0.0]
        for start, stop in _chunks(shape):
            ours, theirs = a.rows(name, start, stop), b.rows(name, start, stop)
            squares = [
                total + _square(values) for total, values in zip(squares, (ours - theirs, ours, theirs), strict=True)
            ]
        tensors.append(Change(name, math.prod(shape), *map(math.sqrt, squares)))
    only_a, only_b = sorted(set(a.places) - set(b.places)), sorted(set(b.places) - set(a.places))
    return _result(what, tensors, only_a, only_b, shapes, notes or [])


def _square(values: "torch.Tensor") -> float:
    import torch

    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    num_rows = shape[0] if shape else 1
    step = max(1, _CHUNK // max(1, math.prod(shape[1:])))
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def _result(
    what: str,
    tensors: list[Change],
    only_a: list[str],
    only_b: list[str],
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
    notes: list[str],
) -> WeightsDifference:
    by_group: dict[str, list[Change]] = {}
    for change in tensors:
        by_group.setdefault(group_of(change.name), []).append(change)
    groups = [_together(name, members) for name, members in by_group.items()]
    return WeightsDifference(
        what, sorted(groups, key=_largest), sorted(tensors, key=_largest), only_a, only_b, shapes, notes
    )


def _largest(change: Change) -> tuple[float, str]:
    return (-math.inf if change.relative is None else -change.relative, change.name)


def _together(name: str, members: list[Change]) -> Change:
    norms = [math.sqrt(sum(value**2 for value in column)) for column in zip(*(m[2:] for m in members), strict=True)]
    return Change(name, sum(member.num_parameters for member in members), *(norms or [0.0, 0.0, 0.0]))


def _weight_files(version: Version) -> dict[str, Any]:
    # An adapter's configuration has its scale.
    names = (".safetensors", ".safetensors.index.json", "adapter_config.json")
    return {e["path"]: e["sha256"] for e in version.manifest["files"] if Path(e["path"]).name.endswith(names)}
