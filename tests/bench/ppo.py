"""PPO beside TRL 1.12.0's PPOTrainer, the last release that had one: episodes a second, peak memory, where time goes.

    pip install --no-deps --target PEER trl==1.12.0
    python tests/bench/ppo.py --model DIR --prompts hh.jsonl.gz --peer PEER --peer-script trl_ppo.py --runs 3

Both get the same model, number format, prompts (HH transcripts; those that fit into --prompt-tokens), batch, epochs,
response length, sampling temperature and LoRA. Each run is a process of its own; the sides take turns; medians count.
Times are those of the training steps, without loading; memory is the process's peak (on a GPU, the allocator's).
The model must have a chat template. `--json` prints one object with `speedup` and `memory_ratio` by critic.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if sys.path[0] == str(Path(__file__).parent):  # the script's own folder is no place to import from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

TEMPERATURE = 0.7  # TRL's default
RANK = 16


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="a Hugging Face folder with a chat template")
    parser.add_argument("--prompts", required=True, type=Path, help="HH transcripts, .jsonl or .jsonl.gz")
    parser.add_argument("--peer", type=Path, help="folder that holds trl 1.12.0; without it only Baton runs")
    parser.add_argument("--peer-script", type=Path, help="the program that runs TRL's trainer")
    parser.add_argument("--critic", nargs="+", default=["shared", "adapter"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--tokens-per-micro-batch", type=int, default=1536)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def fitting_prompts(args: argparse.Namespace, to: Path) -> int:
    """Write the first transcripts whose prompts fit, as many as the run takes; returns the number of prompt tokens."""
    from transformers import AutoTokenizer

    from baton.chat import encode_prompt

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    wanted, lines, tokens = args.batch * args.steps, [], 0
    with gzip.open(args.prompts, "rt") if args.prompts.suffix == ".gz" else args.prompts.open() as file:
        for line in file:
            first = json.loads(line)["chosen"].split("\n\nHuman:")[1].split("\n\nAssistant:")[0].strip()
            ids = encode_prompt(tokenizer, [{"role": "user", "content": first}])
            if len(ids) <= args.prompt_tokens:
                lines.append(
                    json.dumps({"chosen": f"\n\nHuman: {first}\n\nAssistant: a", "rejected": "", "prompt": first})
                )
                tokens += len(ids)
            if len(lines) == wanted:
                break
    assert len(lines) == wanted, f"only {len(lines)} prompts fit"
    with gzip.open(to / "hh.jsonl.gz", "wt") as out:
        out.write("\n".join(lines) + "\n")
    (to / "prompts.jsonl").write_text(
        "\n".join(json.dumps({"prompt": json.loads(line)["prompt"]}) for line in lines) + "\n"
    )
    return tokens


def make_registry(args: argparse.Namespace, folder: Path) -> None:
    """The model as a base, and a reward model of the same LoRA on it with a random head."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from baton.registry import Registry

    registry = Registry(folder / "registry", create=True)
    base = registry.publish(args.model, name="bench/base", kind="base", details={})
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="SEQ_CLS")
    config.exclude_modules = ["score"]
    config.modules_to_save = ["score"]
    get_peft_model(model, config).save_pretrained(folder / "reward")
    AutoTokenizer.from_pretrained(args.model).save_pretrained(folder / "reward")
    registry.publish(folder / "reward", name="bench/reward", kind="reward", base=base, details={})


def recipe_text(args: argparse.Namespace, folder: Path, critic: str) -> str:
    return f"""
stage: ppo
sft: bench/base:1
reward: bench/reward:1
registry: {folder}/registry
run_dir: {folder}/runs/{critic}-{time.time_ns()}
dtype: {args.dtype}
publish: {{name: bench/policy}}
lora: {{r: {RANK}, alpha: {2 * RANK}}}
data: {{train: [{{path: {folder}/prompts.jsonl, format: prompts}}]}}
rollout: {{max_prompt_tokens: {args.prompt_tokens}, max_new_tokens: {args.response}, temperature: {TEMPERATURE}}}
ppo: {{epochs: {args.epochs}, critic: {critic}}}
train: {{steps: {args.steps}, episodes_per_batch: {args.batch}, learning_rate: 1.0e-5,
        tokens_per_micro_batch: {args.tokens_per_micro_batch}, save_every: 1000}}
"""


