"""Reward training beside TRL's RewardTrainer with its defaults: pairs a second, peak memory, held-out accuracy.

    python tests/bench/reward.py --model DIR --data hh.jsonl.gz --json

Both get the same model, LoRA, pairs as the same token ids, batch, learning rate and number of steps, and are then
measured on the same held-out pairs. TRL's side is what its documentation starts with: the model in float32, autocast in
bfloat16, activations computed again, eight pairs at once. Each run is a process of its own; the sides take turns;
medians count. Times are those of the training steps, without loading; memory is the process's peak (on a GPU, the
allocator's). The model must have a chat template.
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
# the script's own folder, which comes first, would make this file the package `reward`
sys.path[0] = str(ROOT)

RANK = 16
LEARNING_RATE = 1e-4  # TRL's default
BATCH = 8  # TRL's default


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="a Hugging Face folder with a chat template")
    parser.add_argument("--data", required=True, type=Path, help="HH pairs, .jsonl or .jsonl.gz")
    parser.add_argument("--pairs", type=int, default=256, help=f"pairs to train on, a multiple of {BATCH}")
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--tokens-per-micro-batch", type=int, default=1024)
    parser.add_argument("--apart", action="store_true", help="ours without sharing the prompt of a pair")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--sides", nargs="+", default=["ours", "trl"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_registry(args: argparse.Namespace, folder: Path) -> None:
    """The model as a base, and an SFT adapter on it that changes nothing yet: what TRL's own LoRA starts as."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from baton.adapters import new_lora_config
    from baton.recipe import Lora
    from baton.registry import Registry

    registry = Registry(folder / "registry", create=True)
    base = registry.publish(args.model, name="bench/base", kind="base", details={})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    get_peft_model(model, new_lora_config(Lora(r=RANK, alpha=2 * RANK))).save_pretrained(str(folder / "sft"))
    AutoTokenizer.from_pretrained(args.model).save_pretrained(folder / "sft")
    registry.publish(folder / "sft", name="bench/sft", kind="adapter", base=base, details={})


def write_pairs(args: argparse.Namespace, folder: Path) -> None:
    """The first pairs that fit, for training, and the next ones, held out."""
    from transformers import AutoTokenizer

    from baton.chat import encode_scored
    from baton.data.faults import Unusable
    from baton.data.formats import convert

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    kept: list[str] = []
    with gzip.open(args.data, "rt") if args.data.suffix == ".gz" else args.data.open() as file:
        for line in file:
            try:
                (row,) = convert(json.loads(line), "hh", "preference")
            except Unusable:
                continue
            sides = [encode_scored(tokenizer, row["prompt"] + row[side]) for side in ("chosen", "rejected")]
            if max(map(len, sides)) <= args.max_length:
                kept.append(line)
            if len(kept) == args.pairs + args.held_out:
                break
    assert len(kept) == args.pairs + args.held_out, f"only {len(kept)} pairs fit"
    (folder / "train.jsonl").write_text("".join(kept[: args.pairs]))
    (folder / "eval.jsonl").write_text("".join(kept[args.pairs :]))


def recipe_text(args: argparse.Namespace, folder: Path) -> str:
    return f"""
stage: reward
sft: bench/sft:1
registry: {folder}/registry
run_dir: {folder}/runs/{time.time_ns()}
dtype: bfloat16
publish: {{name: bench/reward}}
data:
  train: [{{path: {folder}/train.jsonl, format: hh}}]
  eval: [{{path: {folder}/eval.jsonl, format: hh}}]
  repeated: keep
  leakage: drop
train: {{steps: {args.pairs // BATCH}, pairs_per_batch: {BATCH}, learning_rate: {LEARNING_RATE}, schedule: linear,
        max_length: {args.max_length}, tokens_per_micro_batch: {args.tokens_per_micro_batch},
        share_prompt: {str(not args.apart).lower()}, log_every: 4, save_every: 100000}}
"""


