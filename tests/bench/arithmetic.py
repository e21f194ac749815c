"""Does PPO learn from a rule? Sums of small numbers, the rule `reward.rules:exact_answer`, no reward model, no SFT.

    python tests/bench/arithmetic.py --model DIR --work DIR [key=value …]

Registers the model (it must have a chat template), trains a new LoRA adapter on it by PPO and prints the share of right
answers on held-out problems, none of which is trained on, before and after. `--json` prints one object.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

if sys.path[0] == str(Path(__file__).parent):  # the script's own folder is no place to import from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

RECIPE = """
stage: ppo
sft: arithmetic/base:1
reward: [{{function: "reward.rules:exact_answer"}}]
registry: {work}/registry
run_dir: {work}/run
publish: {{name: arithmetic/ppo}}
lora: {{r: 16, alpha: 32}}
data:
  train: [{{path: {work}/train.jsonl, format: prompts}}]
  eval: [{{path: {work}/eval.jsonl, format: prompts}}]
rollout: {{max_prompt_tokens: 96, max_new_tokens: 12}}
ppo: {{epochs: 2, minibatches: 2, critic: shared, kl_coefficient: 0.02, missing_eos_penalty: 0.5}}
train:
  steps: 24
  learning_rate: 3.0e-4
  warmup_steps: 2
  schedule: constant
  episodes_per_batch: 64
  tokens_per_micro_batch: 2048
  eval_every: 8
  save_every: 8
"""


def problems(seed: int) -> list[dict[str, str]]:
    """Every sum of two numbers from 2 to 24, in a seeded order."""
    pairs = [(a, b) for a in range(2, 25) for b in range(2, 25)]
    random.Random(seed).shuffle(pairs)
    return [{"prompt": f"What is {a} + {b}? Answer with the number only.", "answer": f"#### {a + b}"} for a, b in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    rows = problems(0)
    for name, part in (("train", rows[96:]), ("eval", rows[:96])):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))

    from baton.recipe import PPORecipe, load_recipe
    from baton.registry import Registry
    from stages.ppo import main as train

    registry = Registry(work / "registry", create=True)
    registry.publish(args.model, name="arithmetic/base", kind="base", details={})
    (work / "ppo.yaml").write_text(RECIPE.format(work=work))
    version = train(load_recipe(work / "ppo.yaml", args.overrides, PPORecipe))
    metrics = version.manifest["metrics"]
    found = {key: metrics[key] for key in sorted(metrics) if key.startswith("eval/")}
    print(json.dumps(found) if args.json else f"right: {found['eval/reward_before']:.1%} -> {found['eval/reward']:.1%}")


if __name__ == "__main__":
    main()
