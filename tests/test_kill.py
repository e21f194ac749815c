"""kill -9 in the middle of each program, then the same command again: it goes on from its last whole checkpoint."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import program_environment, run_stage

# enough steps that the first checkpoint is far from the end
LENGTHS = {
    "pretrain": ("train.steps=60", "train.save_every=3"),
    "sft": ("train.steps=60", "train.save_every=3"),
    "reward": ("train.steps=40", "train.save_every=3"),
    "ppo": ("train.steps=6", "train.save_every=1"),
}


def kill_after_first_checkpoint(command: list[str], environment: dict[str, str], run_dir: Path) -> None:
    """Start the program and its launcher; end both by SIGKILL as soon as one checkpoint is whole."""
    with open(run_dir.parent / "killed.txt", "w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + 600
        while not list(run_dir.glob("checkpoints/checkpoint-*/complete")):
            assert process.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(0.005)
        assert process.poll() is None, "it ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def leave_debris(run_dir: Path, registry: Path) -> None:
    """What a kill at a worse moment leaves: a checkpoint and a line half written, a version half published."""
    checkpoint = next(run_dir.glob("checkpoints/checkpoint-*/complete")).parent
    for name in ("checkpoint-9999", "aside-9999"):
        shutil.copytree(checkpoint, run_dir / "checkpoints" / name, dirs_exist_ok=True)
        (run_dir / "checkpoints" / name / "complete").unlink(missing_ok=True)
        for path in (run_dir / "checkpoints" / name).rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9998, "lo')
    for kind in ("base", "adapter", "reward", "value"):
        (run_dir / f"publish-{kind}").mkdir(exist_ok=True)
        (run_dir / f"publish-{kind}" / "model.safetensors").write_bytes(b"half")
    (registry / "tmp" / "half").mkdir(parents=True)
    (registry / "tmp" / "half" / "adapter_model.safetensors").write_bytes(b"half")


@pytest.mark.parametrize("stage", LENGTHS)
def test_a_killed_program_goes_on_and_publishes(tiny_chain: Any, tmp_path: Path, stage: str) -> None:
    chain, run_dir = tiny_chain.unpublished(stage, tmp_path), tmp_path / "runs" / stage
    run_dir.parent.mkdir()
    name = chain.versions[stage].name
    command, environment = chain.launched(stage, *LENGTHS[stage]), program_environment(stage)
    kill_after_first_checkpoint(command, environment, run_dir)
    assert name not in chain.registry.models()
    assert json.loads((run_dir / "status.json").read_text())["state"] == "running"
    whole = {path.parent.name for path in run_dir.glob("checkpoints/*/complete")}
    leave_debris(run_dir, tmp_path / "registry")

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"continuing from (\S+)", done.stdout)
    assert found and Path(found[1]).name in whole, done.stdout
    assert "9999" not in done.stdout + done.stderr
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["version"]) == ("done", f"{name}:1")
    assert chain.registry.verify(chain.registry.resolve(f"{name}:1"), deep=True) == []
    steps = int(LENGTHS[stage][0].partition("=")[2])
    # each step once, and the last line with what was measured at the end
    assert [row["step"] for row in chain.metrics(stage) if "alarm" not in row] == [*range(1, steps + 1), steps]

    again = run_stage(stage, chain.recipe(stage, *LENGTHS[stage]))
    assert again.ref == f"{name}:1" and chain.registry.numbers(name) == [1]
    assert json.loads((run_dir / "status.json").read_text())["state"] == "up to date"
