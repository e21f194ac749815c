"""PPO killed at random moments (`kill -9`) and continued by the same command: are the published weights the same?

    python -m tests.bench.kills recipes/micro train.steps=12 train.save_every=1 --kills 20 --json

The folder's ppo.yaml is run once uninterrupted, then again and again with kills, each time from a copy of the registry
that holds its inputs and not yet its outputs; what is compared is the sha256 of every published safetensors file.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from baton.launch import stage_command, stage_environment
from baton.recipe import PPORecipe, load_recipe
from baton.registry import Registry


@dataclass
class Kill:
    """One kill: when, in seconds after the start of the process, and what the run had reached."""

    after_s: float
    step: int  # the last one in metrics.jsonl; 0: none yet
    checkpoint: int  # the newest whole one; 0: none yet
    half_written: bool  # a checkpoint was being written


@dataclass
class Outcome:
    """One run from its beginning to its end, through its kills."""

    kills: list[Kill] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    identical: bool = False


class Bench:
    """The recipe, its overrides, and a working folder with one subfolder a run."""

    def __init__(self, recipe_path: Path, overrides: list[str], processes: int, work: Path) -> None:
        self.path, self.overrides, self.processes, self.work = recipe_path, overrides, processes, work
        self.recipe = load_recipe(recipe_path, overrides, PPORecipe)
        published = [self.recipe.publish, self.recipe.publish_value]
        self.names = [publish.name for publish in published if publish]

    def prepare(self, name: str) -> Path:
        """A fresh folder for one run, with a registry in which PPO has published nothing."""
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.recipe.registry, folder / "registry")
        for model in self.names:
            shutil.rmtree(folder / "registry" / "models" / model, ignore_errors=True)
        return folder

    def start(self, folder: Path) -> subprocess.Popen[bytes]:
        """The stage's launcher, in a process group of its own; what it prints goes to `folder`/log.txt."""
        places = [f"registry={folder / 'registry'}", f"run_dir={folder / 'run'}"]
        command = stage_command("ppo", self.path, [*self.overrides, *places], self.processes)
        with (folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                command,
                env=stage_environment("ppo", self.processes),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def digests(self, folder: Path) -> dict[str, str]:
        """model/file -> sha256 of what the run in `folder` published."""
        registry = Registry(folder / "registry")
        found = {}
        for name in self.names:
            assert registry.numbers(name) == [1], f"{name} was published {len(registry.numbers(name))} times"
            for entry in registry.resolve(f"{name}:1").manifest["files"]:
                if entry["path"].endswith(".safetensors"):
                    found[f"{name}/{entry['path']}"] = entry["sha256"]
        return found

    def uninterrupted(self) -> tuple[dict[str, str], float, float]:
        """(digests, seconds, seconds until the first step was logged) of a run that nobody kills."""
        folder, began = self.prepare("uninterrupted"), time.monotonic()
        process = self.start(folder)
        while process.poll() is None and not (folder / "run" / "metrics.jsonl").is_file():
            time.sleep(0.02)
        first_step_s = time.monotonic() - began
        self._finish(process, folder)
        return self.digests(folder), time.monotonic() - began, first_step_s

    def killed(self, name: str, most: int, window_s: tuple[float, float], randomness: random.Random) -> Outcome:
        """A run killed at uniform moments of `window_s` until it ends before its kill, at most `most` times."""
        folder, outcome = self.prepare(name), Outcome()
        while len(outcome.kills) < most:
            process, moment = self.start(folder), randomness.uniform(*window_s)
            began = time.monotonic()
            with suppress(subprocess.TimeoutExpired):
                process.wait(moment)
                break
            # frozen first, all of them: so what is recorded is what the kill found, and nobody sees another one die
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for member in family:
                    with suppress(psutil.NoSuchProcess):
                        member.send_signal(number)
                if number == signal.SIGSTOP:
                    outcome.kills.append(reached(folder / "run", time.monotonic() - began))
            process.wait()
            while not all(is_dead(member) for member in family[1:]):
                time.sleep(0.01)
        else:
            process = self.start(folder)
        self._finish(process, folder)
        outcome.digests = self.digests(folder)
        return outcome

    def _finish(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        if process.wait() != 0:
            log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
            raise SystemExit(f"the run in {folder} failed with exit code {process.returncode}:\n{log[-4000:]}")


def is_dead(process: psutil.Process) -> bool:
    """Whether it is gone, or a zombie that nobody has collected: containers often have no init that would."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def reached(run_dir: Path, after_s: float) -> Kill:
    """How far the run in `run_dir` is."""
    step, metrics = 0, run_dir / "metrics.jsonl"
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []:
        with suppress(ValueError):  # the line that was being written
            step = json.loads(line)["step"]
    whole = [int(path.parent.name.split("-")[1]) for path in run_dir.glob("checkpoints/checkpoint-*/complete")]
    half = any(run_dir.glob("checkpoints/aside-*"))
    return Kill(round(after_s, 2), step, max(whole, default=0), half)


def measure(bench: Bench, kills: int, seed: int, *, training_only: bool) -> dict[str, Any]:
    """The uninterrupted run, then killed ones until there were `kills` kills."""
    randomness = random.Random(seed)
    expected, usual_s, first_step_s = bench.uninterrupted()
    window_s = (first_step_s if training_only else 0.0, usual_s)
    outcomes: list[Outcome] = []
    left = kills
    while left > 0:
        outcome = bench.killed(f"killed-{len(outcomes) + 1}", left, window_s, randomness)
        outcome.identical = outcome.digests == expected
        outcomes.append(outcome)
        left -= len(outcome.kills)
        print(
            f"run {len(outcomes)}: {len(outcome.kills)} kills, {'identical' if outcome.identical else 'DIFFERENT'}; "
            f"{left} kills to go",
            file=sys.stderr,
            flush=True,
        )
    return {
        "recipe": str(bench.path),
        "overrides": bench.overrides,
        "processes": bench.processes,
        "seed": seed,
        "uninterrupted_s": round(usual_s, 1),
        "first_step_s": round(first_step_s, 1),
        "training_only": training_only,
        "kills": sum(len(outcome.kills) for outcome in outcomes),
        "kills_before_the_first_checkpoint": sum(not kill.checkpoint for o in outcomes for kill in o.kills),
        "runs": len(outcomes),
        "identical": all(outcome.identical for outcome in outcomes),
        "expected": expected,
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }


def main() -> None:
    """Parse the command line, measure, print; exit code 1 when a run ended differently."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds ppo.yaml; its inputs are in the registry already")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of ppo.yaml, for example train.steps=12")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="decides the moments of the kills")
    parser.add_argument("--training-only", action="store_true", help="no kills while the program still starts")
    parser.add_argument("--work", type=Path, help="kept afterwards; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        bench = Bench(options.folder / "ppo.yaml", options.overrides, options.processes, work)
        found = measure(bench, options.kills, options.seed, training_only=options.training_only)
    if options.json:
        print(json.dumps(found))
    else:
        print(
            f"{found['kills']} kills in {found['runs']} runs ({found['kills_before_the_first_checkpoint']} before the "
            f"first checkpoint), {found['processes']} processes: "
            + ("all bit-identical" if found["identical"] else "NOT identical")
        )
    sys.exit(0 if found["identical"] else 1)


if __name__ == "__main__":
    main()
