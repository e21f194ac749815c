"""PPO's loop in whole tiny runs: what each setting changes, its stops, its refusals, and going on after a kill."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from baton.chat import encode_scored
from baton.errors import UserError
from baton.models import load_scorer
from baton.recipe import PPORecipe
from stages import ppo

QUICK = ["data.eval=[]", "data.questions=[]", "train.steps=2"]
RULES = '''
"""Rewards for a test, beside its recipe's run."""


def share_of_vowels(*, prompts, responses, token_ids, columns, times=1.0):
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    return [times * sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in responses]


def length(*, prompts, responses, token_ids, columns):
    return [len(ids) / 8 for ids in token_ids]


def broken(*, prompts, responses, token_ids, columns):
    return [float("nan") if at == 1 else 0.0 for at in range(len(responses))]
'''


@pytest.fixture(scope="module")
def shared_chain(tiny_chain: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One copy for many short runs: versions pile up in its registry."""
    return tiny_chain.unpublished("ppo", tmp_path_factory.mktemp("short"))


@pytest.fixture
def short_run(shared_chain: Any) -> Callable[..., tuple[Any, list[dict[str, Any]]]]:
    """Two steps with `overrides`: the version that they publish, and their metrics."""

    def run(*overrides: str) -> tuple[Any, list[dict[str, Any]]]:
        shutil.rmtree(shared_chain.run_dir("ppo"), ignore_errors=True)
        version = ppo.main(shared_chain.recipe("ppo", *QUICK, *overrides))
        return version, [row for row in shared_chain.metrics("ppo") if "reward" in row]

    return run


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The module RULES, where Python looks for modules."""
    (tmp_path / "tiny_rules.py").write_text(RULES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "tiny_rules"


def published_tensors(version: Any, chain: Any) -> dict[str, torch.Tensor]:
    return load_file(chain.registry.materialise(version) / "adapter_model.safetensors")


def weights(version: Any) -> dict[str, str]:
    return {e["path"]: e["sha256"] for e in version.manifest["files"] if e["path"].endswith(".safetensors")}


CHANGES = {
    "epochs": "3",
    "minibatches": "1",
    "critic": "shared",
    "critic_warmup_steps": "1",
    "kl_coefficient": "0.5",
    "kl_in": "loss",
    "kl_estimator": "k2",
    "kl_target_nats": "0.5",
    "kl_horizon_episodes": "20",
    "kl_budget_nats": "1e-7",
    "kl_minibatch_stop_nats": "1e-9",
    "clip_ratio": "0.001",
    "clip_ratio_high": "0.5",
    "dual_clip": "1.00001",
    "clip_value": "100.0",
    "value_coefficient": "5.0",
    "entropy_coefficient": "0.5",
    "gamma": "0.5",
    "lam": "0.5",
    "whiten_advantages": "false",
    "normalise_reward": "true",
    "clip_reward": "0.01",
    "missing_eos": "replace",
    "missing_eos_penalty": "3.0",
    "overlong_tokens": "4",
    "overlong_penalty": "9.0",
    "score_after_eos": "true",
    "ptx_coefficient": "0.5",
}
# what a setting is about must be there for it to matter
BESIDES = {
    "kl_in": ["ppo.kl_estimator=k2"],
    "kl_estimator": ["ppo.kl_in=loss", "ppo.kl_coefficient=1.0", "ppo.kl_estimator=k3"],
    "kl_horizon_episodes": ["ppo.kl_target_nats=0.4"],
    "clip_ratio_high": ["ppo.clip_ratio=0.002"],
    "dual_clip": ["ppo.clip_ratio=0.00001"],
    "overlong_penalty": ["ppo.overlong_tokens=5"],
    "critic_warmup_steps": ["publish_value=null"],
}
AFTER_SHARED = {"ptx_coefficient": ["data.ptx=[{path: world/dialogues.jsonl}]"]}


def test_every_setting_of_the_algorithm_is_tried() -> None:
    from baton.ppo_sections import Algorithm

    assert set(CHANGES) == set(Algorithm.model_fields)


@pytest.fixture(scope="module")
def plain_runs() -> dict[tuple[str, ...], Any]:
    """Runs without the setting, by what stands besides: made once."""
    return {}


@pytest.mark.parametrize("setting", CHANGES)
def test_each_setting_changes_what_is_published(
    setting: str, short_run: Callable[..., Any], plain_runs: dict[tuple[str, ...], Any]
) -> None:
    besides = tuple(["train.learning_rate=0.01", *BESIDES.get(setting, [])])
    if besides not in plain_runs:
        plain_runs[besides] = short_run(*besides)[0]
    more = AFTER_SHARED.get(setting, [])
    changed, rows = short_run(*besides, f"ppo.{setting}={CHANGES[setting]}", *more)
    assert all(torch.isfinite(torch.tensor([v for v in row.values() if isinstance(v, float)])).all() for row in rows)
    assert weights(changed) != weights(plain_runs[besides]), f"{setting} changes nothing"


def test_a_function_several_rewards_and_gold(shared_chain: Any, rules: str) -> None:
    """Weighted and logged by themselves; gold is measured on held-out prompts and never optimised."""
    shutil.rmtree(shared_chain.run_dir("ppo"), ignore_errors=True)
    rewards = (
        f"reward=[{{model: 'tiny/reward:candidate', weight: 0.5}}, "
        f"{{function: '{rules}:share_of_vowels', weight: 2.0, arguments: {{times: 3.0}}}}]"
    )
    overrides = [rewards, f"gold={{function: '{rules}:length'}}", "train.steps=2", "data.questions=[]"]
    version = ppo.main(shared_chain.recipe("ppo", *overrides, "train.eval_every=1"))
    rows = shared_chain.metrics("ppo")
    steps = [row for row in rows if "reward" in row]
    for row in steps:
        expected = 0.5 * row["reward/reward"] + 2.0 * row["reward/share_of_vowels"]
        assert row["reward"] == pytest.approx(expected, abs=1e-5)
        assert row["reward/share_of_vowels"] > 0 and "gold" not in str(sorted(row))
    evaluations = [row for row in rows if "eval/gold" in row]
    assert len(evaluations) >= 2
    for row in evaluations:
        assert row["eval/gold"] == pytest.approx(row["eval/length"] / 8)
        expected = 0.5 * row["eval/reward/reward"] + 2.0 * row["eval/reward/share_of_vowels"]
        assert row["eval/reward"] == pytest.approx(expected, abs=1e-5)
    samples = [json.loads(line) for line in (shared_chain.run_dir("ppo") / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {1, 2} and {"gold", "rewards", "kl_nats"} <= set(samples[0])
    assert set(version.manifest["parents"]) >= {"sft", "reward"}
    # with another gold the same policy comes out
    shutil.rmtree(shared_chain.run_dir("ppo"), ignore_errors=True)
    other = ppo.main(shared_chain.recipe("ppo", rewards, "train.steps=2", "data.questions=[]", "train.eval_every=1"))
    assert weights(other) == weights(version)


def test_a_rule_alone_is_reward_enough(shared_chain: Any, rules: str, short_run: Callable[..., Any]) -> None:
    """No reward model: the critic's adapter is new and its head starts at zero. A name that is a metric's, too."""
    version, rows = short_run(f"reward=[{{function: '{rules}:share_of_vowels', name: length, weight: 0.5}}]")
    assert rows[0]["length"] > 1 and 0 < rows[0]["reward"] < 0.5
    value = published_tensors(shared_chain.registry.resolve("tiny/value:candidate"), shared_chain)
    assert any("score" in key and tensor.any() for key, tensor in value.items())
    assert "reward" not in version.manifest["parents"]


@pytest.mark.parametrize("source", ["function", "model"])
def test_a_reward_that_is_no_number_stops_with_the_row(
    source: str, shared_chain: Any, rules: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(shared_chain.run_dir("ppo"), ignore_errors=True)
    before = shared_chain.registry.numbers("tiny/policy")
    if source == "function":
        with pytest.raises(RuntimeError, match=r"reward broken: it gave nan, which is not a finite number\n  prompt: "):
            ppo.main(shared_chain.recipe("ppo", *QUICK, f"reward=[{{function: '{rules}:broken'}}]"))
    else:
        from stages.roles import Roles

        scores = Roles.scores
        monkeypatch.setattr(Roles, "scores", lambda self, label, batch: scores(self, label, batch) * float("nan"))
        with pytest.raises(FloatingPointError, match=r"the reward reward of '.*assistant.* is nan"):
            ppo.main(shared_chain.recipe("ppo", *QUICK, "ppo.gamma=0.99"))
    assert shared_chain.registry.numbers("tiny/policy") == before


@pytest.mark.parametrize("policy", ["adapter", "full"])
@pytest.mark.parametrize("critic", ["adapter", "shared", "separate"])
def test_every_policy_with_every_critic_is_published(
    policy: str, critic: str, shared_chain: Any, short_run: Callable[..., Any]
) -> None:
    one_model = (policy, critic) == ("full", "shared")
    version, rows = short_run(
        f"policy={policy}",
        f"ppo.critic={critic}",
        "ppo.clip_ratio=0.25",
        *(["publish_value=null"] if one_model else []),
    )
    assert version.kind == ("merged" if policy == "full" else "adapter")
    assert rows[0]["kl_nats"] == pytest.approx(0.0, abs=1e-4)
    if not one_model:
        assert shared_chain.registry.resolve("tiny/value:candidate").kind == "value"


RESUMED = [
    "reward=[{model: 'tiny/reward:candidate', shape: reference, length_penalty: fitted, normalise: sft}]",
    "train.eval_every=1",
    "ppo.kl_target_nats=0.01",
    "ppo.normalise_reward=true",
    "ppo.critic=shared",
    "train.learning_rate=0.02",
    "train.save_every=1",
    "train.keep=4",
    "data.questions=[]",
    "train.schedule=cosine",
]


def test_goes_on_after_a_kill_bit_by_bit(
    assert_resumes: Callable[[str, int, Path], Any], tmp_path: Path, tiny_chain: Any
) -> None:
    copied = assert_resumes("ppo", 2, tmp_path)
    value, before = (chain.registry.resolve("tiny/value:candidate") for chain in (copied, tiny_chain))
    assert value.manifest["files"] == before.manifest["files"]


def without_clocks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            key: value
            for key, value in row.items()
            if not key.startswith(("time", "memory/")) and key not in ("seconds", "episodes_per_s")
        }
        for row in rows
    ]


def test_goes_on_from_every_checkpoint_with_everything_that_changes(
    tiny_chain: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Best weights, adaptive coefficient, running scales, alarms, the reference's scores: as an uninterrupted run."""
    (tmp_path / "whole").mkdir()
    whole = tiny_chain.unpublished("ppo", tmp_path / "whole")
    version = ppo.main(whole.recipe("ppo", *RESUMED))
    rows = whole.metrics("ppo")
    assert len({row["kl_coefficient"] for row in rows if "kl_coefficient" in row}) == 4, "it should adapt"
    last = load_file(whole.run_dir("ppo") / "checkpoints" / "checkpoint-4" / "tensors.safetensors")
    state = json.loads((whole.run_dir("ppo") / "checkpoints" / "checkpoint-4" / "state.json").read_text())
    assert any(name.startswith("best/") for name in last) and state["best"]["step"] in (1, 2, 3)
    for at in (1, 3):
        (tmp_path / str(at)).mkdir()
        copied = tiny_chain.unpublished("ppo", tmp_path / str(at))
        kept = f"checkpoints/checkpoint-{at}"
        shutil.copytree(whole.run_dir("ppo") / kept, copied.run_dir("ppo") / kept)
        for name in ("build.json", "metrics.jsonl", "samples.jsonl"):
            shutil.copy(whole.run_dir("ppo") / name, copied.run_dir("ppo") / name)
        assert ("SFT's model answered" in capsys.readouterr().out) == (at == 1), "once, in the whole run"
        again = ppo.main(copied.recipe("ppo", *RESUMED))
        assert weights(again) == weights(version)
        assert without_clocks(copied.metrics("ppo")) == without_clocks(rows)
        ours, theirs = ((c.run_dir("ppo") / "samples.jsonl").read_text() for c in (copied, whole))
        assert ours == theirs
    assert "SFT's model answered" not in capsys.readouterr().out


SHAPING = {
    "length_penalty": "length_penalty: 0.3",
    "fitted": "length_penalty: fitted",
    "shape": "shape: reference",
    "normalise": "normalise: sft",
    "deviation_penalty": "deviation_penalty: 0.5",
}


@pytest.fixture(scope="module")
def pair(shared_chain: Any) -> str:
    """Two versions of one reward, the second with its head halved: what they are as an ensemble."""
    from safetensors.torch import save_file

    folder = shared_chain.root / "halved"
    version = shared_chain.versions["reward"]
    shutil.copytree(shared_chain.registry.materialise(version), folder)
    path = folder / "adapter_model.safetensors"
    tensors = {key: item * (0.5 if key.endswith("score.weight") else 1.0) for key, item in load_file(path).items()}
    path.unlink()
    save_file(tensors, path)
    base = shared_chain.registry.resolve("tiny/base:main")
    details = {"metrics": version.metrics}
    other = shared_chain.registry.publish(folder, name="tiny/halved", kind="reward", base=base, details=details)
    return f"models: ['{version.ref}', '{other.ref}']"


@pytest.mark.parametrize("setting", SHAPING)
def test_each_shaping_changes_what_is_published(
    setting: str, short_run: Callable[..., Any], plain_runs: dict[tuple[str, ...], Any], pair: str
) -> None:
    """And is reported: the raw score, the shaped one, and of an ensemble each member and their deviation."""
    origin = pair if setting == "deviation_penalty" else "model: 'tiny/reward:candidate'"
    rewards = [f"reward=[{{{text}, name: r}}]" for text in (origin, f"{origin}, {SHAPING[setting]}")]
    base = ("train.learning_rate=0.01", rewards[0])
    if base not in plain_runs:
        plain_runs[base] = short_run(*base)[0]
    changed, rows = short_run(base[0], rewards[1])
    assert weights(changed) != weights(plain_runs[base]), f"{setting} changes nothing"
    for row in rows:
        assert row["reward"] == pytest.approx(row["reward/r/shaped"], abs=1e-6)
        if setting == "deviation_penalty":
            assert row["reward/r"] == pytest.approx((row["reward/r/member_0"] + row["reward/r/member_1"]) / 2, abs=1e-6)
            expected = row["reward/r"] - 0.5 * row["reward/r/deviation"]
            assert row["reward/r/shaped"] == pytest.approx(expected, abs=1e-6)
        elif setting == "length_penalty":
            assert row["reward/r/shaped"] == pytest.approx(row["reward/r"] - 0.3 * row["length"], abs=1e-5)


def test_the_best_step_within_the_budget_is_published(tiny_chain: Any, tmp_path: Path) -> None:
    chain = tiny_chain.unpublished("ppo", tmp_path)
    overrides = ["train.eval_every=1", "train.learning_rate=0.03", "train.save_every=1", "train.keep=9"]
    version = ppo.main(chain.recipe("ppo", *overrides, "data.questions=[]", "train.steps=5"))
    rows = chain.metrics("ppo")
    evaluations = {row["step"]: row["eval/reward"] for row in rows if "eval/reward" in row and "seconds" not in row}
    final = rows[-1]
    best = int(final["published_step"])
    measured = evaluations | {5: evaluations.get(5, float("-inf"))}
    assert final["eval/reward"] == pytest.approx(measured[best] if best < 5 else final["eval/reward"])
    assert all(final["eval/reward"] >= reward for reward in evaluations.values())
    kept = load_file(chain.run_dir("ppo") / f"checkpoints/checkpoint-{best}" / "tensors.safetensors")
    trained = {name.removeprefix("weight/"): t for name, t in kept.items() if name.startswith("weight/")}
    found = published_tensors(version, chain)
    for name, tensor in trained.items():
        if ".policy." in name:
            key = name.replace("shared.", "base_model.model.", 1).replace(".additions.policy.down", ".lora_A.weight")
            assert torch.equal(found[key.replace(".additions.policy.up", ".lora_B.weight")], tensor)


def test_the_kl_budget_stops_and_goes_back(tiny_chain: Any, tmp_path: Path) -> None:
    budget = 0.02
    overrides = [
        f"ppo.kl_budget_nats={budget}",
        "train.learning_rate=0.03",
        "train.steps=8",
        "train.save_every=1",
        "data.eval=[]",
        "data.questions=[]",
    ]
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    chain = tiny_chain.unpublished("ppo", tmp_path / "first")
    version = ppo.main(chain.recipe("ppo", *overrides))
    rows = [row for row in chain.metrics("ppo") if "kl_nats" in row]
    updates = len(rows)
    assert 1 <= updates < 8, "the budget should have stopped it"
    assert all(row["kl_nats"] <= budget for row in rows)
    checkpoint = chain.run_dir("ppo") / f"checkpoints/checkpoint-{updates}"
    kept = load_file(checkpoint / "tensors.safetensors")
    found = published_tensors(version, chain)

    def inside(key: str) -> str:
        key = key.replace("base_model.model.", "shared.", 1)
        return key.replace("lora_A.weight", "additions.policy.down").replace("lora_B.weight", "additions.policy.up")

    for key, tensor in found.items():
        assert torch.equal(tensor, kept[f"previous/{inside(key)}"])
    assert any(not torch.equal(tensor, kept[f"weight/{inside(key)}"]) for key, tensor in found.items())
    # killed after its last checkpoint, the run comes to the same end
    again = tiny_chain.unpublished("ppo", tmp_path / "second")
    (again.run_dir("ppo") / "checkpoints").mkdir(parents=True)
    shutil.copytree(checkpoint, again.run_dir("ppo") / "checkpoints" / checkpoint.name)
    shutil.copy(chain.run_dir("ppo") / "build.json", again.run_dir("ppo") / "build.json")
    assert weights(ppo.main(again.recipe("ppo", *overrides))) == weights(version)


def test_the_chain_moved_the_policy_from_sft(tiny_chain: Any) -> None:
    policy = published_tensors(tiny_chain.versions["ppo"], tiny_chain)
    sft = load_file(tiny_chain.folder("sft") / "adapter_model.safetensors")
    assert set(policy) == set(sft)
    assert any(not torch.equal(policy[key], sft[key]) for key in sft)
    first = tiny_chain.metrics("ppo")[0]
    assert first["kl_nats"] == pytest.approx(0.0, abs=1e-5)
    assert {"time/rollout_s", "time/score_s", "time/update_s", "episodes_per_s", "engine_gap_nats"} <= set(first)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.episodes_per_batch=7", "cannot be split evenly into ppo.minibatches = 2"),
        ("rollout.max_prompt_tokens=3", "rollout.max_prompt_tokens = 3, which could be raised"),
        ("lora={r: 4}", "is an adapter, which PPO goes on training"),
        ("reward=tiny/sft:candidate", "PPO needs a reward model"),
        ("reward=[{function: 'no.such:thing'}]", "there is no module no.such"),
        ("reward=[{model: 'tiny/reward:candidate', name: gold}]", "kept for the reward that is not optimised"),
    ],
)
def test_refusals_publish_nothing(shared_chain: Any, override: str, message: str) -> None:
    shutil.rmtree(shared_chain.run_dir("ppo"), ignore_errors=True)
    before = shared_chain.registry.numbers("tiny/policy")
    with pytest.raises(UserError, match=message):
        ppo.main(shared_chain.recipe("ppo", override))
    assert shared_chain.registry.numbers("tiny/policy") == before


def test_every_setting_is_read_by_something() -> None:
    """Every key of PPO's own sections is named by the code beside the recipe itself."""
    from baton.ppo_sections import Algorithm, RewardSource, Rollout
    from baton.recipe import EpisodeTrain, PromptData

    root = Path(ppo.__file__).parents[1]
    files = [p for folder in ("stages", "reward", "baton") for p in (root / folder).rglob("*.py")]
    code = "\n".join(p.read_text() for p in files if p.name not in ("recipe.py", "ppo_sections.py"))
    sections = (Algorithm, RewardSource, Rollout, EpisodeTrain, PromptData, PPORecipe)
    keys = {key for section in sections for key in section.model_fields} - {"stage", "model", "name"}
    assert not [key for key in sorted(keys) if f".{key}" not in code and f'"{key}"' not in code]


def test_a_reward_model_with_another_tokenizer_is_loaded_by_itself(
    tiny_chain: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reads the replies as text: the policy's vocabulary has two tokens exchanged, and the scores stay the same."""
    from reward.scoring import score
    from tests.conftest import swap_two_tokens

    chain = tiny_chain.unpublished("ppo", tmp_path)
    ref = chain.republished(swap_two_tokens)
    version = ppo.main(chain.recipe("ppo", f"sft={ref}", "train.steps=1", "data.questions=[]"))
    assert "tiny/reward:1 has a base or tokenizer of its own" in capsys.readouterr().out
    assert set(version.manifest["parents"]) == {"sft", "reward"}
    samples = [json.loads(line) for line in (chain.run_dir("ppo") / "samples.jsonl").read_text().splitlines()]
    model, tokenizer = load_scorer(chain.registry, chain.versions["reward"], "float32")
    prompts = [json.loads(line) for line in (tmp_path / "world" / "prompts_eval.jsonl").read_text().splitlines()]
    for sample in samples:
        (asked,) = [row["prompt"] for row in prompts if row["prompt"] in sample["prompt"]]
        dialogue = [{"role": "user", "content": asked}, {"role": "assistant", "content": sample["after"]}]
        ids = encode_scored(tokenizer, dialogue)
        expected = float(score(model, [ids], int(tokenizer.pad_token_id))[0])
        assert sample["reward"] == pytest.approx(expected, abs=1e-4)
