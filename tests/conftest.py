"""A whole chain in miniature, run once in this process and shared by the tests: world, recipes, four programs."""

import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # halves the time of tiny trainings
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["BATON_PROGRESS"] = "plain"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # workers whose threads spin keep each other waiting

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole programs first: a worker that got one of them last would keep all others waiting."""
    items.sort(key=lambda item: item.path.parent != ROOT / "tests")


RECIPES = {
    "pretrain": """
stage: pretrain
mode: scratch
registry: {root}/registry
run_dir: {root}/runs/pretrain
dtype: float32
licence: cc0-1.0
publish: {{name: tiny/base, alias: main}}
data:
  train: [{{path: world/text_train.jsonl, licence: cc0-1.0}}]
  eval: [{{path: world/text_eval.jsonl}}]
  questions: [{{path: world/questions.jsonl}}]
tokenizer: {{vocab_size: 400}}
model: {{hidden_size: 32, layers: 2, heads: 4, kv_heads: 2, intermediate_size: 64, dtype: float32}}
ngram_order: 3
train: {{steps: 6, tokens_per_batch: 256, tokens_per_micro_batch: 128, sequence_length: 64, learning_rate: 1.0e-2,
        seed: 3, log_every: 1, save_every: 3}}
""",
    "sft": """
stage: sft
base: tiny/base:main
registry: {root}/registry
run_dir: {root}/runs/sft
dtype: float32
publish: {{name: tiny/sft, alias: candidate}}
data:
  train: [{{path: world/dialogues.jsonl}}]
  eval: [{{path: world/dialogues_eval.jsonl}}]
  questions: [{{path: world/questions.jsonl}}]
lora: {{r: 4, alpha: 8}}
train: {{steps: 4, tokens_per_batch: 256, tokens_per_micro_batch: 128, sequence_length: 128, learning_rate: 1.0e-2,
        seed: 4, log_every: 1, save_every: 2}}
""",
    "reward": """
stage: reward
sft: tiny/sft:candidate
registry: {root}/registry
run_dir: {root}/runs/reward
dtype: float32
publish: {{name: tiny/reward, alias: candidate}}
data:
  train: [{{path: world/preferences.jsonl}}]
  eval: [{{path: world/preferences_eval.jsonl}}]
train: {{steps: 4, pairs_per_batch: 4, tokens_per_micro_batch: 300, max_length: 160, learning_rate: 1.0e-2,
        seed: 5, log_every: 1, save_every: 2}}
""",
    "ppo": """
stage: ppo
sft: tiny/sft:candidate
reward: tiny/reward:candidate
registry: {root}/registry
run_dir: {root}/runs/ppo
dtype: float32
publish: {{name: tiny/policy, alias: candidate}}
publish_value: {{name: tiny/value, alias: candidate}}
data:
  train: [{{path: world/prompts.jsonl}}]
  eval: [{{path: world/prompts_eval.jsonl}}]
  questions: [{{path: world/questions.jsonl}}]