def run_ours(args: argparse.Namespace, folder: Path, critic: str) -> dict[str, Any]:
    """One run in a process of its own."""
    from baton.launch import stage_environment

    path = folder / f"{critic}.yaml"
    path.write_text(recipe_text(args, folder, critic))
    command = [sys.executable, __file__, *sys.argv[1:], "--one", str(path)]
    root = Path(__file__).resolve().parents[2]
    # malloc's settings as the launcher gives them, but all cores
    environment = stage_environment("ppo", 1) | {"PYTHONPATH": str(root)}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def train_once(path: Path) -> None:
    """The stage's own main; prints a JSON line of its step times."""
    from baton.recipe import PPORecipe, load_recipe
    from stages.ppo import main

    recipe = load_recipe(path, [], PPORecipe)
    main(recipe)
    rows = [json.loads(line) for line in (Path(recipe.run_dir) / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "time/update_s" in row]
    parts = {name: sum(row[f"time/{name}_s"] for row in steps) for name in ("rollout", "score", "update")}
    tokens = sum(row["length"] for row in steps) * recipe.train.episodes_per_batch
    print(
        json.dumps(
            {
                "seconds": sum(parts.values()),
                **parts,
                "peak_gb": max(r["memory/peak_gb"] for r in steps),
                "tokens": tokens,
            }
        )
    )


def run_peer(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    command = [sys.executable, str(args.peer_script), "--trl", str(args.peer), "--model", str(args.model)]
    command += ["--prompts", str(folder / "hh.jsonl.gz"), "--episodes", str(args.batch * args.steps)]
    command += ["--batch", str(args.batch), "--response", str(args.response), "--epochs", str(args.epochs)]
    command += ["--prompt-tokens", str(args.prompt_tokens), "--dtype", args.dtype]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": found["seconds"], "peak_gb": found["peak_cuda_gb"] or found["peak_rss_gb"]}


def matrix_rate(model: Path, dtype: str, tokens: int) -> tuple[float, int]:
    """(measured FLOP/s of products of the model's MLP shape, parameters in matrices applied to every token)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype)
    x = torch.randn(tokens, config.hidden_size, dtype=kind, device=device)
    weight = torch.randn(config.intermediate_size, config.hidden_size, dtype=kind, device=device)
    out = torch.empty(tokens, config.intermediate_size, dtype=kind, device=device)
    rates = []
    for _ in range(30):
        start = time.perf_counter()
        torch.mm(x, weight.T, out=out)
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(2 * x.numel() * len(weight) / (time.perf_counter() - start))
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config)
    count = sum(
        m.weight.numel() for n, m in shell.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n
    )
    return statistics.median(rates), count


def floors(args: argparse.Namespace, prompt_tokens: int, response_tokens: float, critic: str) -> dict[str, float]:
    """Seconds of matrix products alone: 2 FLOPs a parameter and token forward, as much backward (frozen base)."""
    tokens = prompt_tokens + response_tokens
    rate, count = matrix_rate(args.model, args.dtype, args.tokens_per_micro_batch)
    one_pass = 2 * count * tokens / rate
    trained = 1 if critic == "shared" else 2
    return {
        "rollout": one_pass,
        "score": one_pass * (2 + trained),
        "update": one_pass * 2 * trained * args.epochs,
    }


def main() -> None:
    args = arguments()
    if args.one:
        train_once(Path(args.one))
        return
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prompt_tokens = fitting_prompts(args, folder)
        make_registry(args, folder)
        for _ in range(args.runs):
            for critic in args.critic:
                results.setdefault(critic, []).append(run_ours(args, folder, critic))
            if args.peer:
                results.setdefault("peer", []).append(run_peer(args, folder))
    report(args, results, prompt_tokens)


def report(args: argparse.Namespace, results: dict[str, list[dict[str, Any]]], prompt_tokens: int) -> None:
    def middle(side: str, key: str) -> float:
        return statistics.median(run[key] for run in results[side])

    episodes = args.batch * args.steps
    found: dict[str, Any] = {"episodes_per_s": {side: episodes / middle(side, "seconds") for side in results}}
    found["peak_gb"] = {side: middle(side, "peak_gb") for side in results}
    if args.peer:
        found["speedup"] = {c: middle("peer", "seconds") / middle(c, "seconds") for c in args.critic}
        found["memory_ratio"] = {c: middle(c, "peak_gb") / middle("peer", "peak_gb") for c in args.critic}
    found["seconds"] = {c: {part: middle(c, part) for part in ("rollout", "score", "update")} for c in args.critic}
    found["floor_s"] = {c: floors(args, prompt_tokens, middle(c, "tokens"), c) for c in args.critic}
    found["runs"] = results
    if args.json:
        print(json.dumps(found))
        return
    for side in results:
        ratio = f"{found['speedup'][side]:5.2f}x" if args.peer and side != "peer" else "      "
        share = f"{found['memory_ratio'][side]:5.2f}x" if args.peer and side != "peer" else "      "
        print(
            f"{side:10} {found['episodes_per_s'][side]:7.3f} episodes/s {ratio}"
            f"  {found['peak_gb'][side]:6.2f} GB {share}"
        )
    for critic in args.critic:
        parts, floor = found["seconds"][critic], found["floor_s"][critic]
        text = "  ".join(f"{name} {parts[name]:.2f} s (floor {floor[name]:.2f})" for name in parts)
        print(f"{critic:10} {text}")


if __name__ == "__main__":
    main()
