"""A PPO recipe's sections: what does not go together is refused, and what a reward is called."""

from typing import Any

import pytest
from pydantic import ValidationError

from baton.ppo_sections import Algorithm, RewardSource, Rollout
from baton.recipe import PPORecipe

RECIPE: dict[str, Any] = {
    "stage": "ppo",
    "sft": "t/s:1",
    "reward": "t/r:1",
    "run_dir": "r",
    "publish": {"name": "t/p"},
    "data": {"train": [{"path": "x"}]},
    "rollout": {"max_new_tokens": 4},
    "train": {"steps": 1, "learning_rate": 0.1, "episodes_per_batch": 2},
}

EVAL = {"train": [{"path": "x"}], "eval": [{"path": "y"}]}


@pytest.mark.parametrize(
    ("section", "content", "said"),
    [
        (RewardSource, {}, "exactly one of model, models, classifier, function, url; found none"),
        (RewardSource, {"model": "a/b:1", "url": "http://x"}, "found model, url"),
        (RewardSource, {"model": "a/b:1", "arguments": {"a": 1}}, "arguments are for a function"),
        (RewardSource, {"function": "a:b", "timeout_s": 3}, "timeout_s and retries are for a url"),
        (RewardSource, {"classifier": "c", "batch_size": 3}, "batch_size is for a url or a function"),
        (Rollout, {"max_new_tokens": 4, "engine": "vllm"}, "engine: vllm needs it"),
        (Rollout, {"max_new_tokens": 4, "url": "http://x"}, "no other engine reads it"),
        (Algorithm, {"missing_eos_penalty": -1.0}, "would reward replies that never end"),
        (Algorithm, {"kl_in": "loss"}, "needs kl_estimator k2 or k3"),
        (Algorithm, {"kl_target_nats": 2.0, "kl_coefficient": 0.0}, "must not be zero"),
        (Algorithm, {"clip_ratio_high": 0.1}, "must not be below clip_ratio"),
        (Algorithm, {"dual_clip": 1.0}, "greater than 1"),
        (Algorithm, {"kl_in": "loss", "kl_estimator": "k3", "kl_coefficient": 0.0}, "no KL anywhere"),
        (Algorithm, {"overlong_penalty": 2.0}, "overlong_penalty needs overlong_tokens"),
        (Algorithm, {"kl_horizon_episodes": 100}, "is for an adaptive coefficient"),
        (RewardSource, {"model": "a/b:1", "weight": float("nan")}, "finite number"),
        (RewardSource, {"model": "a/b:1", "models": ["a/b:1", "a/b:2"]}, "found model, models"),
        (RewardSource, {"models": ["a/b:1"]}, "at least 2 items"),
        (RewardSource, {"models": ["a/b:1", "a/b:1"]}, "models names a version twice"),
        (RewardSource, {"function": "a:b", "deviation_penalty": 0.0}, "deviation_penalty is for an ensemble"),
        (RewardSource, {"url": "http://x", "normalise": "sft"}, "it needs model or models"),
        (RewardSource, {"classifier": "c", "length_penalty": "fitted"}, "here give a number per token"),
        (RewardSource, {"model": "a/b:1", "length_penalty": -0.1}, "greater than or equal to 0"),
        (RewardSource, {"model": "a/b:1", "deviation_penalty": 0.5, "weight": -1.0}, "would be a bonus"),
        (RewardSource, {"function": "a:b", "length_penalty": 0.5, "weight": -1.0}, "would be a bonus"),
    ],
)
def test_what_does_not_go_together_is_refused(section: Any, content: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        section.model_validate(content)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reward": [{"model": "a/x:1"}, {"function": "m:x"}]}, "two rewards are both called x"),
        ({"data": {"train": [{"path": "x"}], "ptx": [{"path": "y"}]}}, "need each other"),
        ({"ppo": {"ptx_coefficient": 1.0}}, "need each other"),
        ({"policy": "full", "lora": {}}, "would ignore lora"),
        ({"lora": {"dropout": 0.1}}, "PPO trains without dropout"),
        (
            {"policy": "full", "rollout": {"max_new_tokens": 4, "engine": "vllm", "url": "http://x"}},
            "takes the policy as an adapter",
        ),
        ({"policy": "full", "ppo": {"critic": "shared"}, "publish_value": {"name": "t/v"}}, "no weights of its own"),
        ({"train": {**RECIPE["train"], "eval_every": 2}}, "needs data.eval"),
        ({"gold": {"model": "a/g:1"}}, "needs data.eval"),
        ({"gold": {"model": "a/g:1", "weight": 2.0}, "data": EVAL}, "name and weight would be ignored"),
        ({"train": {**RECIPE["train"], "eval_every": 2}, "data": EVAL}, "eval_every exceeds train.steps"),
        ({"ppo": {"critic_warmup_steps": 1}}, "would never be trained"),
        ({"ppo": {"overlong_tokens": 5}}, "every reply would be overlong"),
    ],
)
def test_keys_that_would_be_ignored_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PPORecipe.model_validate(RECIPE | change)


@pytest.mark.parametrize(
    ("content", "label"),
    [
        ({"model": "team/helpful:candidate"}, "helpful"),
        ({"model": "team/helpful@sha256:" + "0" * 64}, "helpful"),
        ({"classifier": "org/toxicity@main"}, "toxicity"),
        ({"classifier": "/models/toxicity/"}, "toxicity"),
        ({"function": "rules.length:within"}, "within"),
        ({"url": "http://localhost:8000/score/"}, "score"),
        ({"url": "http://localhost:8000/score", "name": "judge"}, "judge"),
        ({"models": ["a/b:1", "a/c:1"]}, "ensemble"),
        ({"models": ["a/b:1", "a/c:1"], "name": "both"}, "both"),
    ],
)
def test_what_a_reward_is_called(content: dict[str, Any], label: str) -> None:
    assert RewardSource.model_validate(content).label == label


def test_a_reference_is_a_list_of_one_reward() -> None:
    assert PPORecipe.model_validate(RECIPE).rewards == [RewardSource(model="t/r:1")]
    listed = PPORecipe.model_validate(RECIPE | {"reward": [{"model": "t/r:1", "weight": 2.0}]})
    assert [(source.model, source.weight) for source in listed.rewards] == [("t/r:1", 2.0)]


def test_which_versions_a_reward_refers_to() -> None:
    assert RewardSource(model="a/b:1").references == ["a/b:1"]
    assert RewardSource(models=["a/b:1", "a/c:1"]).references == ["a/b:1", "a/c:1"]
    assert RewardSource(function="a:b").references == []