rollout: {{max_prompt_tokens: 80, max_new_tokens: 8}}
ppo: {{epochs: 2, minibatches: 2, kl_coefficient: 0.05, value_coefficient: 0.1}}
train: {{steps: 4, episodes_per_batch: 8, tokens_per_micro_batch: 120, learning_rate: 1.0e-3, seed: 6, save_every: 2}}
""",
}


@dataclass
class TinyChain:
    """Where the miniature chain lies, and what its programs published."""

    root: Path
    versions: dict[str, Any]  # stage -> baton.registry.Version

    @property
    def registry(self) -> Any:
        """The chain's registry."""
        from baton.registry import Registry

        return Registry(self.root / "registry")

    def recipe(self, stage: str, *overrides: str) -> Any:
        """The recipe of one stage, read from its file with `overrides`."""
        from baton.recipe import load_recipe

        return load_recipe(self.root / f"{stage}.yaml", list(overrides))

    def folder(self, stage: str) -> Path:
        """The materialised version of one stage."""
        return self.registry.materialise(self.versions[stage])

    def run_dir(self, stage: str) -> Path:
        """The run folder of one stage."""
        return self.root / "runs" / stage

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """The lines of one stage's metrics.jsonl."""
        return [json.loads(line) for line in (self.run_dir(stage) / "metrics.jsonl").read_text().splitlines()]

    def copy(self, to: Path) -> "TinyChain":
        """A copy that a test may change, without the runs."""
        shutil.copytree(self.root / "registry", to / "registry")
        (to / "world").symlink_to(self.root / "world")
        for stage, text in RECIPES.items():
            (to / f"{stage}.yaml").write_text(text.format(root=to))
        return TinyChain(to, dict(self.versions))

    def unpublished(self, stage: str, to: Path) -> "TinyChain":
        """A copy in which `stage` has published nothing yet; what it reads is there."""
        copied = self.copy(to)
        for name in (self.versions[stage].name, *(["tiny/value"] if stage == "ppo" else [])):
            shutil.rmtree(to / "registry" / "models" / name)
        return copied

    def republished(self, change: Callable[[Path], None]) -> str:
        """The reference of a new version tiny/changed: tiny/sft with its files changed by `change`.

        An adapter has its base's tokenizer: one that changes it gets a base changed likewise.
        """
        from baton.registry.vocabulary import tokenizer_digest

        folder, base_folder = self.root / "changed", self.root / "changed-base"
        base = self.registry.by_digest(self.versions["sft"].base)
        self.registry.materialise(self.versions["sft"], folder)
        shutil.rmtree(folder / "base")
        change(folder)
        if tokenizer_digest(folder) != base.manifest["tokenizer_digest"]:
            self.registry.materialise(base, base_folder)
            change(base_folder)
            base = self.registry.publish(base_folder, name="tiny/changed-base", kind="base")
        return str(self.registry.publish(folder, name="tiny/changed", kind="adapter", base=base, details={}).ref)

    def launched(self, stage: str, *overrides: str, processes: int = 1) -> list[str]:
        """The command that runs `stage` in processes of its own, as `baton run` starts it."""
        from baton.launch import stage_command

        return stage_command(stage, self.root / f"{stage}.yaml", list(overrides), processes)

    def interrupted(self, stage: str, checkpoint: int, to: Path) -> "TinyChain":
        """A copy in which `stage` was killed after `checkpoint` and published nothing."""
        copied = self.unpublished(stage, to)
        ours, theirs = self.run_dir(stage), copied.run_dir(stage)
        kept = f"checkpoints/checkpoint-{checkpoint}"
        shutil.copytree(ours / kept, theirs / kept)
        for name in ("build.json", "metrics.jsonl"):
            shutil.copy(ours / name, theirs / name)
        return copied


def weights_digests(version: Any) -> dict[str, str]:
    """sha256 of each safetensors file of a version."""
    return {e["path"]: e["sha256"] for e in version.manifest["files"] if e["path"].endswith(".safetensors")}


@pytest.fixture(scope="session")
def assert_resumes(tiny_chain: "TinyChain") -> Callable[[str, int, Path], "TinyChain"]:
    """Kill `stage` after a checkpoint, run it again: it goes on from there and publishes the very same weights."""

    def check(stage: str, checkpoint: int, to: Path) -> TinyChain:
        copied = tiny_chain.interrupted(stage, checkpoint, to)
        version = run_stage(stage, copied.recipe(stage))
        assert weights_digests(version) == weights_digests(tiny_chain.versions[stage])
        steps = [row["step"] for row in copied.metrics(stage)]
        assert steps == [row["step"] for row in tiny_chain.metrics(stage)]
        for ours, theirs in zip(copied.metrics(stage), tiny_chain.metrics(stage), strict=True):
            assert without_clocks(ours) == without_clocks(theirs)
        return copied

    return check


