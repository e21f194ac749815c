"""Episodes scored: rewards by component, foreign sources in their order, engines compared, bad numbers refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.decode import Reply
from baton.errors import UserError
from reward.sample import RewardError
from stages.prompts import PromptRow
from stages.references import prompt_key
from stages.rollout import Episode

ROLLOUT = {"max_new_tokens": 6, "temperature": 0.7}
FIRST = {"model": "t/r:1", "name": "r"}
RULE = {"function": "reward.rules:length_window", "name": "short", "weight": -2.0, "arguments": {"at_most": 3}}


def rows_of(episodes: list[Any]) -> list[PromptRow]:
    return [PromptRow([{"role": "user", "content": str(e.index)}], e.prompt, {"answer": e.index}) for e in episodes]


def by_episode(scored: list[Any], pick: Callable[[Any], torch.Tensor]) -> list[float]:
    found = {m: float(v) for s in scored for m, v in zip(s.batch.members, pick(s), strict=False)}
    return [found[at] for at in range(len(found))]


def test_rewards_by_component_and_their_weighted_sum(
    roles: Any, oracle: Any, make_recipe: Any, make_trial: Any, episodes: list[Any]
) -> None:
    recipe = make_recipe(reward=[FIRST | {"weight": 0.5}, RULE])
    found = make_trial(roles, recipe).scorer.score(episodes, rows_of(episodes))
    assert len(found) > 2
    models = [oracle.score(e.prompt, e.reply.ids) for e in episodes]
    short = [float(len(e.reply.ids) <= 3) for e in episodes]
    assert by_episode(found, lambda s: s.rewards["r"]) == pytest.approx(models, abs=1e-8)
    assert by_episode(found, lambda s: s.rewards["short"]) == short
    total = [0.5 * a - 2.0 * b for a, b in zip(models, short, strict=True)]
    assert by_episode(found, lambda s: s.total) == pytest.approx(total, abs=1e-8)
    for scored in found:
        assert scored.weights is None and not scored.gap.any()


def test_a_source_gets_rows_in_their_order_with_everything(
    roles: Any, make_recipe: Any, make_trial: Any, episodes: list[Any]
) -> None:
    trial = make_trial(roles, make_recipe(reward=[FIRST, RULE]))
    seen: list[Any] = []

    class Source:
        label, weight = "short", 1.0

        def score(self, samples: Any) -> list[float]:
            seen.extend(samples)
            return [float(sample.columns["answer"]) for sample in samples]

    trial.scorer.sources["short"] = [Source()]
    found = trial.scorer.score(episodes, rows_of(episodes))
    assert by_episode(found, lambda s: s.rewards["short"]) == [float(e.index) for e in episodes]
    assert [sample.prompt[0]["content"] for sample in seen] == [str(e.index) for e in episodes]
    assert [(s.prompt_ids, s.response_ids) for s in seen] == [(e.prompt, e.reply.ids) for e in episodes]
    assert seen[0].response == " ".join(str(token) for token in episodes[0].reply.ids[:-1]), "without the stop token"


def test_rewards_that_are_no_numbers_stop_with_the_row(
    roles: Any, make_recipe: Any, make_trial: Any, episodes: list[Any]
) -> None:
    trial = make_trial(roles, make_recipe(reward=[FIRST, RULE]))

    class Source:
        label, weight = "short", 1.0

        def score(self, samples: Any) -> list[float]:
            return [float("inf") if at == 2 else 0.0 for at in range(len(samples))]

    plain = trial.scorer.sources["short"]
    trial.scorer.sources["short"] = [Source()]
    with pytest.raises(RewardError, match=r"reward short: it gave inf.*\n  prompt: user: 2\n  response: "):
        trial.scorer.score(episodes, rows_of(episodes))
    trial.scorer.sources["short"] = plain
    with torch.no_grad():
        roles.reward_heads["reward_0"].weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the reward r of '[0-9 ]+' is nan"):
        trial.scorer.score(episodes, rows_of(episodes))


@pytest.fixture(scope="module")
def second_member(role_folders: Any, randomise: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Another reward adapter on the base: its folder, and by peft alone the model in float64."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("second")
    plain = AutoModelForSequenceClassification.from_pretrained(role_folders.base, num_labels=1)
    model = get_peft_model(plain, LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=["v_proj"]))
    randomise(model, 11).save_pretrained(folder)
    model.double().eval().config.pad_token_id = 2
    return folder, model


PAIR = {"models": ["t/r:1", "t/r:2"], "name": "r"}


@pytest.fixture
def members(oracle: Any, second_member: Any, episodes: list[Any]) -> list[tuple[float, float]]:
    """What both members say of each episode, by separate models."""
    found = []
    for e in episodes:
        with torch.no_grad():
            given = torch.tensor([e.prompt + e.reply.ids])
            theirs = second_member[1](input_ids=given, use_cache=False).logits
        found.append((oracle.score(e.prompt, e.reply.ids), float(theirs)))
    return found


@pytest.mark.parametrize("budget", [1, 16, 1000])
def test_an_ensemble_is_its_mean_less_its_deviation(
    budget: int, make_roles: Any, make_recipe: Any, make_trial: Any, episodes: list[Any], role_folders: Any,
    second_member: Any, members: list[tuple[float, float]],
) -> None:  # fmt: skip
    """Of two members the population deviation is half their distance. Whatever the micro-batches are."""
    roles = make_roles(rewards={"r": [role_folders.reward, second_member[0]]})
    setting = PAIR | {"deviation_penalty": 1.5, "weight": 2.0}
    recipe = make_recipe(reward=[setting], train={"tokens_per_micro_batch": budget})
    trial = make_trial(roles, recipe)
    assert trial.scorer.details == ["r/shaped", "r/deviation", "r/member_0", "r/member_1"]
    found = trial.scorer.score(episodes, rows_of(episodes))
    mean, half = [(a + b) / 2 for a, b in members], [abs(a - b) / 2 for a, b in members]
    shaped = [m - 1.5 * h for m, h in zip(mean, half, strict=True)]
    assert max(half) > 0.1
    assert by_episode(found, lambda s: s.rewards["r"]) == pytest.approx(mean, abs=1e-8)
    assert by_episode(found, lambda s: s.details["r/deviation"]) == pytest.approx(half, abs=1e-8)
    assert by_episode(found, lambda s: s.details["r/member_1"]) == pytest.approx([b for _, b in members], abs=1e-8)
    assert by_episode(found, lambda s: s.details["r/shaped"]) == pytest.approx(shaped, abs=1e-8)
    assert by_episode(found, lambda s: s.total) == pytest.approx([2 * s for s in shaped], abs=1e-8)


def test_an_ensemble_without_a_penalty_is_its_mean(
    make_roles: Any, make_recipe: Any, make_trial: Any, episodes: list[Any], role_folders: Any, second_member: Any,
    members: list[tuple[float, float]],
) -> None:  # fmt: skip
    roles = make_roles(rewards={"r": [role_folders.reward, second_member[0]]})
    trial = make_trial(roles, make_recipe(reward=[PAIR]))
    assert trial.scorer.details == ["r/deviation", "r/member_0", "r/member_1"]
    found = trial.scorer.score(episodes, rows_of(episodes))
    assert by_episode(found, lambda s: s.total) == pytest.approx([(a + b) / 2 for a, b in members], abs=1e-8)


def test_length_reference_and_scale_in_their_order(
    roles: Any, oracle: Any, make_recipe: Any, make_trial: Any, episodes: list[Any]
) -> None:
    """Each prompt's reference scored 0.1 times the episode's number, less length already."""
    setting = FIRST | {"length_penalty": "fitted", "shape": "reference", "normalise": "sft", "weight": 0.5}
    records = {"sft/score_mean": 3.0, "sft/score_deviation": 2.0, "length/slope": 0.3, "length/mean": 4.0}
    trial = make_trial(roles, make_recipe(reward=[setting]), metrics=records)
    rows = rows_of(episodes)
    with pytest.raises(KeyError):
        trial.scorer.score(episodes, rows)
    trial.scorer.references.scores = {prompt_key(row): {"r": [0.1 * at]} for at, row in enumerate(rows)}
    found = trial.scorer.score(episodes, rows)
    models = [oracle.score(e.prompt, e.reply.ids) for e in episodes]
    shaped = [
        (score - 0.3 * (len(e.reply.ids) - 4.0) - 0.1 * at) / 2.0
        for at, (score, e) in enumerate(zip(models, episodes, strict=True))
    ]
    assert by_episode(found, lambda s: s.rewards["r"]) == pytest.approx(models, abs=1e-8)
    assert by_episode(found, lambda s: s.details["r/shaped"]) == pytest.approx(shaped, abs=1e-8)
    assert by_episode(found, lambda s: s.total) == pytest.approx([s / 2 for s in shaped], abs=1e-8)


def test_a_rule_is_shaped_too(roles: Any, make_recipe: Any, make_trial: Any, episodes: list[Any]) -> None:
    rule = RULE | {"weight": 1.0, "length_penalty": 0.25}
    found = make_trial(roles, make_recipe(reward=[rule])).scorer.score(episodes, rows_of(episodes))
    expected = [float(len(e.reply.ids) <= 3) - 0.25 * len(e.reply.ids) for e in episodes]
    assert by_episode(found, lambda s: s.total) == pytest.approx(expected)


def engines(episodes: list[Any], old: list[list[float]], shift: Callable[[int], float]) -> list[Any]:
    """Episodes whose engine's log-probabilities are `shift` from the trainer's."""
    return [
        Episode(e.index, e.prompt, Reply(e.reply.ids, e.reply.ended, [p + shift(at) for at, p in enumerate(row)]))
        for e, row in zip(episodes, old, strict=True)
    ]


def test_an_engine_that_samples_from_another_policy_is_stopped(
    roles: Any, oracle: Any, make_recipe: Any, make_trial: Any, episodes: list[Any]
) -> None:
    with torch.no_grad():
        old = [oracle.logprobs(oracle.policy, e.prompt, e.reply.ids, 0.7).tolist() for e in episodes]
    trial = make_trial(roles, make_recipe(rollout=ROLLOUT | {"drift_nats": 0.1}))
    near = engines(episodes, old, lambda at: 0.09)
    batches = trial.scorer.score(near, rows_of(episodes))
    for scored in batches:
        gap = scored.gap[scored.batch.is_response]
        torch.testing.assert_close(gap, torch.full_like(gap, 0.09), rtol=0, atol=1e-8)
        assert not scored.gap[~scored.batch.is_response].any()
    trial.scorer.check_agreement(batches, 0.09)
    for shift in (lambda at: 0.11, lambda at: float("nan") if at == 0 else 0.0):
        batches = trial.scorer.score(engines(episodes, old, shift), rows_of(episodes))
        mean = float(torch.cat([scored.gap[scored.batch.is_response] for scored in batches]).mean())
        with pytest.raises(UserError, match="the rollout engine and the trainer disagree"):
            trial.scorer.check_agreement(batches, mean)


def test_importance_weights_of_an_engine(
    roles: Any, oracle: Any, make_recipe: Any, make_trial: Any, episodes: list[Any]
) -> None:
    """The trainer finds what was sampled e^0.05 and e^-0.05 times as likely as the engine; the cap is 1.02."""
    with torch.no_grad():
        old = [oracle.logprobs(oracle.policy, e.prompt, e.reply.ids, 0.7).tolist() for e in episodes]
    trial = make_trial(roles, make_recipe(rollout=ROLLOUT | {"importance_cap": 1.02, "drift_nats": 0.1}))
    given = engines(episodes, old, lambda at: 0.05 if at % 2 else -0.05)
    for scored in trial.scorer.score(given, rows_of(episodes)):
        for row, count in zip(scored.weights, scored.batch.is_response.sum(-1).tolist(), strict=True):
            expected = [1.02 if at % 2 == 0 else 0.951229424500714 for at in range(count)]
            assert row[:count].tolist() == pytest.approx(expected, abs=1e-8)


def test_a_reward_called_gold_is_refused(roles: Any, make_recipe: Any, make_trial: Any) -> None:
    with pytest.raises(UserError, match="a reward is called gold"):
        make_trial(roles, make_recipe(reward=[FIRST | {"name": "gold"}]))
