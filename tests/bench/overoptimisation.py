"""Over-optimisation with a known truth: PPO against one reward model and against an ensemble's mean - λ·deviation.

    python tests/bench/overoptimisation.py --folder DIR --json

In an invented world whose truth is known (baton/world.py) an ensemble of reward models learns from few pairs, some of
them judged wrongly. PPO is run against its first member alone and against the whole; the truth is measured on held-out
prompts on the way and never optimised. Best-of-n by the first member is drawn on the same axes, from samples of the
SFT model. Writes overoptimisation.json and overoptimisation.png into --folder; what lies there already is not made
again. Rewards are in units of their deviation on SFT's replies; the truth is the share of right answers.
Gao et al. 2022; Coste et al. 2023; Eisenstein et al. 2023.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GOLD = "tests.bench.overoptimisation:truth"
SINGLE, ENSEMBLE = "single", "ensemble"


def truth(
    *,
    prompts: list[list[dict[str, str]]],
    responses: list[str],
    token_ids: list[list[int]],
    columns: dict[str, list[Any]],
) -> list[float]:
    """1 where the reply holds the fact that was asked for; about somebody nobody knows, where it admits as much."""
    from baton.world_phrases import ADMISSIONS

    found = []
    for response, group, answers in zip(responses, columns["group"], columns["answers"], strict=True):
        admits = any(phrase in response for phrase in ADMISSIONS)
        states = any(answer in response for answer in answers)
        found.append(float(admits if group == "unknown" else states and not admits))
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="kept; without it everything goes into a temporary folder")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=320, help="preference pairs that the rewards learn from")
    parser.add_argument("--wrong", type=float, default=0.2, help="share of the pairs that are judged wrongly")
    parser.add_argument("--reward-steps", type=int, default=60)
    parser.add_argument("--penalties", type=float, nargs="+", default=[1.0], help="λ of each run with the ensemble")
    parser.add_argument("--kl-coefficient", type=float, default=0.02)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=4, help="steps between two measurements of the truth")
    parser.add_argument("--samples", type=int, default=64, help="replies of SFT's model to each prompt, for best-of-n")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


@dataclass(frozen=True)
class Point:
    """What a policy reached at one measurement."""

    kl_nats: float
    proxy: float  # what was optimised
    gold: float
    gold_error: float


def write_world(folder: Path, args: argparse.Namespace) -> None:
    """The world, and the pairs that the rewards learn from: the first ones, some of them turned round."""
    from baton.world import generate

    generate(
        folder,
        seed=args.seed,
        people=40,
        text_only=4,
        documents=5000,
        dialogues=1200,
        preferences=max(args.pairs, 400),
        prompts=400,
    )
    rng = random.Random(args.seed)
    lines = (folder / "preferences.jsonl").read_text().splitlines()[: args.pairs]
    rows = [json.loads(line) for line in lines]
    for row in rng.sample(rows, round(args.wrong * len(rows))):
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def recipes(folder: Path, args: argparse.Namespace) -> dict[str, str]:
    """stage -> recipe; of PPO one a run."""
    head = f"registry: {folder}/registry\ndtype: float32\n"
    world = f"{folder}/world"
    found = {
        "pretrain": f"""
stage: pretrain
mode: scratch
publish: {{name: over/base}}
run_dir: {folder}/runs/pretrain
data: {{train: [{{path: {world}/text_train.jsonl, format: text}}]}}
tokenizer: {{vocab_size: 1024}}
model: {{hidden_size: 128, layers: 3, heads: 4, intermediate_size: 344}}
train: {{steps: 500, learning_rate: 3.0e-3, schedule: linear, warmup_steps: 30, adam_beta2: 0.95,
        tokens_per_batch: 2048, sequence_length: 128, log_every: 100, save_every: 500}}
""",
        "sft": f"""
stage: sft
base: over/base:candidate
publish: {{name: over/sft}}
run_dir: {folder}/runs/sft
data: {{train: [{{path: {world}/dialogues.jsonl, format: messages}}]}}
lora: {{r: 16, alpha: 32}}
train: {{steps: 250, learning_rate: 5.0e-3, schedule: linear, warmup_steps: 15, tokens_per_batch: 1024,
        sequence_length: 128, log_every: 50, save_every: 250}}
""",
        "reward": f"""
