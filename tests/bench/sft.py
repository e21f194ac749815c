"""Fine-tuning beside TRL's SFTTrainer with its defaults: useful tokens a second, peak memory, held-out loss.

    python tests/bench/sft.py --model DIR --data dolly.jsonl.gz --json

Both get the same model, LoRA, dialogues as the same token ids with the loss on the same tokens, batches in the same
order, learning rate and number of steps, and are then measured on the same held-out dialogues by the same function.
TRL's side is what its documentation starts with: the model in float32, autocast in bfloat16, activations computed
again, eight dialogues at once, padded to the longest. Each run is a process of its own; the sides take turns; medians
count. Useful tokens are those of the dialogues, without padding. Times are those of the training steps, without
loading; memory is the process's peak (on a GPU, the allocator's). The held-out losses count as equal within TOLERANCE:
both compute in bfloat16, and draw the adapter's first factors from different generators.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# the script's own folder, which comes first, is no place to import from
sys.path[0] = str(ROOT)

RANK = 16
BATCH = 8  # TRL's default
TOLERANCE = 0.02  # nats a token


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="a Hugging Face folder whose vocabulary has ChatML's")
    parser.add_argument("--data", required=True, type=Path, help="rows of prompt and response, .jsonl or .jsonl.gz")
    parser.add_argument("--dialogues", type=int, default=128, help=f"to train on, a multiple of {BATCH}")
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=1024, help="longer dialogues are left out")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of both; TRL's 2e-5 is for all weights")
    parser.add_argument("--tokens-per-micro-batch", type=int, default=1024, help="ours: a multiple of --max-length")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--sides", nargs="+", default=["ours", "trl"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def recipe_text(args: argparse.Namespace, folder: Path) -> str:
    return f"""
