"""Does anything grow with the corpus? Prepares and trains on generated text of several sizes.

    python tests/bench/scale.py [--sizes MB,MB] [--steps N] [--workers N] [--json]

For each size: peak memory of preparing (all processes together) and of training (a 2M model, weights and moments
included), the median seconds of a step, and the share of them that went into loading its batch from the shards.
`step_ratio` is the largest corpus' step over the smallest's; `memory_ratio` the same of training's peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# the script's own folder, which comes first, is no place to import from
sys.path[0] = str(ROOT)

WARM_UP = 3
"""Steps before the clock counts: first uses of memory, indexes of rows."""

TRAIN = """
import json, sys, time
from statistics import median
from baton.causal_trainer import CausalTrainer
from baton.recipe import load_recipe
from stages.pretrain import main

begun, loading = [], []
plain = CausalTrainer.get_batch_samples

def clocked(trainer, *arguments):
    begun.append(time.perf_counter())
    found = plain(trainer, *arguments)
    loading.append(time.perf_counter() - begun[-1])
    return found

CausalTrainer.get_batch_samples = clocked
main(load_recipe(sys.argv[1]))
warm = int(sys.argv[2])
steps = [after - before for before, after in zip(begun[warm:], begun[warm + 1:])]
print(json.dumps({"step_s": median(steps), "loading_share": sum(loading[warm:-1]) / sum(steps)}))
"""


def write_training(folder: Path, prepared: Path, steps: int) -> Path:
    """The same corpus' recipe, with a 2M model to train for `steps` steps."""
    recipe = json.loads(prepared.read_text())
    recipe["data"]["prepared"] = str(folder / "corpus")
    recipe |= {"model": {"size": "2M"}, "tokenizer": {"vocab_size": 2048, "sample_bytes": 4_000_000}}
    recipe["train"] = {
        "steps": steps + WARM_UP,
        "learning_rate": 1e-3,
        "tokens_per_batch": 8192,
        "tokens_per_micro_batch": 4096,
        "sequence_length": 512,
        "compile": False,
    }
    path = folder / "training.yaml"
    path.write_text(json.dumps(recipe))
    return path


def measure(megabytes: int, steps: int, workers: int) -> dict[str, Any]:
    """Write, prepare and train on so much text, in a folder of its own."""
    from baton.corpus.tokenizer import recipe_tokenizer
    from baton.launch import stage_environment
    from baton.recipe import load_recipe
    from tests.bench.prepare import OURS, run, write_recipe, write_text

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["BATON_CACHE"] = str(folder / "cache")
        write_text(folder / "text.jsonl", megabytes)
        recipe = write_training(folder, write_recipe(folder, [{"path": str(folder / "text.jsonl")}]), steps)
        tokenizer = str(recipe_tokenizer(load_recipe(recipe), say=lambda text: None))
        prepared = run(OURS, str(recipe), tokenizer, str(folder / "corpus"), str(workers))
        trained = run(TRAIN, str(recipe), str(WARM_UP), environment=stage_environment("pretrain"))
    return {
        "tokens": prepared["tokens"],
        "prepare_s": round(prepared["seconds"], 1),
        "prepare_peak_mb": prepared["peak_mb"],
        "train_peak_mb": trained["peak_mb"],
        "step_s": round(trained["step_s"], 4),
        "loading_share": round(trained["loading_share"], 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10,1000", help="megabytes of generated text")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sizes = sorted(int(size) for size in options.sizes.split(","))
    found: dict[str, Any] = {}
    for size in sizes:
        found[f"{size} MB"] = measure(size, options.steps, options.workers)
        print(f"{size} MB: {found[f'{size} MB']}", file=sys.stderr, flush=True)
    small, large = (found[f"{size} MB"] for size in (sizes[0], sizes[-1]))
    found["step_ratio"] = round(large["step_s"] / small["step_s"], 3)
    found["memory_ratio"] = round(large["train_peak_mb"] / small["train_peak_mb"], 3)
    found["loading_share"] = max(small["loading_share"], large["loading_share"])
    print(json.dumps(found) if options.json else json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
