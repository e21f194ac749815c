"""PPO's checkpoints: named tensors in safetensors, everything else in JSON; written aside, synced, renamed.

A checkpoint is a folder checkpoint-STEP with `tensors.safetensors`, `state.json` and, last, `complete`: the sha256 of
the other two. The names of tensors begin with what they are: weight/NAME, adam/NAME/MOMENT, rng/RANK/GENERATOR; a
caller adds its own, such as best/NAME.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from baton.errors import UserError
from baton.preemption import Group

NEEDS = "needs"
"""The key of `state` that lists other checkpoints, by their folders' names, that must stay as long as this one."""

PYTHON_WORDS = 625  # Mersenne Twister: 624 words and the position among them


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Write `folder`/checkpoint-STEP whole or not at all, then delete all but the last `keep` and what those need.

    `state` is plain JSON, whose floats come back bit by bit; `step` is added to it. One process writes: rank 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob("aside-*"):
        shutil.rmtree(left_over)
    aside, final = folder / f"aside-{step}", folder / f"checkpoint-{step}"
    aside.mkdir()
    save_file(_separate(tensors), aside / "tensors.safetensors")
    (aside / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
    digests = {path.name: _sha256(path) for path in sorted(aside.iterdir())}
    (aside / "complete").write_text(json.dumps(digests), encoding="utf-8")
    for path in (*aside.iterdir(), aside):
        _sync(path)
    _remove(final)
    os.replace(aside, final)
    _sync(folder)
    _delete_old(folder, keep)
    return final


def load_checkpoint(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors on the CPU, state with its `step`). Raises UserError when a file is not the one that was written."""
    expected = json.loads((checkpoint / "complete").read_text(encoding="utf-8"))
    for name, digest in expected.items():
        path = checkpoint / name
        if not path.is_file() or _sha256(path) != digest:
            raise UserError(
                f"{path} is {'damaged' if path.is_file() else 'missing'}: it is not what was saved; delete {checkpoint}"
                " and run the same command again: it goes on from the checkpoint before, or from the start"
            )
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return load_file(checkpoint / "tensors.safetensors"), state


def training_tensors(
    parameters: Mapping[str, torch.Tensor], optimizers: Iterable[torch.optim.Optimizer]
) -> dict[str, torch.Tensor]:
    """weight/NAME and adam/NAME/MOMENT of the named parameters, on the CPU.

    Sharded parameters (DTensors) are gathered whole: then every rank must call this. An optimizer's state must be
    tensors alone, as that of torch's Adam is; its learning rates and the like are the recipe's, and are not saved.
    """
    tensors = {f"weight/{name}": whole(parameter) for name, parameter in parameters.items()}
    states = {id(p): moments for optimizer in optimizers for p, moments in optimizer.state.items()}
    for name, parameter in parameters.items():
        for key, moment in states.get(id(parameter), {}).items():
            assert isinstance(moment, torch.Tensor), f"{key} of {name} is {moment!r}, not a tensor"
            tensors[f"adam/{name}/{key}"] = whole(moment)
    return tensors


def restore_training(
    tensors: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    optimizers: Iterable[torch.optim.Optimizer],
) -> None:
    """Put the weights and moments of `training_tensors` back in place, whatever the number of processes was.

    Raises UserError when the checkpoint's weights are not those of `parameters`.
    """
    saved, wanted = {name for name in tensors if name.startswith("weight/")}, {f"weight/{name}" for name in parameters}
    if saved != wanted:
        odd = sorted(saved ^ wanted)
        raise UserError(f"the checkpoint holds other weights than are trained here, for example {odd[0]}; start afresh")
    restore_weights({name: tensors[f"weight/{name}"] for name in parameters}, parameters)
    names = {id(parameter): name for name, parameter in parameters.items()}
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("adam/"):
            name, _, moment = key.removeprefix("adam/").rpartition("/")
            moments.setdefault(name, {})[moment] = tensor
    for optimizer in optimizers:
        owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        restored = {
            at: {key: _like(moment, parameter) for key, moment in moments[names[id(parameter)]].items()}
            for at, parameter in enumerate(owned)
            if names[id(parameter)] in moments
        }
        # torch's own loading knows on which device each optimizer wants its step counters
        optimizer.load_state_dict({"state": restored, "param_groups": optimizer.state_dict()["param_groups"]})


def restore_weights(weights: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> None:
    """Copy whole `weights` (name -> tensor) into the parameters of the same names, sharded or not."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_like(weights[name], parameter))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU; a sharded tensor (DTensor) is gathered first, which every rank must take part in."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().cpu().clone()


def rng_tensors(group: Group) -> dict[str, torch.Tensor]:
    """rng/RANK/GENERATOR of all ranks (uint8): torch's on the CPU and on this rank's GPU, NumPy's, Python's.

    A collective: every rank calls it and gets the same.
    """
    mine = _own_rng(group)
    packed = torch.cat(list(mine.values())).to(group.device)
    everyone = [packed]
    if group.num_processes > 1:
        import torch.distributed as dist

        everyone = [torch.empty_like(packed) for _ in range(group.num_processes)]
        dist.all_gather(everyone, packed)
    sizes = [len(tensor) for tensor in mine.values()]
    return {
        f"rng/{rank}/{name}": part.clone()
        for rank, row in enumerate(everyone)
        for name, part in zip(mine, row.cpu().split(sizes), strict=True)
    }


def restore_rng(tensors: Mapping[str, torch.Tensor], group: Group, rank: int) -> None:
    """Put this rank's generators back; rank 0 says so when the checkpoint is of another number of processes.

    A rank that the checkpoint does not know keeps the generators that it has.
    """
    ranks = {int(name.split("/")[1]) for name in tensors if name.startswith("rng/")}
    if len(ranks) != group.num_processes and rank == 0:
        print(
            f"the checkpoint holds the random states of {len(ranks)} processes, and {group.num_processes} run: "
            "what a process draws by itself will differ from an uninterrupted run",
            flush=True,
        )
    prefix = f"rng/{rank}/"
    mine = {name.removeprefix(prefix): state for name, state in tensors.items() if name.startswith(prefix)}
    if "torch" in mine:
        torch.set_rng_state(mine["torch"])
    if "cuda" in mine and group.device.type == "cuda":
        torch.cuda.set_rng_state(mine["cuda"], group.device)
    if "numpy" in mine:
        words, rest = mine["numpy"].numpy()[: 624 * 4], mine["numpy"].numpy()[624 * 4 :]
        position, has_gauss = (int(number) for number in rest[:16].copy().view("<i8"))
        gauss = float(rest[16:].copy().view("<f8")[0])
        np.random.set_state(("MT19937", words.copy().view("<u4"), position, has_gauss, gauss))
    if "python" in mine:
        content = mine["python"].numpy()
        numbers = tuple(int(word) for word in content[: PYTHON_WORDS * 4].copy().view("<u4"))
        has_next, next_gauss = content[PYTHON_WORDS * 4 :].copy().view("<f8").tolist()
        random.setstate((3, numbers, next_gauss if has_next else None))


def _own_rng(group: Group) -> dict[str, torch.Tensor]:
    """Each generator's state as bytes whose number is the same on every rank."""
    states = {"torch": torch.get_rng_state()}
    if group.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(group.device)
    _, words, position, has_gauss, gauss = np.random.get_state()
    parts = (np.asarray(words, "<u4"), np.array([position, has_gauss], "<i8"), np.array([gauss], "<f8"))
    states["numpy"] = _bytes(parts)
    version, numbers, next_gauss = random.getstate()
    assert version == 3
    gaussian = np.array([next_gauss is not None, next_gauss or 0.0], "<f8")
    states["python"] = _bytes((np.array(numbers, "<u4"), gaussian))
    return states


def _bytes(parts: Iterable[np.ndarray]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(part.tobytes() for part in parts)), dtype=torch.uint8)


