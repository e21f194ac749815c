"""What a LoRA adapter adds to its base: B @ A * scale for each weight, kept as its two factors."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from baton.errors import UserError
from baton.registry.inspection import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from baton.registry.weights import Place, read_places

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")


class Factors(NamedTuple):
    """A change of rank r: `left` (rows, r) @ `right` (r, columns), scaled, in the base weight's own orientation."""

    left: "torch.Tensor"
    right: "torch.Tensor"

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the product."""
        return self.left.shape[0], self.right.shape[1]

    def rows(self, start: int, stop: int) -> "torch.Tensor":
        """Rows `start` to `stop` of the product, (stop - start, columns)."""
        return self.left[start:stop] @ self.right


@dataclass(frozen=True)
class Lora:
    """An adapter by the names of its base's tensors: what it adds to some, and those that it replaces as a whole."""

    factors: dict[str, Factors]
    whole: dict[str, Place]


def read_lora(folder: Path) -> Lora | None:
    """A plain LoRA adapter's changes; None for one that does more or other than adding B @ A * scale."""
    config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    others = ("use_dora", "lora_bias", "target_parameters")
    if config.get("peft_type") != "LORA" or any(config.get(key) for key in others):
        return None
    found: dict[str, dict[str, tuple[str, Place]]] = {}
    whole: dict[str, Place] = {}
    for name, place in read_places(folder / ADAPTER_WEIGHTS).items():
        target = name.removeprefix(_PREFIX)
        if match := _FACTOR.fullmatch(target):
            found.setdefault(match[1], {})[match[2]] = (name, place)
        elif "lora_" in target:
            return None
        else:
            whole[target] = place
    if any(set(pair) != {"A", "B"} for pair in found.values()):
        return None
    factors = {f"{module}.weight": _factors(config, module, pair) for module, pair in found.items()}
    return Lora(factors, whole)


def apart(one: Factors, other: Factors) -> tuple[float, float, float]:
    """||one - other||, ||one||, ||other|| (Frobenius) of two products, without forming them; in float64.

    one - other = [left, -left'] @ [right; right']: with both sides' QR factors, only small matrices are multiplied.
    """
    import torch

    left = torch.cat([one.left, -other.left], dim=1)
    right = torch.cat([one.right, other.right], dim=0)
    return _norm(left, right), _norm(*one), _norm(*other)


def _norm(left: "torch.Tensor", right: "torch.Tensor") -> float:
    import torch

    first = torch.linalg.qr(left.double(), mode="r").R
    second = torch.linalg.qr(right.double().T, mode="r").R
    return float(torch.linalg.matrix_norm(first @ second.T))


def _factors(config: dict[str, Any], module: str, pair: dict[str, tuple[str, Place]]) -> Factors:
    from safetensors import safe_open

    tensors = {}
    for side, (name, place) in pair.items():
        with safe_open(place.file, framework="pt") as file:
            tensors[side] = file.get_tensor(name).float()
    rank = tensors["A"].shape[0]
    scale = _alpha(config, module) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    # a convolution's factors have the kernel's axes after the first two
    a, b = tensors["A"].reshape(rank, -1), tensors["B"].reshape(-1, rank) * scale
    is_turned = "lora_embedding" in pair["A"][0] or bool(config.get("fan_in_fan_out"))
    left, right = (a.T, b.T) if is_turned else (b, a)
    return Factors(left, right)


def _alpha(config: dict[str, Any], module: str) -> float:
    """PEFT's rule: the first pattern that is the module's name, or the end of it after a dot."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        try:
            is_meant = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise UserError(f"{ADAPTER_CONFIG}: alpha_pattern {pattern!r} is no regular expression: {error}") from error
        if is_meant:
            return float(alpha)
    return float(config["lora_alpha"])
