"""Pretraining tokens a second: ours against a plain transformers.Trainer script, and against the machine's products.

    python tests/bench/pretrain.py [--json] [--sides ours,plain,plain_bf16] [--rounds 3] [--size 14M|50M]

The same model, rows, batches, schedule and steps on every side; each run is a process of its own, and the sides take
turns. The plain script is what the documentation of transformers shows: a model, TrainingArguments with their defaults
(float32; `plain_bf16` adds bf16=True), rows of full length without document borders. Loss is that of the last steps.
`speedup` is ours over plain, `speedup_bf16` over plain_bf16. Two floors of our step, on the 50M model with --floor:
`products_share` is the time of the model's own matrix products by themselves, forward and backward, at their own
shapes, over the step's; `floor_share` is the model's arithmetic (PaLM, appendix B) over the best rate of any product,
which on a CPU is one of matrices that stay in the cache. Losses must agree within LOSS_TOLERANCE nats.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

if sys.path[0] == str(Path(__file__).parent):  # the script's own folder is no place to import from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

LENGTH = 256
ROWS = 32
VOCABULARY = 8192
SHAPES = {"14M": (384, 6, 6, 1024), "50M": (640, 9, 10, 1728)}
WARM_UP = 2
"""Steps before the clock starts: compiling, and first uses of memory."""
LOSS_TOLERANCE = 0.05
SHARES = ("products_share", "floor_share")


def make_model(size: str) -> Any:
    """A Llama of random weights, the same on every side."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, heads, intermediate = SHAPES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_rows(steps: int) -> list[dict[str, list[int]]]:
    """Rows with something to learn: each token follows from the one before it, three times out of four."""
    import numpy as np

    generator = np.random.default_rng(0)
    follows = generator.permutation(VOCABULARY)
    rows = []
    for _ in range(steps * ROWS):
        ids = generator.integers(0, VOCABULARY, LENGTH)
        is_told = generator.random(LENGTH) < 0.75
        for at in range(1, LENGTH):
            if is_told[at]:
                ids[at] = follows[ids[at - 1]]
        rows.append(ids.tolist())
    return [{"input_ids": ids, "labels": [-100, *ids[1:]], "position_ids": list(range(LENGTH))} for ids in rows]


def clock_callback(times: list[float], losses: list[float]) -> Any:
    """Notes when each step ended, and each step's loss."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in (logs or {}):
                losses.append(float(logs["loss"]))

    return Clock()


def run_plain(size: str, steps: int, folder: Path, is_bf16: bool) -> Any:
    """The plain script."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    times: list[float] = []
    losses: list[float] = []
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=is_bf16,
        train_sampling_strategy="sequential",  # the same batches; costs and gains nothing
    )
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in make_rows(steps)]
    data = Dataset.from_list(rows)
    trainer = Trainer(
        model=make_model(size), args=arguments, train_dataset=data, callbacks=[clock_callback(times, losses)]
    )
    trainer.train()
    return times, losses


def run_ours(size: str, steps: int, folder: Path, options: dict[str, Any]) -> Any:
    """Stage 1's trainer, with everything that it has switched on by default."""
    from baton.causal_trainer import CausalTrainer
    from baton.recipe import PretrainRecipe
    from baton.run import Run

    times: list[float] = []
    losses: list[float] = []
    (folder / "text.txt").write_text("A recipe names its text; the rows are made here.")
    recipe = PretrainRecipe.model_validate(
        {
            "stage": "pretrain",
            "mode": "scratch",
            "registry": str(folder / "registry"),
            "run_dir": str(folder / "run"),
            "publish": {"name": "bench/base"},
            "data": {"train": [{"path": str(folder / "text.txt")}]},
            "tokenizer": {"vocab_size": VOCABULARY},
            "model": {"size": "10M"},
            "train": {
                "steps": steps,
                "sequence_length": LENGTH,
                "tokens_per_batch": LENGTH * ROWS,
                "learning_rate": 1e-3,
                "schedule": "linear",
                "log_every": 1,
                "save_every": 10**6,
                **options,
            },
        }
    )
    run = Run.start(recipe)
    assert recipe.train
    trainer = CausalTrainer(run, make_model(size), recipe.train, make_rows(steps))
    trainer.add_callback(clock_callback(times, losses))
    trainer.train_from(None)
    return times, losses


