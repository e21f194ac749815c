"""Two processes, dropout on: interrupted equals uninterrupted bit by bit; they agree on what is skipped, when to end.

Everything runs in one group of two, as starting it takes longer than the trainings.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import program_environment, weights_digests, without_clocks

# A dropout where the architecture has one; reward models are trained without. Micro-batches of one row: accumulation.
# The checkpoint of step 2 is in the middle of the only line of metrics.
QUICK = ["train.steps=3", "train.save_every=2", "train.log_every=3", "train.keep=9", "processes=2"]
QUESTIONS = "data.questions=[]"
STAGES = {
    "pretrain": ["train.tokens_per_micro_batch=64", "ngram_order=null", QUESTIONS],
    "sft": ["lora.dropout=0.2", "train.tokens_per_micro_batch=128", QUESTIONS],
    "reward": [
        "train.tokens_per_micro_batch=100",
        "train.eval_every=1",
        "measure.sft_samples=0",
        "measure.perturbed=0",
    ],
}
PROGRAM = """
import json, os, shutil, signal, sys
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import TrainerCallback

from baton import checkpoints
from baton.errors import UserError
from baton.preemption import Preempted
from baton.recipe import load_recipe
from baton.training import train_guarded
from tests.baton.guarded_run import ROWS, make_run, make_trainer
from tests.conftest import run_stage

root, stages = Path(sys.argv[1]), json.loads(sys.argv[2])
state = PartialState(cpu=True)
rank = state.process_index


def copied(checkpoint, ours, theirs):
    if rank == 0:
        shutil.copytree(ours / "checkpoints" / checkpoint, theirs / "checkpoints" / checkpoint)
        for name in ("build.json", "metrics.jsonl"):
            if (ours / name).exists():
                shutil.copy(ours / name, theirs / name)
    state.wait_for_everyone()


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def train(run, broken=None, act=None):
    def make(skipped):
        trainer = make_trainer(run, skipped, broken, rows_at_once=1)
        if act is not None:
            trainer.add_callback(act)
        return trainer
    return train_guarded(run, make)


class Signalled(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if rank == 1 and state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)


def tiny():
    told = {}
    nan = float("nan")
    whole = train(make_run(root / "whole", keep=9), {5: nan})
    told["skipped"] = whole.summary()["skipped_steps"]
    again = make_run(root / "again", keep=9)
    copied("checkpoint-9", root / "whole", root / "again")
    resumed = train(again, {5: nan})
    told["resumed"] = same(whole.trained_tensors(), resumed.trained_tensors())
    # a row of its own for each rank: other masks, or one rank's work would be the other's again
    told["rows"] = [len(rows) for rows in whole.seen[:2]]

    signalled = make_run(root / "signalled")
    try:
        train(signalled, {5: nan}, Signalled())
    except Preempted as error:
        told["preempted"] = error.step
    told["after"] = same(train(signalled, {5: nan}).trained_tensors(), whole.trained_tensors())

    guard = {"window": 8, "spike_sigmas": 30, "spike_steps": 1}
    spike = make_run(root / "spike", steps=20, save_every=4, guard=guard)
    told["spike"] = train(spike, {14: 1000.0}).skipped

    def full(path, content):
        raise OSError("No space left on device")
    if rank == 0:
        checkpoints._write = full
    try:
        train(make_run(root / "full", steps=200))
    except UserError as error:
        told["full"] = str(error)
    (root / f"told-{rank}.json").write_text(json.dumps(told))


for stage, overrides in stages.items():
    for folder in ("one", "two"):
        run_stage(stage, load_recipe(root / stage / folder / f"{stage}.yaml", overrides))
        if folder == "one":
            runs = [root / stage / name / "runs" / stage for name in ("one", "two")]
            runs[1].mkdir(parents=True, exist_ok=True)
            copied("checkpoint-2", *runs)
tiny()
state.wait_for_everyone()
os._exit(0)
"""


@pytest.fixture(scope="module")
def ran(tiny_chain: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """The folder in which two processes ran everything, and of each stage the two chains."""
    root = tmp_path_factory.mktemp("two")
    chains = {}
    for stage in STAGES:
        for name in ("one", "two"):
            (root / stage / name).mkdir(parents=True)
            chains.setdefault(stage, []).append(tiny_chain.unpublished(stage, root / stage / name))
    (root / "resume_body.py").write_text(PROGRAM)
    # processes that a stage starts import this one, which must then do nothing
    (root / "resume_program.py").write_text('if __name__ == "__main__":\n    import resume_body\n')
    given = {stage: overrides + QUICK for stage, overrides in STAGES.items()}
    command = [sys.executable, "-m", "baton.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(root / "resume_program.py"), str(root), json.dumps(given)]
    environment = program_environment("sft", 2) | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return root, chains


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_go_on_bit_by_bit(ran: tuple[Path, dict[str, list[Any]]], stage: str) -> None:
    one, two = ran[1][stage]
    first, second = (chain.registry.resolve(chain.versions[stage].ref) for chain in (one, two))
    assert weights_digests(first) == weights_digests(second)
    assert [without_clocks(row) for row in one.metrics(stage)] == [without_clocks(row) for row in two.metrics(stage)]


def test_two_processes_agree(ran: tuple[Path, dict[str, list[Any]]]) -> None:
    """On a step without a number, a signal to one of them, a spike and a checkpoint that one of them cannot write."""
    told = [json.loads((ran[0] / f"told-{rank}.json").read_text()) for rank in (0, 1)]
    fulls = [item.pop("full") for item in told]
    assert told[0] == told[1]
    assert told[0] == {
        "skipped": 1,
        "resumed": True,
        "rows": [1, 1],
        "preempted": 5,
        "after": True,
        "spike": [12, 13, 14],
    }
    assert "No space left on device" in fulls[0] and "the main process could not write a checkpoint" in fulls[1]
