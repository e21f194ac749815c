"""One process or two: the same losses from the same global batch; and never another number than was asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from baton.errors import UserError
from tests.conftest import program_environment, run_stage

BOUNDS = {"ppo": {"rel": 1e-4, "abs": 3e-6}}
"""Of float32, where not 1e-3."""
STAGES = ("pretrain", "sft", "reward", "ppo")
NORMS = {"grad_norm/policy", "grad_norm/value"}
COMPARED = {
    "pretrain": {"loss", "grad_norm", "eval/loss", "eval/bits_per_byte"},
    "sft": {"loss", "grad_norm", "eval/loss_before", "eval/loss"},
    "reward": {"loss", "grad_norm", "eval/loss", "eval/accuracy", "eval/margin"},
    "ppo": {"reward", "kl_nats", "length", "eos_rate", "loss/policy", "loss/value", "eval/reward"} | NORMS,
}


def started(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def status(chain: Any, stage: str) -> dict[str, Any]:
    return json.loads((chain.run_dir(stage) / "status.json").read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one(tiny_chain: Any, tmp_path: Path, stage: str) -> None:
    """PPO too: its replies are a function of seed and episode, so that both runs sample the same ones."""
    chain = tiny_chain.unpublished(stage, tmp_path)
    environment = program_environment(stage, 2) | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # processes=2: the program itself refuses to run as anything else
    done = started(chain.launched(stage, "processes=2", processes=2), environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert status(chain, stage)["state"] == "done"
    two, one = chain.metrics(stage), tiny_chain.metrics(stage)
    assert [row["step"] for row in two] == [row["step"] for row in one]
    seen = set()
    for ours, theirs in zip(two, one, strict=True):
        for key in COMPARED[stage] & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], **BOUNDS.get(stage, {"abs": 1e-3})), (key, theirs["step"])
            seen.add(key)
    assert seen == COMPARED[stage]
    version = chain.registry.resolve(chain.versions[stage].ref)
    assert version.manifest["recipe"]["processes"] == 2
    assert version.manifest["parents"] == tiny_chain.versions[stage].manifest["parents"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_program_alone_refuses_to_be_one_of_two(tiny_chain: Any, tmp_path: Path, stage: str) -> None:
    chain = tiny_chain.unpublished(stage, tmp_path)
    with pytest.raises(UserError, match="the recipe's processes asks for 2 processes, but 1 runs as one group"):
        run_stage(stage, chain.recipe(stage, "processes=2"))
    assert chain.versions[stage].name not in chain.registry.models()


ACCELERATE = [str(Path(sys.executable).with_name("accelerate")), "launch"]
ONE_FOR_TWO = ["--cpu", "--num_machines", "1", "--num_processes", "2", "--mixed_precision", "no"]
ONE_FOR_TWO += ["--dynamo_backend", "no"]


@pytest.mark.parametrize(
    ("launcher", "overrides", "code", "asked"),
    [
        # accelerate itself exits with 1 whatever the program returned; the status file tells
        ([*ACCELERATE, *ONE_FOR_TWO], [], 1, "accelerate launch --num_processes"),
        ([sys.executable, "-m", "baton.launch", *ONE_FOR_TWO], [], 2, "accelerate launch --num_processes"),
        ([sys.executable], ["processes=2"], 2, "the recipe's processes"),
    ],
)
def test_a_launcher_that_starts_one_for_two_is_refused(
    tiny_chain: Any, tmp_path: Path, launcher: list[str], overrides: list[str], code: int, asked: str
) -> None:
    """On CPUs `accelerate launch --cpu --num_processes 2` starts one process, says nothing and exits with 0."""
    chain = tiny_chain.unpublished("sft", tmp_path)
    command = [*launcher, "-m", "stages.sft", str(tmp_path / "sft.yaml"), *overrides]
    environment = program_environment("sft") | {"CUDA_VISIBLE_DEVICES": ""}
    done = started(command, {key: item for key, item in environment.items() if key != "ACCELERATE_USE_CPU"})
    assert done.returncode == code, done.stdout + done.stderr
    assert f"error: {asked} asks for 2 processes, but 1 runs as one group" in done.stderr
    told = status(chain, "sft")
    assert (told["state"], told["exit_code"]) == ("refused", 2)
    assert "tiny/sft" not in chain.registry.models()
    assert os.listdir(chain.run_dir("sft")) == ["status.json"]
