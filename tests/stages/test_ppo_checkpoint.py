"""PPO's checkpoints: what is saved comes back bit by bit, whoever reads it; a half-written one is never seen."""

import json
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from baton.errors import UserError
from stages import ppo_checkpoint
from stages.ppo_checkpoint import (
    load_checkpoint,
    restore_rng,
    restore_training,
    restore_weights,
    rng_tensors,
    save_checkpoint,
    training_tensors,
)

ALONE = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
TWO = SimpleNamespace(num_processes=2, device=torch.device("cpu"))


class Trained:
    """A policy in float32 and a critic in bfloat16, each with its optimizer."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.ModuleDict({"policy": nn.Linear(3, 2), "critic": nn.Linear(3, 1).to(torch.bfloat16)})
        self.parameters = dict(self.model.named_parameters())
        self.optimizers = [
            torch.optim.AdamW(self.model["policy"].parameters(), lr=0.01, weight_decay=0.1),
            torch.optim.AdamW(self.model["critic"].parameters(), lr=0.02, amsgrad=True),
        ]

    def steps(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            for parameter in self.parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            for optimizer in self.optimizers:
                optimizer.step()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """The same names, types and bits."""
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


def test_a_run_that_went_on_is_the_one_that_did_not_stop(tmp_path: Path) -> None:
    whole_run, first = Trained(0), Trained(0)
    whole_run.steps(2, 1)
    whole_run.steps(3, 2)
    first.steps(2, 1)
    tensors = training_tensors(first.parameters, first.optimizers)
    assert sorted(tensors)[:4] == [
        "adam/critic.bias/exp_avg",
        "adam/critic.bias/exp_avg_sq",
        "adam/critic.bias/max_exp_avg_sq",
        "adam/critic.bias/step",
    ]
    assert float(tensors["adam/policy.weight/step"]) == 2.0
    path = save_checkpoint(tmp_path, 2, tensors, {})
    second = Trained(7)
    restore_training(load_checkpoint(path)[0], second.parameters, second.optimizers)
    assert same(second.weights(), first.weights())
    assert second.optimizers[0].param_groups[0]["lr"] == 0.01, "settings are the recipe's, not the checkpoint's"
    second.steps(3, 2)
    assert same(second.weights(), whole_run.weights())


def test_before_the_first_step_there_are_no_moments(tmp_path: Path) -> None:
    fresh, other = Trained(0), Trained(7)
    path = save_checkpoint(tmp_path, 0, training_tensors(fresh.parameters, fresh.optimizers), {})
    restore_training(load_checkpoint(path)[0], other.parameters, other.optimizers)
    fresh.steps(1, 1)
    other.steps(1, 1)
    assert same(other.weights(), fresh.weights())


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    trained = Trained(0)
    tensors = training_tensors(trained.parameters, trained.optimizers)
    with pytest.raises(UserError, match=r"weight/critic\.bias"):
        restore_training(tensors, {n: p for n, p in trained.parameters.items() if n != "critic.bias"}, [])


def test_state_comes_back_bit_by_bit(tmp_path: Path) -> None:
    state = {"scale": [0.1 + 0.2, 1e-323, 2**-1074, 1 / 3], "best": {"step": 4, "reward": -0.0}, "name": "町"}
    back = load_checkpoint(save_checkpoint(tmp_path, 3, {"a": torch.ones(1)}, state))[1]
    assert back == {"step": 3, **state}
    assert str(back["best"]["reward"]) == "-0.0"


def test_best_weights_may_share_memory_with_the_present_ones(tmp_path: Path) -> None:
    trained = Trained(0)
    named = {f"weight/{name}": p for name, p in trained.parameters.items()}
    best = {f"best/{name}": p for name, p in trained.parameters.items()}
    column = {"view": trained.parameters["policy.weight"][:, 0], "number": torch.tensor(3)}
    tensors, _ = load_checkpoint(save_checkpoint(tmp_path, 1, {**named, **best, **column}, {}))
    assert torch.equal(tensors["view"], trained.parameters["policy.weight"][:, 0])
    other = Trained(7)
    restore_weights({n.removeprefix("best/"): t for n, t in tensors.items() if n.startswith("best/")}, other.parameters)
    assert same(other.weights(), trained.weights())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, step, {"a": torch.ones(1)}, {}, keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]
    save_checkpoint(tmp_path, 12, {"a": torch.ones(1)}, {}, keep=1)
    assert names(tmp_path) == ["checkpoint-12"]


def test_what_a_kept_one_needs_is_kept(tmp_path: Path) -> None:
    for step, needs in ((1, []), (2, ["checkpoint-1"]), (3, []), (4, ["checkpoint-2"]), (5, []), (6, [])):
        save_checkpoint(tmp_path, step, {"a": torch.ones(1)}, {"needs": needs}, keep=2)
        if step == 5:
            assert names(tmp_path) == [f"checkpoint-{kept}" for kept in (1, 2, 4, 5)]
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-6"]


def test_a_step_may_be_saved_again(tmp_path: Path) -> None:
    for number in (1.0, 2.0):
        path = save_checkpoint(tmp_path, 3, {"a": torch.tensor(number)}, {})
    assert float(load_checkpoint(path)[0]["a"]) == 2.0


def test_a_checkpoint_cut_off_while_being_written_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for function in ("save_file", "_sha256", "_sync"):
        with monkeypatch.context() as patch:
            patch.setattr(ppo_checkpoint, function, full_disk)
            with pytest.raises(OSError, match="No space left"):
                save_checkpoint(tmp_path, 1, {"a": torch.ones(1)}, {})
        assert list(tmp_path.glob("checkpoint-*")) == []
    save_checkpoint(tmp_path, 1, {"a": torch.ones(1)}, {})
    assert names(tmp_path) == ["checkpoint-1"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, replace = ppo_checkpoint._sync, os.replace
    monkeypatch.setattr(ppo_checkpoint, "_sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("renamed"), replace(old, new)))
    save_checkpoint(tmp_path / "checkpoints", 1, {"a": torch.ones(1)}, {})
    assert sorted(events[:3]) == ["complete", "state.json", "tensors.safetensors"]
    assert events[3:] == ["aside-1", "renamed", "checkpoints"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_flipped_bit_is_found(name: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {"a": torch.ones(4)}, {"kl": 0.5})
    content = bytearray((path / name).read_bytes())
    content[-3] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged.*delete .*checkpoint-1"):
        load_checkpoint(path)
    (path / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        load_checkpoint(path)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, rng_tensors(ALONE), {})
    assert names(path) == ["complete", "state.json", "tensors.safetensors"]
    assert json.loads((path / "state.json").read_text()) == {"step": 1}


def drawn() -> list[float]:
    """Numbers from all generators, normal ones too: those keep a second number for the next call."""
    numbers = [float(torch.randn(())), float(np.random.standard_normal()), np.random.random(), random.gauss(0, 1)]
    return [*numbers, random.random(), float(torch.rand(()))]


@pytest.mark.parametrize("after", [0, 1])
def test_random_generators_go_on(after: int, tmp_path: Path) -> None:
    """`after` 1: with a second normal number waiting in NumPy's and Python's generators."""
    for generator in (torch.manual_seed, np.random.seed, random.seed):
        generator(5)
    for _ in range(after):
        drawn()
    path = save_checkpoint(tmp_path, 1, rng_tensors(ALONE), {})
    expected = [drawn(), drawn()]
    restore_rng(load_checkpoint(path)[0], ALONE, 0)
    assert [drawn(), drawn()] == expected


def test_another_number_of_processes_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = rng_tensors(ALONE)
    expected = drawn()
    restore_rng(tensors, TWO, 1)
    assert drawn() != expected and capsys.readouterr().out == "", "rank 1 is not in it: nothing changes"
    restore_rng(tensors, TWO, 0)
    assert drawn() == expected
    assert "random states of 1 processes, and 2 run" in capsys.readouterr().out
    restore_rng(tensors, ALONE, 0)
    assert capsys.readouterr().out == ""