def one_side(side: str, size: str, steps: int, micro_batch: int | None) -> dict[str, float]:
    """Train in this process; tokens a second after the warm-up, and the last losses' mean."""
    import torch

    from baton.throughput import flops_per_token, matrix_rate

    with tempfile.TemporaryDirectory() as folder:
        if side.startswith("plain"):
            times, losses = run_plain(size, steps, Path(folder), side == "plain_bf16")
        else:
            options = {"compile": side == "ours", "tokens_per_micro_batch": micro_batch}
            times, losses = run_ours(size, steps, Path(folder), options)
    seconds = statistics.median(after - before for before, after in pairwise(times[WARM_UP:]))
    rate = LENGTH * ROWS / seconds
    found = {"tokens_per_s": rate, "loss": statistics.mean(losses[-3:])}
    per_token = flops_per_token(make_model(size), LENGTH)
    found["floor_share"] = rate * per_token / matrix_rate(torch.device("cpu"), torch.bfloat16)
    found["products_share"] = product_seconds(size) / seconds
    return found


def product_seconds(size: str) -> float:
    """Seconds of one step's matrix products in bfloat16: each layer's three, at the shapes of a whole batch."""
    import torch

    width, layers, _, intermediate = SHAPES[size]
    tokens = LENGTH * ROWS
    shapes = {(width, width): 4 * layers, (width, intermediate): 2 * layers, (intermediate, width): layers}
    total = 0.0
    for (inner, outer), count in {**shapes, (width, VOCABULARY): 1}.items():
        x, gradient = torch.randn(tokens, inner).bfloat16(), torch.randn(tokens, outer).bfloat16()
        weight = torch.randn(outer, inner).bfloat16()
        times = []
        for _ in range(7):
            start = time.perf_counter()
            x @ weight.T, gradient @ weight, gradient.T @ x
            times.append(time.perf_counter() - start)
        total += count * statistics.median(times)
    return total


def in_process(side: str, size: str, steps: int, micro_batch: int | None) -> dict[str, float]:
    """`one_side` in a process of its own, with the environment that `baton run` gives a stage where it is ours."""
    from baton.launch import stage_environment

    environment = stage_environment("pretrain") if side.startswith("ours") else dict(os.environ)
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, __file__, "--one", side, "--size", size, "--steps", str(steps)]
    if micro_batch:
        command += ["--tokens-per-micro-batch", str(micro_batch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(sides: list[str], size: str, steps: int, rounds: int, micro_batch: int | None) -> dict[str, Any]:
    """Medians over `rounds` of each side, taken in turns, and their ratios."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            found[side].append(in_process(side, size, steps, micro_batch))
            print(f"{size} {side}: {found[side][-1]}", file=sys.stderr, flush=True)
    table: dict[str, Any] = {
        side: {key: statistics.median(each[key] for each in runs) for key in runs[0]} for side, runs in found.items()
    }
    ours = table[sides[0]]
    for side, key in (("plain", "speedup"), ("plain_bf16", "speedup_bf16")):
        if side in table:
            table[key] = ours["tokens_per_s"] / table[side]["tokens_per_s"]
            table[key + "_loss_difference"] = ours["loss"] - table[side]["loss"]
            table[key + "_equal_loss"] = abs(table[key + "_loss_difference"]) <= LOSS_TOLERANCE
    table |= {share: ours[share] for share in SHARES}
    return table


def main() -> None:
    """Compare, or be one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one")
    parser.add_argument("--sides", default="ours,ours_eager,plain,plain_bf16")
    parser.add_argument("--size", choices=list(SHAPES), default="14M")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--floor", action="store_true", help="also the 50M model, for the floors")
    parser.add_argument("--tokens-per-micro-batch", type=int, help="ours; the default is the recipe's")
    arguments = parser.parse_args()
    micro_batch = arguments.tokens_per_micro_batch
    if arguments.one:
        print(json.dumps(one_side(arguments.one, arguments.size, arguments.steps, micro_batch)))
        return
    sides = arguments.sides.split(",")
    found = compare(sides, arguments.size, arguments.steps, arguments.rounds, micro_batch)
    if arguments.floor:
        found["50M"] = compare([sides[0]], "50M", arguments.steps, 1, micro_batch)
        found |= {share: found["50M"][share] for share in SHARES}
    print(json.dumps(found) if arguments.json else json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