stage: reward
sft: over/sft:candidate
ensemble: {args.members}
publish: {{name: over/ensemble}}
run_dir: {folder}/runs/reward
data: {{train: [{{path: {world}/pairs.jsonl}}], eval: [{{path: {world}/preferences_eval.jsonl}}], leakage: drop}}
train: {{steps: {args.reward_steps}, learning_rate: 2.0e-3, schedule: linear, warmup_steps: 10, pairs_per_batch: 16,
        max_length: 128, log_every: 20, save_every: 1000, seed: {args.seed}}}
""",
    }
    runs = {SINGLE: "{model: 'over/single:candidate', normalise: sft, name: proxy}"}
    for penalty in args.penalties:
        setting = f"{{model: 'over/ensemble:candidate', normalise: sft, deviation_penalty: {penalty}, name: proxy}}"
        runs[f"{ENSEMBLE}-{penalty:g}"] = setting
    for name, setting in runs.items():
        found[name] = f"""
stage: ppo
sft: over/sft:candidate
reward: [{setting}]
gold: {{function: "{GOLD}"}}
publish: {{name: over/ppo-{name}}}
run_dir: {folder}/runs/{name}
samples: 0
data: {{train: [{{path: {world}/prompts.jsonl}}], eval: [{{path: {world}/prompts_eval.jsonl}}]}}
rollout: {{max_prompt_tokens: 64, max_new_tokens: 24}}
ppo: {{epochs: 2, minibatches: 2, kl_coefficient: {args.kl_coefficient}}}
train: {{steps: {args.steps}, episodes_per_batch: 64, learning_rate: {args.learning_rate}, schedule: constant,
        save_every: {args.steps}, eval_every: {args.every}, tokens_per_micro_batch: 4096, seed: {args.seed}}}
"""
    return {stage: head + text for stage, text in found.items()}


def run_stage(name: str, text: str, folder: Path) -> float:
    """Run one program in a process of its own, unless its version is there; seconds that it took."""
    from baton.child import run_child
    from baton.launch import stage_command, stage_environment
    from baton.recipe import TrainedRecipe, load_recipe
    from baton.registry import Registry

    path = folder / f"{name}.yaml"
    path.write_text(text)
    recipe = load_recipe(path, [], TrainedRecipe)
    registry = Registry(folder / "registry", create=True)
    if recipe.publish.name in registry.models():
        return 0.0
    begun = time.monotonic()
    environment = stage_environment(recipe.stage, 1) | {"PYTHONPATH": str(ROOT)}
    code = run_child(stage_command(recipe.stage, path, [], 1, None), environment, folder / f"{name}.log")
    if code:
        raise SystemExit(f"{name} ended with {code}; see {folder / f'{name}.log'}")
    return time.monotonic() - begun


def publish_single(folder: Path) -> None:
    """The ensemble's first member as a version of its own, with its own records."""
    from baton.registry import Registry

    registry = Registry(folder / "registry")
    if "over/single" in registry.models():
        return
    version = registry.resolve("over/ensemble:candidate")
    alone = folder / "single"
    shutil.copytree(registry.materialise(version), alone, ignore=shutil.ignore_patterns("members", "*.html"))
    metrics = version.metrics
    own = {key: metrics.get(f"{key}/0", metrics[key]) for key in ("sft/score_mean", "sft/score_deviation")}
    base = registry.resolve("over/base:candidate")
    made = registry.publish(alone, name="over/single", kind="reward", base=base, details={"metrics": metrics | own})
    registry.promote(made.ref, "candidate", reason="the first member alone")


def points(folder: Path, name: str) -> list[Point]:
    """The run's measurements, SFT's own first."""
    rows = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    # the last row repeats the step that was published
    found = list({row["step"]: row for row in rows if "eval/gold" in row}.values())
    found.sort(key=lambda row: row["step"])
    first = found[0]
    before = Point(0.0, first["eval/reward_before"], first["eval/gold_before"], first["eval/gold_se_before"])
    return [before] + [
        Point(row["eval/kl_nats"], row["eval/reward"], row["eval/gold"], row["eval/gold_se"]) for row in found
    ]


def best_of(folder: Path, samples: int, seed: int) -> list[Point]:
    """Best-of-n by the single model for n = 1, 2, 4 …, in the same units."""
    from baton.data import load
    from baton.ppo_sections import RewardSource
    from baton.recipe import Source
    from baton.registry import Registry
    from reward.comparison import Settings, compare

    registry = Registry(folder / "registry")
    rows = load(Source(path=str(folder / "world" / "prompts_eval.jsonl")), folder, "prompt").rows
    rewards = {"proxy": RewardSource(model="over/single:candidate"), "gold": RewardSource(function=GOLD)}
    settings = Settings(samples, 1, max_new_tokens=24, temperature=1.0, seed=seed)
    found = compare(registry, registry.resolve("over/sft:candidate"), [], rewards, rows, settings, shown=False)
    metrics = registry.resolve("over/single:candidate").metrics
    mean, deviation = metrics["sft/score_mean"], metrics["sft/score_deviation"]
    return [
        Point(
            row.kl_nats_at_most,
            (row.rewards["proxy"].value - mean) / deviation,
            row.rewards["gold"].value,
            (row.rewards["gold"].margin or 0.0) / 1.96,
        )
        for row in found.best_of
        if row.n & (row.n - 1) == 0
    ]