def run_one(args: argparse.Namespace, side: str, folder: Path) -> dict[str, Any]:
    """One run in a process of its own."""
    from baton.launch import stage_environment

    command = [sys.executable, __file__, *sys.argv[1:], "--one", side, "--folder", str(folder)]
    environment = (stage_environment("reward", 1) if side == "ours" else dict(os.environ)) | {"PYTHONPATH": str(ROOT)}
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
    from baton.chat import choose_pad
    from baton.models import base_folder, load_tokenizer
    from baton.recipe import RewardRecipe, load_recipe
    from baton.run import Run
    from reward.pairs import encode_pairs, read_all_pairs

    path = folder / f"{side}.yaml"
    path.write_text(recipe_text(args, folder))
    run = Run.start(load_recipe(path, [], RewardRecipe))
    sft = run.inputs.versions["sft"]
    start, base = run.registry.materialise(sft), base_folder(run.registry, sft)
    tokenizer = load_tokenizer(start)
    choose_pad(tokenizer)
    rows = read_all_pairs(run)
    pairs = {use: encode_pairs(run, tokenizer, getattr(rows, use), use) for use in ("train", "eval")}
    found = (ours if side == "ours" else trl)(args, run, base, start, tokenizer, pairs)
    found["tokens"] = sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs["train"])
    found["shared_tokens"] = sum(p.shared for p in pairs["train"])
    print(json.dumps(found))


def ours(args: argparse.Namespace, run: Any, base: Path, start: Path, tokenizer: Any, pairs: Any) -> dict[str, Any]:
    from reward.members import Members
    from reward.trainer import PairTrainer

    pad = int(tokenizer.pad_token_id)
    members = Members.from_sft(base, start, run.dtype, pad, count=1, trained="adapter", seed=0)
    trainer = PairTrainer(run, members, pairs)
    seconds = timed(trainer)
    chosen, rejected = (members.score([getattr(p, key) for p in pairs["eval"]])[0] for key in SIDES)
    return {"seconds": seconds, "accuracy": accuracy(chosen - rejected), "peak_gb": peak_gb()}


def trl(args: argparse.Namespace, run: Any, base: Path, start: Path, tokenizer: Any, pairs: Any) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    from reward.scoring import score

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules="all-linear",
        task_type="SEQ_CLS",
        modules_to_save=["score"],
        lora_dropout=0.0,
    )
    settings = RewardConfig(
        output_dir=str(run.folder / "trl"),
        max_steps=run.recipe.train.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        use_cpu=run.state.device.type == "cpu",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    columns = {key: [getattr(pair, key) for pair in pairs["train"]] for key in SIDES}
    trainer = RewardTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        peft_config=config,
    )
    seconds = timed(trainer)
    trained = trainer.accelerator.unwrap_model(trainer.model).eval()
    held_out = [[getattr(p, key) for p in pairs["eval"]] for key in SIDES]
    with torch.autocast(run.state.device.type, dtype=torch.bfloat16):
        chosen, rejected = (score(trained, ids, int(tokenizer.pad_token_id)) for ids in held_out)
    return {"seconds": seconds, "accuracy": accuracy(chosen - rejected), "peak_gb": peak_gb()}


SIDES = ("chosen_ids", "rejected_ids")


def timed(trainer: Any) -> float:
    """Seconds of its steps."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        began = ended = 0.0

        def on_train_begin(self, *given: Any, **more: Any) -> None:
            Clock.began = time.perf_counter()

        def on_step_end(self, *given: Any, **more: Any) -> None:
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize()
            Clock.ended = time.perf_counter()

    trainer.add_callback(Clock())
    trainer.train()
    return Clock.ended - Clock.began


def accuracy(margin: Any) -> float:
    return float((margin > 0).float().mean())


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
        write_pairs(args, folder)
        make_registry(args, folder)
        for _ in range(args.runs):
            for side in args.sides:
                results[side].append(run_one(args, side, folder))
    report(args, results)


def report(args: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    def middle(side: str, key: str) -> float:
        return statistics.median(run[key] for run in results[side])

    found: dict[str, Any] = {"pairs": args.pairs, "held_out": args.held_out, "runs": results}
    for key in ("seconds", "accuracy", "peak_gb", "tokens", "shared_tokens"):
        found[key] = {side: middle(side, key) for side in results}
    found["pairs_per_s"] = {side: args.pairs / middle(side, "seconds") for side in results}
    # of the two sides' tokens as they are, whatever is padded, shared or computed again
    found["tokens_per_s"] = {side: middle(side, "tokens") / middle(side, "seconds") for side in results}
    if {"ours", "trl"} <= results.keys():
        found["speedup"] = middle("trl", "seconds") / middle("ours", "seconds")
    if args.json:
        print(json.dumps(found))
        return
    for side in results:
        print(
            f"{side:6} {found['pairs_per_s'][side]:7.3f} pairs/s {found['tokens_per_s'][side]:8.0f} tokens/s"
            f"  accuracy {found['accuracy'][side]:.1%}  {found['peak_gb'][side]:.2f} GB"
        )
    if "speedup" in found:
        print(f"{found['speedup']:.2f}x")


if __name__ == "__main__":
    main()