def _like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor as `parameter` wants it: on its device and, where it is sharded, this rank's part of it.

    What has another shape, such as a step counter, stays as it is: torch's optimizers place it themselves.
    """
    if tensor.shape != parameter.shape:
        return tensor
    if not hasattr(parameter, "full_tensor"):
        return tensor.to(parameter.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    # every rank has read the whole tensor: nothing need be sent
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous on the CPU; safetensors refuses tensors that share memory, so the second of two becomes a copy."""
    separate: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate


def _delete_old(folder: Path, keep: int) -> None:
    """All but the last `keep` whole checkpoints, those that they need, those that those need, and so on."""
    found = {path.name: path for path in folder.glob("checkpoint-*")}
    whole_ones = sorted((name for name, path in found.items() if (path / "complete").is_file()), key=_step)
    waiting, kept = whole_ones[-keep:], set()
    while waiting:
        name = waiting.pop()
        if name in kept or name not in found:
            continue
        kept.add(name)
        waiting += json.loads((found[name] / "state.json").read_text(encoding="utf-8")).get(NEEDS, [])
    for name in found.keys() - kept:
        _remove(found[name])


def _step(name: str) -> int:
    return int(name.split("-")[1])


def _remove(checkpoint: Path) -> None:
    (checkpoint / "complete").unlink(missing_ok=True)  # first: half deleted must not look whole
    shutil.rmtree(checkpoint, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Onto the disk; a folder's own entry too, so that a power cut leaves the rename done or undone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