stage: sft
base: {args.model.absolute()}
registry: {folder}/registry
run_dir: {folder}/runs/{time.time_ns()}
dtype: bfloat16
publish: {{name: bench/sft}}
data: {{train: [{{path: {folder}/train.jsonl}}]}}
lora: {{r: {RANK}, alpha: {2 * RANK}}}
train: {{steps: {args.dialogues // BATCH}, learning_rate: {args.learning_rate}, schedule: linear, log_every: 4,
        save_every: 100000, sequence_length: {args.max_length}, tokens_per_batch: {BATCH * args.max_length},
        tokens_per_micro_batch: {args.tokens_per_micro_batch}, packing: false}}
"""


def write_dialogues(args: argparse.Namespace, folder: Path) -> None:
    """The first dialogues that fit as token ids, for training and, after them, held out."""
    from baton.chat import encode_dialogue, install_template
    from baton.models import load_tokenizer

    tokenizer = load_tokenizer(args.model)
    install_template(tokenizer, "chatml", folder)
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = []
    with gzip.open(args.data, "rt") if args.data.suffix == ".gz" else args.data.open() as file:
        for line in file:
            row = json.loads(line)
            said = [("user", row["prompt"]), ("assistant", row["response"])]
            ids, in_loss = encode_dialogue(tokenizer, [{"role": role, "content": text} for role, text in said])
            if len(ids) <= args.max_length and any(in_loss):
                labels = [token if flag else -100 for token, flag in zip(ids, in_loss, strict=True)]
                rows.append({"input_ids": ids, "labels": labels, "position_ids": list(range(len(ids)))})
            if len(rows) == args.dialogues + args.held_out:
                break
    assert len(rows) == args.dialogues + args.held_out, f"only {len(rows)} dialogues fit"
    content = {"train": rows[: args.dialogues], "eval": rows[args.dialogues :]}
    (folder / "rows.json").write_text(json.dumps(content))
    (folder / "train.jsonl").write_text('{"messages": []}\n')  # what the recipe names; the rows are read from above


def run_one(side: str, folder: Path) -> dict[str, Any]:
    """One run in a process of its own."""
    from baton.launch import stage_environment

    command = [sys.executable, __file__, *sys.argv[1:], "--one", side, "--folder", str(folder)]
    environment = (stage_environment("sft", 1) if side == "ours" else dict(os.environ)) | {"PYTHONPATH": str(ROOT)}
    # malloc's settings as the launcher gives them, but the caller's number of threads
    environment.pop("OMP_NUM_THREADS", None)
    if "OMP_NUM_THREADS" in os.environ:
        environment["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def train_one(args: argparse.Namespace, side: str, folder: Path) -> None:
    """Train by one of the two; prints a JSON line."""
    from baton.models import load_tokenizer
    from baton.recipe import SFTRecipe, load_recipe
    from baton.run import Run

    path = folder / f"{side}.yaml"
    path.write_text(recipe_text(args, folder))
    run = Run.start(load_recipe(path, [], SFTRecipe))
    rows = json.loads((folder / "rows.json").read_text())
    model, (seconds, cpu_seconds) = (ours if side == "ours" else trl)(
        args, run, load_tokenizer(folder / "tokenizer"), rows
    )
    found = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gb": peak_gb()}
    found["tokens"] = sum(len(row["input_ids"]) for row in rows["train"])
    print(json.dumps(found | {"loss": held_out_loss(model, rows["eval"])}))


def ours(args: argparse.Namespace, run: Any, tokenizer: Any, rows: Any) -> tuple[Any, tuple[float, float]]:
    from baton.sft_trainer import DialogueTrainer
    from baton.tuned import Tuned

    lora = run.recipe.lora
    tuned = Tuned.make(args.model, run.dtype, trained="adapter", lora=lora, seed=0, device=run.state.device)
    seconds = timed(DialogueTrainer(run, tuned, tokenizer, rows))
    return tuned.plain, seconds


def trl(args: argparse.Namespace, run: Any, tokenizer: Any, rows: Any) -> tuple[Any, tuple[float, float]]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from baton.schedule import row_order

    train = run.recipe.train
    order = row_order(len(rows["train"]), BATCH, train.steps, train.seed)  # ours: the same batches
    chosen = [{key: rows["train"][at][key] for key in ("input_ids", "labels")} for at in order]
    settings = SFTConfig(
        output_dir=str(run.folder / "trl"),
        max_steps=train.steps,
        learning_rate=args.learning_rate,
        train_sampling_strategy="sequential",
        use_cpu=run.state.device.type == "cpu",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list(chosen),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    assert settings.per_device_train_batch_size == BATCH and trainer.train_dataset[0]["labels"] == chosen[0]["labels"]
    seconds = timed(trainer)
    return trainer.accelerator.unwrap_model(trainer.model), seconds


def held_out_loss(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Nats a token in the loss, by the plain forward pass, one dialogue at a time."""
    import torch

    total, count = 0.0, 0
    model.eval()
    device = model.get_input_embeddings().weight.device
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        for row in rows:
            ids, labels = (torch.tensor([row[key]], device=device) for key in ("input_ids", "labels"))
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum"))
            count += int((labels[0, 1:] != -100).sum())
    return total / count


def timed(trainer: Any) -> tuple[float, float]:
    """(seconds, the process's seconds on CPUs) of its steps."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        began = ended = (0.0, 0.0)

        def on_train_begin(self, *given: Any, **more: Any) -> None:
            Clock.began = time.perf_counter(), time.process_time()

        def on_step_end(self, *given: Any, **more: Any) -> None:
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()
            Clock.ended = time.perf_counter(), time.process_time()

    trainer.add_callback(Clock())
    trainer.train()
    return Clock.ended[0] - Clock.began[0], Clock.ended[1] - Clock.began[1]


def peak_gb() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    args = arguments()
    if args.one:
        train_one(args, args.one, args.folder)
        return
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in args.sides}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["BATON_CACHE"] = str(folder / "cache")
        write_dialogues(args, folder)
        for _ in range(args.runs):
            for side in args.sides:
                results[side].append(run_one(side, folder))
    report(args, results)


def report(args: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    def middle(side: str, key: str) -> float:
        return statistics.median(run[key] for run in results[side])

    found: dict[str, Any] = {"dialogues": args.dialogues, "held_out": args.held_out, "runs": results}
    for key in ("seconds", "cpu_seconds", "tokens", "loss", "peak_gb"):
        found[key] = {side: middle(side, key) for side in results}
    found["tokens_per_s"] = {side: middle(side, "tokens") / middle(side, "seconds") for side in results}
    if {"ours", "trl"} <= results.keys():
        found["speedup"] = middle("trl", "seconds") / middle("ours", "seconds")
        found["equal_loss"] = abs(middle("trl", "loss") - middle("ours", "loss")) <= TOLERANCE
    if args.json:
        print(json.dumps(found))
        return
    for side in results:
        print(
            f"{side:6} {found['tokens_per_s'][side]:8.0f} useful tokens/s  held-out loss {found['loss'][side]:.4f}"
            f"  {found['peak_gb'][side]:.2f} GB"
        )
    if "speedup" in found:
        print(f"{found['speedup']:.2f}x, losses {'equal' if found['equal_loss'] else 'differ'} (within {TOLERANCE})")


if __name__ == "__main__":
    main()