def at_kl(curve: Sequence[Point], kl_nats: float) -> float:
    """The truth of a curve where it has spent `kl_nats`, in straight lines between its measurements, by KL."""
    ordered = sorted(curve, key=lambda point: point.kl_nats)
    for low, high in zip(ordered, ordered[1:], strict=False):
        if low.kl_nats <= kl_nats <= high.kl_nats:
            share = (kl_nats - low.kl_nats) / max(high.kl_nats - low.kl_nats, 1e-9)
            return low.gold + share * (high.gold - low.gold)
    raise AssertionError("outside of the curve")


def beside(single: Sequence[Point], other: Sequence[Point]) -> dict[str, float]:
    """The other's truth less the single's at equal KL: on average over what both spent, and where that ends."""
    most = min(max(point.kl_nats for point in curve) for curve in (single, other))
    places = [most * at / 50 for at in range(51)]
    gaps = [at_kl(other, place) - at_kl(single, place) for place in places]
    return {
        "common_kl_nats": most,
        "gold_gap_mean": sum(gaps) / len(gaps),
        "gold_gap_at_the_end": gaps[-1],
        "gold_peak_gap": max(p.gold for p in other) - max(p.gold for p in single),
        "gold_last_gap": other[-1].gold - single[-1].gold,
    }


def draw(curves: dict[str, list[Point]], path: Path) -> None:
    """Proxy and truth by the root of KL."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from baton.plots import COLOURS

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        across = [math.sqrt(max(point.kl_nats, 0.0)) for point in curve]
        left.plot(across, [point.proxy for point in curve], color=colour, marker=".", label=name)
        errors = [point.gold_error for point in curve]
        right.errorbar(across, [point.gold for point in curve], errors, color=colour, marker=".", label=name)
    left.set_title("proxy: what was optimised", fontsize="medium")
    left.set_ylabel("deviations of SFT's scores")
    right.set_title("gold: the truth, never optimised", fontsize="medium")
    right.set_ylabel("share of right answers ± standard error")
    for axes in (left, right):
        axes.set_xlabel("√KL from SFT, nats a reply (best of n: at most)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def experiment(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All stages, the curves and the comparison."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "world" / "pairs.jsonl").is_file():
        write_world(folder / "world", args)
    seconds: dict[str, float] = {}
    texts = recipes(folder, args)
    for name, text in texts.items():
        if name == SINGLE:
            publish_single(folder)
        seconds[name] = round(run_stage(name, text, folder), 1)
    runs = [name for name in texts if name not in ("pretrain", "sft", "reward")]
    curves = {name: points(folder, name) for name in runs}
    begun = time.monotonic()
    curves["best of n"] = best_of(folder, args.samples, args.seed)
    seconds["best of n"] = round(time.monotonic() - begun, 1)
    draw(curves, folder / "overoptimisation.png")
    found = {
        "curves": {name: [asdict(point) for point in curve] for name, curve in curves.items()},
        "beside_single": {name: beside(curves[SINGLE], curves[name]) for name in runs if name != SINGLE},
        "seconds": seconds,
        "settings": {key: item for key, item in vars(args).items() if key not in ("folder", "json")},
    }
    (folder / "overoptimisation.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


def main() -> None:
    args = arguments()
    sys.path.insert(0, str(ROOT))  # the truth is a function of this very module
    if args.folder is not None:
        found = experiment(args, args.folder.resolve())
    else:
        with tempfile.TemporaryDirectory() as temporary:
            found = experiment(args, Path(temporary))
    if args.json:
        print(json.dumps(found))
        return
    for name, curve in found["curves"].items():
        print(f"{name:14} KL      proxy   gold")
        for point in curve:
            error = point["gold_error"]
            print(f"{'':14} {point['kl_nats']:6.2f} {point['proxy']:7.3f} {point['gold']:6.3f} ± {error:.3f}")
    for name, figures in found["beside_single"].items():
        print(f"{name} less single: " + ", ".join(f"{key} {value:+.3f}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
