"""PPO's program on two processes with sharded weights: every step's figures, and all weights, are those of one process.

Replicated weights (DDP): tests/test_processes.py. The configurations are those that recipes/README.md shows.
"""

import math
import os
import signal
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from baton.launch import stage_command
from tests.conftest import ROOT, program_environment, run_stage, without_clocks

FSDP2 = """compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: 2
mixed_precision: "no"
main_process_port: 0
fsdp_config:
  fsdp_version: 2
  fsdp_reshard_after_forward: true
  fsdp_offload_params: false
  fsdp_state_dict_type: FULL_STATE_DICT
"""
ZERO3 = """compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
num_machines: 1
num_processes: 2
mixed_precision: "no"
main_process_port: 0
deepspeed_config:
  zero_stage: 3
  offload_optimizer_device: none
  offload_param_device: none
  gradient_accumulation_steps: 1
  zero3_init_flag: false
"""
ZERO2 = ZERO3.replace("zero_stage: 3", "zero_stage: 2")

# long enough that some replies end early, so that ranks decode different numbers of tokens; gradients are clipped
COMMON = ["rollout.max_new_tokens=32", "train.eval_every=2", "train.max_grad_norm=0.05"]
CASTS = {
    "adapter": [*COMMON, "train.learning_rate=1e-2"],
    "full": [*COMMON, "train.learning_rate=1e-3", "policy=full", "ppo.critic=separate"],
}
RELATIVE, ABSOLUTE = 1e-4, 3e-6
"""float32. Measured over four steps: 6e-8 in the losses, 2e-6 in the KL (nats a reply), 2e-7 in weights."""

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def alone(tiny_chain: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The chain whose PPO one process ran, by cast."""
    made: dict[str, Any] = {}

    def run(cast: str) -> Any:
        if cast not in made:
            made[cast] = tiny_chain.unpublished("ppo", tmp_path_factory.mktemp(cast))
            run_stage("ppo", made[cast].recipe("ppo", *CASTS[cast]))
        return made[cast]

    return run


def on_two(chain: Any, configuration: str, overrides: list[str]) -> subprocess.CompletedProcess[str]:
    """The program, launched by `configuration`; ranks that wait for each other would wait for hours."""
    path = chain.root / "accelerate.yaml"
    path.write_text(configuration)
    command = stage_command("ppo", chain.root / "ppo.yaml", overrides, 2, path)
    command.insert(command.index("stages.ppo"), "tests.sharding_shim")
    environment = program_environment("ppo", 2) | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("the ranks hang:\n" + "".join(part[-3000:] for part in process.communicate()))
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


EPISODES, EPOCHS = 8, 2
"""Of a step, by the tiny chain's recipe."""


def assert_same_figures(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    steps = [row["step"] for row in ours]
    # the last row repeats the step that is published, unless that is the last
    assert steps == [row["step"] for row in theirs] and steps[:6] == [1, 2, 2, 3, 4, 4]
    for mine, other in zip(map(without_clocks, ours), map(without_clocks, theirs), strict=True):
        if "grad_norm" in mine:  # DeepSpeed knows only the norm of all; at least that of the two means (Minkowski)
            norms = other.pop("grad_norm/policy"), other.pop("grad_norm/value")
            assert math.hypot(*norms) * (1 - RELATIVE) <= mine.pop("grad_norm") <= sum(norms) * (1 + RELATIVE)
        assert mine.keys() == other.keys()
        for key, value in other.items():
            # of so few tokens one may lie on the other side of a threshold by rounding
            absolute = 1.01 / (EPISODES * EPOCHS * other["length"]) if key.startswith("clip_fraction/") else ABSOLUTE
            assert mine[key] == pytest.approx(value, rel=RELATIVE, abs=absolute), (key, other["step"])


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=RELATIVE, atol=ABSOLUTE, msg=lambda text, n=name: n + text)


def assert_same_published(ours: Any, theirs: Any) -> None:
    for name in ("tiny/policy", "tiny/value"):
        mine, other = (
            chain.registry.materialise(chain.registry.resolve(f"{name}:candidate")) for chain in (ours, theirs)
        )
        files = sorted(path.name for path in other.glob("*.safetensors"))
        assert files == sorted(path.name for path in mine.glob("*.safetensors")) and files
        for file in files:
            assert_same_tensors(load_file(mine / file), load_file(other / file))


def checkpoint(chain: Any) -> dict[str, torch.Tensor]:
    """Weights, moments, and the snapshots before the last update and at the best step; after the last step."""
    tensors = load_file(chain.run_dir("ppo") / "checkpoints" / "checkpoint-4" / "tensors.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("rng/")}


@pytest.mark.parametrize("cast", CASTS)
def test_fsdp2_on_two_processes_is_one_process(
    tiny_chain: Any, tmp_path: Path, alone: Callable[[str], Any], cast: str
) -> None:
    two, one = tiny_chain.unpublished("ppo", tmp_path / "two"), alone(cast)
    done = on_two(two, FSDP2, CASTS[cast])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "weights sharded over 2 processes by FSDP2" in done.stdout
    assert_same_figures(two.metrics("ppo"), one.metrics("ppo"))
    assert any(0 < row["eos_rate"] < 1 for row in one.metrics("ppo") if "eos_rate" in row)
    assert_same_tensors(checkpoint(two), checkpoint(one))
    assert_same_published(two, one)

    # what two processes saved continues on one
    continued = two.interrupted("ppo", 2, tmp_path / "continued")
    run_stage("ppo", continued.recipe("ppo", *CASTS[cast]))
    assert_same_figures(continued.metrics("ppo"), one.metrics("ppo"))
    assert_same_tensors(checkpoint(continued), checkpoint(one))


@needs_deepspeed
@pytest.mark.parametrize(
    ("configuration", "cast"), [(ZERO2, "adapter"), (ZERO3, "adapter"), (ZERO3, "full")], ids=["2", "3", "3-full"]
)
def test_deepspeed_on_two_processes_is_one_process(
    tiny_chain: Any, tmp_path: Path, alone: Callable[[str], Any], configuration: str, cast: str
) -> None:
    two, one = tiny_chain.unpublished("ppo", tmp_path), alone(cast)
    done = on_two(two, configuration, CASTS[cast])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "DeepSpeed ZeRO-" in done.stdout and "no checkpoints under DeepSpeed" in done.stdout
    assert_same_figures(two.metrics("ppo"), one.metrics("ppo"))
    assert_same_published(two, one)
    assert not two.run_dir("ppo").joinpath("checkpoints").exists()


def test_the_readme_shows_these_configurations() -> None:
    readme = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    for configuration in (FSDP2, ZERO3):
        assert configuration.replace("num_processes: 2", "num_processes: 8") in readme