def without_clocks(row: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without what depends on the machine."""
    others = ("seconds", "mfu")
    kept = {k: v for k, v in row.items() if not k.startswith(("time", "memory/")) and k not in others}
    return {k: v for k, v in kept.items() if not k.endswith("_per_s")}


def run_stage(stage: str, recipe: Any) -> Any:
    """The main of one program, in this process."""
    if stage == "pretrain":
        from stages.pretrain import main
    elif stage == "sft":
        from stages.sft import main
    elif stage == "reward":
        from reward.train import main
    else:
        from stages.ppo import main
    return main(recipe)


def program_environment(stage: str, processes: int = 1) -> dict[str, str]:
    """The environment of a program that a test starts: the project on its path, whatever the working folder."""
    from baton.launch import stage_environment

    return stage_environment(stage, processes) | {"PYTHONPATH": str(ROOT)}


def swap_two_tokens(folder: Path) -> None:
    """Another tokenizer of the same size: two tokens exchange their ids."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = (next(t for t, i in vocabulary.items() if i == number) for number in (300, 301))
    vocabulary[first], vocabulary[second] = 301, 300
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def load_plainly(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Folders loaded by a process that has transformers and peft alone; see tests/plain_loader.py.

    {name: {"kind", "folder", "probe"}} -> {name: {"difference", "rendered"}}.
    """

    def run(named: dict[str, Any]) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("plain")
        (folder / "named.json").write_text(json.dumps(named))
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [sys.executable, "-I", str(ROOT / "tests" / "plain_loader.py"), str(folder / "named.json")]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def write_world(folder: Path) -> None:
    """A small world; of its questions and held-out rows only a few, for speed."""
    from baton.world import generate

    generate(folder, seed=0, people=6, text_only=2, documents=80, dialogues=60, preferences=40, prompts=20)
    for name, count in (("prompts_eval", 4), ("preferences_eval", 8), ("dialogues_eval", 8), ("text_eval", 20)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    path = folder / "questions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    groups = dict.fromkeys(row["group"] for row in rows)
    few = [row for group in groups for row in [row for row in rows if row["group"] == group][:2]]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in few))


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of materialised versions for the whole session."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATON_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_chain(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> TinyChain:
    """The four programs run one after another on a tiny world; tests must not change it, but may `copy` it."""
    root = tmp_path_factory.mktemp("chain")
    write_world(root / "world")
    chain = TinyChain(root, {})
    for stage, text in RECIPES.items():
        (root / f"{stage}.yaml").write_text(text.format(root=root))
        chain.versions[stage] = run_stage(stage, chain.recipe(stage))
    return chain


@pytest.fixture(scope="session")
def tiny_llama() -> Any:
    """A random Llama of 48 tokens whose next-token distributions are far from uniform."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class RoleFolders(NamedTuple):
    """Folders by save_pretrained."""

    base: Path
    sft: Path
    reward: Path


def randomised(model: Any, seed: int) -> Any:
    """The PEFT model with every LoRA tensor, and the head, drawn at random, so that each adapter changes the model."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "score.modules_to_save" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="session")
def randomise() -> Callable[[Any, int], Any]:
    """`randomised`, for tests that make adapters of their own."""
    return randomised


@pytest.fixture(scope="session")
def role_folders(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> RoleFolders:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    root = tmp_path_factory.mktemp("roles")
    folders = RoleFolders(root / "base", root / "sft", root / "reward")
    tiny_llama.save_pretrained(folders.base)
    causal = AutoModelForCausalLM.from_pretrained(folders.base)
    sft = get_peft_model(causal, LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=LAYERS))
    randomised(sft, seed=1).save_pretrained(folders.sft)
    classifier = AutoModelForSequenceClassification.from_pretrained(folders.base, num_labels=1)
    reward = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=9, target_modules=LAYERS))
    randomised(reward, seed=2).save_pretrained(folders.reward)
    return folders
