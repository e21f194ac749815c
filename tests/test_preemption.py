"""Asked to end by a signal, a run saves, says so, and goes on by the same command; through launchers, 1 rank and 2."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from baton.preemption import Preempted
from tests.conftest import RECIPES, ROOT, program_environment, run_stage, weights_digests, without_clocks

# a loop like PPO's, whose steps do nothing; what it saved is a file, and its first step is over when `ready` is there
PROGRAM = """
import os, time
from pathlib import Path

from accelerate import PartialState

from baton.preemption import Preempted, Preemption
from baton.recipe import SFTRecipe
from baton.run import program, write_status


def main(recipe):
    state = PartialState(cpu=True)
    folder = Path(recipe.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    saved = folder / "saved"
    first = int(saved.read_text()) if saved.exists() else 0
    with Preemption() as preemption:
        for step in range(first, 400):
            if preemption.asked(state):
                time.sleep(0.5 * state.process_index)  # the ranks are not done with saving at the same time
                if state.is_main_process:
                    time.sleep(1)
                    saved.write_text(str(step))
                state.wait_for_everyone()
                raise Preempted(step)
            time.sleep(0.01 if first else 0.1)
            (folder / f"ready-{state.process_index}-{os.getpid()}").touch()
            if first and step == first + 5:
                break
    if state.is_main_process:
        write_status(folder, "sft", "done", "", 0, "t/sft:1")


if __name__ == "__main__":
    program(main, SFTRecipe)
"""
CHAIN = """
import sys
from pathlib import Path
from baton import build, chain, launch
launch.PROGRAMS["sft"] = "stub_sft"
chain._check_references = lambda links: None
build.up_to_date = lambda recipe: None
sys.exit(chain.run(Path("recipes"), [], chain.Options(processes=int(sys.argv[1]))))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which CHAIN runs one stage whose program is PROGRAM."""
    (tmp_path / "recipes" / "world").mkdir(parents=True)
    for name in ("dialogues", "dialogues_eval", "questions"):
        (tmp_path / "recipes" / "world" / f"{name}.jsonl").write_text("{}\n")
    text = RECIPES["sft"].format(root=tmp_path)
    (tmp_path / "recipes" / "sft.yaml").write_text(text)
    (tmp_path / "stub_sft.py").write_text(PROGRAM)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(folder), str(ROOT)])
    return program_environment("sft") | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=environment(folder),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path, pattern: str, count: int, process: subprocess.Popen[str]) -> list[Path]:
    deadline = time.monotonic() + 200
    while len(found := list(path.glob(pattern))) < count:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[0])
        time.sleep(0.02)
    return found


@pytest.mark.parametrize(("processes", "number"), [(1, "SIGTERM"), (2, "SIGINT")])
def test_a_chain_that_is_asked_to_end_saves_and_goes_on(folder: Path, processes: int, number: str) -> None:
    run_dir, command = folder / "runs" / "sft", [sys.executable, "-c", CHAIN, str(processes)]
    process = start(command, folder)
    ready = wait_for(run_dir, "ready-*", processes, process)
    process.send_signal(getattr(signal, number))
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 75, output
    assert "Traceback" not in output
    status, step = json.loads((run_dir / "status.json").read_text()), (run_dir / "saved").read_text()
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert status["message"] == f"preempted and saved at step {step}; the same command goes on from there"
    assert f"preempted   {status['message']}" in output
    assert not any(psutil.pid_exists(int(path.name.split("-")[2])) for path in ready), "a process was left behind"
    for path in ready:
        path.unlink()
    process = start(command, folder)
    output, _ = process.communicate(timeout=100)
    # it is the table of results that finds no run of ours
    assert json.loads((run_dir / "status.json").read_text())["state"] == "done", output


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_to_the_launcher_alone_reaches_its_programs(folder: Path, processes: int) -> None:
    """As schedulers and containers send it; accelerate's own launcher of one process would leave its program behind."""
    run_dir = folder / "runs" / "sft"
    command = [sys.executable, "-m", "baton.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--num_processes", str(processes)]
    command += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    process = start([*command, "-m", "stub_sft", "recipes/sft.yaml"], folder)
    wait_for(run_dir, "ready-*", processes, process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=100)
    # torch's launcher of several processes tells the signal, not what its programs returned
    assert process.returncode == (75 if processes == 1 else 128 + signal.SIGUSR1), output
    assert "Traceback" not in output
    assert json.loads((run_dir / "status.json").read_text())["state"] == "preempted"


def test_one_rank_that_is_asked_takes_the_others_along(folder: Path) -> None:
    run_dir, command = folder / "runs" / "sft", [sys.executable, "-c", CHAIN, "2"]
    process = start(command, folder)
    ready = {path.name.split("-")[1]: path for path in wait_for(run_dir, "ready-*", 2, process)}
    os.kill(int(ready["1"].name.split("-")[2]), signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 75, output
    assert json.loads((run_dir / "status.json").read_text())["state"] == "preempted"
    assert (run_dir / "saved").exists()


def test_ppo_is_preempted_and_ends_bit_by_bit_the_same(tiny_chain: Any, tmp_path: Path) -> None:
    chain, run_dir = tiny_chain.unpublished("ppo", tmp_path), tmp_path / "runs" / "ppo"
    command, env = chain.launched("ppo"), program_environment("ppo")
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(run_dir, "metrics.jsonl", 1, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    status = json.loads((run_dir / "status.json").read_text())
    assert (process.returncode, status["state"]) == (75, "preempted"), output
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continuing from" in done.stdout
    version = chain.registry.resolve(chain.versions["ppo"].ref)
    assert weights_digests(version) == weights_digests(tiny_chain.versions["ppo"])


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward"])
def test_the_trainers_stages_are_preempted_and_end_bit_by_bit_the_same(
    tiny_chain: Any, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, whose main thread gets the signal in the middle of step 1; the program's end is tested above."""
    from baton.training import Recorder

    chain = tiny_chain.unpublished(stage, tmp_path)
    ended = Recorder.on_step_end

    def signalled(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ended(self, args, state, control, **kwargs)
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_step_end", signalled)
        with pytest.raises(Preempted, match="preempted and saved at step 2"):
            run_stage(stage, chain.recipe(stage))
    assert chain.versions[stage].name not in chain.registry.models()
    version = run_stage(stage, chain.recipe(stage))
    assert weights_digests(version) == weights_digests(tiny_chain.versions[stage])
    assert list(map(without_clocks, chain.metrics(stage))) == list(map(without_clocks, tiny_chain.metrics(stage)))
