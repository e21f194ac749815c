"""One whole PPO step against a slow and obvious one, what it must not depend on, and its checks."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from baton.decode import Reply
from baton.recipe import PPORecipe
from stages import update as module
from stages.roles import POLICY, VALUE, Cast, Roles
from stages.rollout import Episode
from stages.update import make_optimizer, set_learning_rates

TEMPERATURE = 0.7
TIGHT = {"rtol": 0.0, "atol": 1e-8}

PTX = [
    ([5, 9, 1, 7, 8], [False, False, True, True, True]),
    ([3, 4], [True, True]),
    ([11, 12, 13, 14, 15, 16, 17], [True] * 7),
    ([2, 1, 40, 1], [False, True, False, True]),
]
EVERYTHING: dict[str, Any] = {
    "kl_in": "loss",
    "kl_estimator": "k3",
    "entropy_coefficient": 0.05,
    "dual_clip": 1.05,
    "clip_ratio_high": 0.3,
    "missing_eos": "replace",
    "overlong_tokens": 3,
    "overlong_penalty": 0.7,
    "normalise_reward": True,
    "clip_reward": 1.1,
    "score_after_eos": True,
}
REWARDS: list[dict[str, Any]] = [
    {"model": "t/r:1", "name": "r", "weight": 0.7},
    {"function": "reward.rules:length_window", "weight": -0.5, "arguments": {"at_most": 3, "fade": 4}},
]
ENGINE = {"max_new_tokens": 6, "temperature": TEMPERATURE, "importance_cap": 1.1, "drift_nats": 5.0}


class SlowPPO:
    """The same step by plain loops over episodes and tokens, on separate models."""

    def __init__(
        self, oracle: Any, episodes: Sequence[Any], recipe: PPORecipe, ptx: Sequence[Any] = (), longest: int = 6
    ) -> None:
        self.oracle, self.recipe, self.settings, self.ptx = oracle, recipe, recipe.ppo, ptx
        self.episodes, self.longest = episodes, longest
        self.rows = [(episode.prompt, episode.reply.ids) for episode in episodes]
        with torch.no_grad():
            old = [oracle.all_of(*self.rows[at], TEMPERATURE, self.after(at)) for at in range(len(episodes))]
            reference = [oracle.logprobs(oracle.reference, *row, TEMPERATURE) for row in self.rows]
        self.old, self.old_values = [row[0].tolist() for row in old], [row[2].tolist() for row in old]
        self.reference = [row.tolist() for row in reference]
        self.totals = [self.total(at) for at in range(len(episodes))]
        self.scores = [self.shaped(at) for at in range(len(episodes))]
        raw = [self.advantages(at) for at in range(len(episodes))]
        self.returns = [
            [a + v for a, v in zip(row, values, strict=True)] for row, values in zip(raw, self.old_values, strict=True)
        ]
        actions = [a for row, old_row in zip(raw, self.old, strict=True) for a in row[: len(old_row)]]
        mean, deviation = sum(actions) / len(actions), spread(actions)
        self.weighing = [[(a - mean) / (deviation + 1e-8) for a in row] for row in raw]
        if not self.settings.whiten_advantages:
            self.weighing = raw
        self.sums = dict.fromkeys(("policy", "value", "clipped", "value_clipped", "kl", "tokens", "states"), 0.0)
        self.seen = dict.fromkeys(("dual", "low", "high", "capped"), 0)
        self.gradients: list[list[torch.Tensor]] = []

    def after(self, at: int) -> bool:
        """Whether the state after the reply's end is one."""
        return self.settings.score_after_eos and self.episodes[at].reply.ended

    def total(self, at: int) -> float:
        """The weighted sum of the rewards; the second is 1 up to three tokens and falls to 0 at seven."""
        total = 0.0
        for source in self.recipe.rewards:
            if source.model:
                total += source.weight * self.oracle.score(*self.rows[at])
            else:
                total += source.weight * max(0.0, 1 - max(0, len(self.rows[at][1]) - 3) / 4)
        return total

    def shaped(self, at: int) -> float:
        settings, ended = self.settings, self.episodes[at].reply.ended
        score = self.totals[at]
        if settings.normalise_reward:
            score /= spread(self.totals)
        if settings.clip_reward is not None:
            score = min(max(score, -settings.clip_reward), settings.clip_reward)
        if settings.overlong_tokens is not None:
            allowed = self.longest - settings.overlong_tokens
            beyond = max(0, len(self.rows[at][1]) - allowed)
            score -= settings.overlong_penalty * min(1.0, beyond / settings.overlong_tokens)
        if not ended:
            replaced = settings.missing_eos == "replace"
            score = (0.0 if replaced else score) - settings.missing_eos_penalty
        return score

    def advantages(self, at: int) -> list[float]:
        """The sum over what follows of (gamma lambda)^l times each temporal difference."""
        settings, values = self.settings, self.old_values[at]
        rewards = [0.0] * len(values)
        if settings.kl_in == "reward":
            for t, (ours, theirs) in enumerate(zip(self.old[at], self.reference[at], strict=True)):
                rewards[t] = -settings.kl_coefficient * self.divergence(double(ours), theirs).item()
        rewards[-1] += self.scores[at]
        later = [*values[1:], 0.0]
        deltas = [r + settings.gamma * after - v for r, after, v in zip(rewards, later, values, strict=True)]
        decay = settings.gamma * settings.lam
        return [sum(decay**step * delta for step, delta in enumerate(deltas[t:])) for t in range(len(deltas))]

    def divergence(self, ours: torch.Tensor, theirs: float) -> torch.Tensor:
        gap = ours - theirs
        if self.settings.kl_estimator == "k1":
            return gap
        return gap * gap / 2 if self.settings.kl_estimator == "k2" else (-gap).exp() - 1 + gap

    def loss(self, members: range) -> torch.Tensor:
        """Of one minibatch: the policy's a mean over its tokens, the critic's over its states."""
        settings = self.settings
        policy, critic = torch.zeros(2, dtype=torch.float64)
        reach = settings.clip_value * spread(self.scores)
        tokens, states = 0, 0
        high = settings.clip_ratio if settings.clip_ratio_high is None else settings.clip_ratio_high
        for at in members:
            new, entropies, values = self.oracle.all_of(*self.rows[at], TEMPERATURE, self.after(at))
            engine = self.episodes[at].reply.logprobs or self.old[at]
            for t in range(len(new)):
                ratio, advantage = (new[t] - self.old[at][t]).exp(), self.weighing[at][t]
                bounded = ratio.clamp(1 - settings.clip_ratio, 1 + high)
                gain = torch.minimum(ratio * advantage, bounded * advantage)
                is_clipped = bool(bounded * advantage < ratio * advantage)
                self.seen["low"] += is_clipped and advantage < 0
                self.seen["high"] += is_clipped and advantage > 0
                if settings.dual_clip and advantage < 0 and float(gain) < settings.dual_clip * advantage:
                    gain, is_clipped = double(settings.dual_clip * advantage), True
                    self.seen["dual"] += 1
                if self.recipe.rollout.importance_cap:
                    trust = math.exp(self.old[at][t] - engine[t])
                    self.seen["capped"] += trust > self.recipe.rollout.importance_cap
                    gain = gain * min(trust, self.recipe.rollout.importance_cap)
                policy = policy - gain
                self.sums["policy"] -= float(gain)
                self.sums["clipped"] += is_clipped
                self.sums["kl"] += float(ratio - 1 - ratio.log())
                if settings.kl_in == "loss":
                    policy = policy + settings.kl_coefficient * self.divergence(new[t], self.reference[at][t])
                policy = policy - settings.entropy_coefficient * entropies[t]
                tokens += 1
            for t in range(len(values)):
                old_value, goal = self.old_values[at][t], self.returns[at][t]
                near = old_value + (values[t] - old_value).clamp(-reach, reach)
                error = 0.5 * torch.maximum((values[t] - goal) ** 2, (near - goal) ** 2)
                critic = critic + error
                self.sums["value"] += float(error)
                self.sums["value_clipped"] += bool((near - goal) ** 2 > (values[t] - goal) ** 2)
                states += 1
        self.sums["tokens"] += tokens
        self.sums["states"] += states
        return policy / tokens + settings.value_coefficient * critic / states

    def ptx_loss(self) -> torch.Tensor:
        """Every row once in every minibatch: there are as many as episodes in one."""
        losses = []
        for ids, in_loss in self.ptx:
            found = self.oracle.logprobs(self.oracle.policy, ids[:1], ids[1:], 1.0)
            losses += [-logprob for logprob, chosen in zip(found, in_loss[1:], strict=True) if chosen]
        return self.settings.ptx_coefficient * sum(losses) / len(losses)

    def run(self) -> None:
        """Two epochs of two minibatches, contiguous, in the same order each time."""
        train = self.recipe.train
        groups = self.oracle.groups()
        assert train.critic_learning_rate
        rates = (train.learning_rate / 2, train.critic_learning_rate / 2)
        optimizer = torch.optim.AdamW(
            [{"params": group, "lr": rate} for group, rate in zip(groups, rates, strict=True)],
            betas=(0.9, train.adam_beta2),
            eps=1e-5,
            weight_decay=train.weight_decay,
        )
        parameters = groups[0] + groups[1]
        for _ in range(2):
            for members in (range(0, 4), range(4, 8)):
                optimizer.zero_grad()
                if self.ptx:
                    self.ptx_loss().backward()
                self.loss(members).backward()
                self.gradients.append([p.grad.clone() for p in parameters])
                norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters))
                assert norm > train.max_grad_norm, "the clip should be active"
                for parameter in parameters:
                    parameter.grad *= train.max_grad_norm / (norm + 1e-6)
                optimizer.step()


def double(number: float) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.float64)


def spread(numbers: list[float]) -> float:
    mean = sum(numbers) / len(numbers)
    return math.sqrt(sum((number - mean) ** 2 for number in numbers) / len(numbers))


def trained(roles: Roles) -> list[torch.Tensor]:
    """The roles' parameters in the order of the oracle's."""

    def adapter(role: str) -> list[torch.Tensor]:
        return [factor for addition in roles.additions(role) for factor in (addition.down, addition.up)]

    cast = roles.cast
    policy = list(roles.policy_model.parameters()) if cast.policy == "full" else adapter(POLICY)
    if cast.critic == "separate":
        return policy + list(roles.value_model.parameters())
    return policy + (adapter(VALUE) if cast.critic == "adapter" else []) + [roles.value_head.weight]


def with_gradients(trial: Any) -> list[list[torch.Tensor]]:
    """A list that fills with the gradients of every optimizer step, before they are clipped."""
    found: list[list[torch.Tensor]] = []
    step = trial.updater.step

    def recorded(warming: bool) -> Any:
        found.append([p.grad.clone() for p in trained(trial.roles)])
        return step(warming)

    trial.updater.step = recorded
    return found


def sampled_elsewhere(oracle: Any, episodes: list[Any]) -> list[Any]:
    """Episodes whose engine had somewhat other log-probabilities."""
    made = []
    for episode in episodes:
        with torch.no_grad():
            exact = oracle.logprobs(oracle.policy, episode.prompt, episode.reply.ids, TEMPERATURE).tolist()
        given = [logprob + 0.3 * math.sin(5 * at + episode.index) for at, logprob in enumerate(exact)]
        made.append(Episode(episode.index, episode.prompt, Reply(episode.reply.ids, episode.reply.ended, given)))
    return made


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "critic adapter": ({}, {}, False),
    "critic shared": ({"critic": "shared"}, {}, False),
    "critic separate": ({"critic": "separate"}, {}, False),
    "policy full": ({}, {"policy": "full"}, False),
    "policy full, critic shared": ({"critic": "shared"}, {"policy": "full"}, False),
    "k2, not whitened": ({"kl_estimator": "k2", "whiten_advantages": False}, {}, False),
    "k3 in the reward": ({"kl_estimator": "k3", "score_after_eos": True}, {}, False),
    "everything": (EVERYTHING, {}, True),
    "everything, critic shared": (EVERYTHING | {"critic": "shared"}, {}, True),
}


@pytest.mark.parametrize("case", CASES)
def test_one_step_equals_a_slow_and_obvious_one(
    case: str,
    make_roles: Callable[..., Roles],
    make_oracle: Callable[..., Any],
    make_recipe: Callable[..., PPORecipe],
    make_trial: Callable[..., Any],
    episodes: list[Any],
) -> None:
    """Gradients of all four optimizer steps, the parameters after them, and the figures."""
    settings, more, everything = CASES[case]
    policy, critic = more.get("policy", "adapter"), settings.get("critic", "adapter")
    if everything:
        settings = settings | {"ptx_coefficient": 0.6}
        more = more | {"data": {"train": [{"path": "x"}], "ptx": [{"path": "y"}]}, "reward": REWARDS, "rollout": ENGINE}
    recipe = make_recipe(settings, **more)
    roles, oracle = make_roles(policy=policy, critic=critic), make_oracle(policy, critic)
    given, ptx = (sampled_elsewhere(oracle, episodes), PTX) if everything else (episodes, [])
    slow = SlowPPO(oracle, given, recipe, ptx)
    slow.run()
    trial = make_trial(roles, recipe, ptx)
    gradients = with_gradients(trial)
    start = [p.detach().clone() for p in trained(roles)]
    figures = trial.update(trial.score(given))

    assert len(gradients) == len(slow.gradients) == figures["optimizer_steps"] == 4
    for found, expected in zip(gradients, slow.gradients, strict=True):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.view_as(theirs), theirs, **TIGHT)
    for ours, theirs in zip(trained(roles), sum(oracle.groups(), []), strict=True):
        torch.testing.assert_close(ours.detach().view_as(theirs), theirs.detach(), **TIGHT)
    assert max(float((p - before).abs().max()) for p, before in zip(trained(roles), start, strict=True)) > 0.01

    sums = slow.sums
    assert figures["loss/policy"] == pytest.approx(sums["policy"] / sums["tokens"], abs=1e-9)
    assert figures["loss/value"] == pytest.approx(sums["value"] / sums["states"], abs=1e-9)
    assert figures["clip_fraction/policy"] == pytest.approx(sums["clipped"] / sums["tokens"])
    assert figures["clip_fraction/value"] == pytest.approx(sums["value_clipped"] / sums["states"])
    assert figures["approx_kl_nats"] == pytest.approx(sums["kl"] / sums["tokens"], abs=1e-9)
    assert sums["clipped"] and sums["value_clipped"], "both clips should be active"
    if everything:
        assert all(slow.seen.values()), f"a setting was never active: {slow.seen}"


@pytest.fixture(params=["adapter", "shared"])
def everything(request: pytest.FixtureRequest, make_recipe: Callable[..., PPORecipe]) -> Callable[..., PPORecipe]:
    """A recipe with all settings on, by its token budget a micro-batch; for two critics."""

    def make(budget: int) -> PPORecipe:
        settings = EVERYTHING | {"critic": request.param, "ptx_coefficient": 0.6}
        data = {"train": [{"path": "x"}], "ptx": [{"path": "y"}]}
        return make_recipe(settings, {"tokens_per_micro_batch": budget}, data=data, reward=REWARDS)

    return make


def test_what_an_update_does_not_depend_on(
    everything: Callable[..., PPORecipe],
    make_roles: Callable[..., Roles],
    make_trial: Callable[..., Any],
    episodes: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Token budget, grouping, pad id, order within a minibatch, and blank micro-batches."""
    first = make_roles(critic=everything(16).ppo.critic)

    def updated(budget: int, order: Sequence[int] = range(8), pad_id: int = 2) -> tuple[Any, Any, int]:
        trial = make_trial(copy.deepcopy(first), everything(budget), PTX, pad_id)
        minibatches = trial.score([episodes[at] for at in order])
        return trial.update(minibatches), trial.parameters(), len(minibatches[0])

    figures, parameters, count = updated(16)
    assert count == 2

    def check(what: str, found: tuple[Any, Any, int], micro_batches: int) -> None:
        assert found[2] == micro_batches, what
        assert found[0] == pytest.approx(figures, abs=1e-8), what
        for name, parameter in parameters.items():
            torch.testing.assert_close(found[1][name], parameter, **TIGHT, msg=lambda m: f"{what}: {m}")

    check("one row each", updated(1), 4)
    check("all in one", updated(10_000), 1)
    check("pad = eos", updated(16, pad_id=1), 2)
    check("order", updated(16, [2, 0, 3, 1, 7, 6, 4, 5]), 2)
    with monkeypatch.context() as patch:
        patch.setattr("stages.scoring.group_by_length", lambda *_: [[1, 2], [3, 0]])
        check("grouping", updated(16), 2)
    with monkeypatch.context() as patch:
        # as on a rank beside one that has five micro-batches: both are split, and one is blank
        patch.setattr("stages.sharding.Spread.maximum", lambda self, number: 5)
        check("blank micro-batches", updated(16), 5)


@pytest.mark.parametrize("critic", ["adapter", "shared", "separate"])
@pytest.mark.parametrize("budget", [16, 10_000])
def test_a_forward_pass_of_scoring_is_as_good_as_one_of_the_update(
    make_roles: Callable[..., Roles],
    make_recipe: Callable[..., PPORecipe],
    make_trial: Callable[..., Any],
    episodes: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    critic: str,
    budget: int,
) -> None:
    """The same bits, by one pass of the policy with a graph less."""
    recipe = make_recipe(
        EVERYTHING | {"critic": critic, "minibatches": 1}, {"tokens_per_micro_batch": budget}, reward=REWARDS
    )
    first = make_roles(critic=critic)
    first.join()
    passes: list[bool] = []
    plain = Roles._at_responses

    def counted(*given: Any, **more: Any) -> Any:
        passes.append(torch.is_grad_enabled())
        return plain(*given, **more)

    monkeypatch.setattr(Roles, "_at_responses", counted)

    def updated(keep_graph: bool) -> tuple[Any, ...]:
        roles = make_roles(critic=critic)
        roles.load_state_dict(first.state_dict())
        roles.join()
        trial = make_trial(roles, recipe)
        passes.clear()
        minibatches = trial.score(episodes, keep_graph=keep_graph)
        order = [scored.batch.members for scored in minibatches[0]]
        kept = [scored.forward is not None for scored in minibatches[0]]
        assert kept == [keep_graph] + [False] * (len(order) - 1)
        assert not any(
            scored.old_logprobs.requires_grad or scored.old_values.requires_grad for scored in minibatches[0]
        )
        figures = trial.update(minibatches)
        assert not any(scored.forward for scored in minibatches[0]), "its graph is used up"
        return figures, trial.parameters(), order, sum(passes), len(passes)

    figures, parameters, order, with_graph, passed = updated(False)
    again, found, same_order, with_graph_again, passed_again = updated(True)
    assert with_graph_again == with_graph and passed_again == passed - 1
    assert (again, same_order) == (figures, order)
    assert all(torch.equal(found[name], parameter) for name, parameter in parameters.items())


def test_which_updates_begin_with_a_pass_of_scoring(
    make_roles: Callable[..., Roles], make_recipe: Callable[..., PPORecipe], make_trial: Callable[..., Any]
) -> None:
    roles = make_roles()
    once = {"minibatches": 1}
    assert make_trial(roles, make_recipe(once)).updater.continues_scoring(0)
    assert not make_trial(roles, make_recipe()).updater.continues_scoring(0), "the second minibatch has other weights"
    warming = make_trial(roles, make_recipe(once | {"critic_warmup_steps": 2})).updater
    assert [warming.continues_scoring(step) for step in (1, 2)] == [False, True]
    mixed = make_recipe(once | {"ptx_coefficient": 0.6}, data={"train": [{"path": "x"}], "ptx": [{"path": "y"}]})
    assert not make_trial(roles, mixed, PTX).updater.continues_scoring(0)
    trial = make_trial(roles, make_recipe(once))
    trial.updater.spread.plugin, trial.updater.spread.world = object(), 2
    assert not trial.updater.continues_scoring(0), "sharded"


def test_bfloat16_within_bounds(
    role_folders: Any,
    make_roles: Callable[..., Roles],
    make_recipe: Callable[..., PPORecipe],
    make_trial: Callable[..., Any],
    episodes: list[Any],
) -> None:
    """The first gradient in bfloat16: near float64's, and nearer to itself under another grouping."""

    def gradient(dtype: torch.dtype, budget: int) -> torch.Tensor:
        base, sft, reward = role_folders
        cast = Cast(base=base, sft=sft, rewards={"r": [reward]}, critic_start=reward)
        roles = make_roles() if dtype is torch.float64 else Roles(cast, dtype, TEMPERATURE)
        trial = make_trial(roles, make_recipe({"epochs": 1}, {"tokens_per_micro_batch": budget}))
        found = with_gradients(trial)
        trial.update(trial.score(episodes))
        assert all(p.dtype is not torch.bfloat16 for p in trained(roles))
        return torch.cat([g.double().flatten() for g in found[0]])

    exact = gradient(torch.float64, 16)
    found = [gradient(torch.bfloat16, budget) for budget in (16, 1, 10_000)]
    for one in found:
        assert float((one - exact).norm() / exact.norm()) < 0.15
        assert float((one - found[0]).norm() / exact.norm()) < 0.02


def test_a_step_without_any_setting_that_moves_is_the_plain_policy_gradient(
    make_roles: Callable[..., Roles],
    make_recipe: Callable[..., PPORecipe],
    make_trial: Callable[..., Any],
    episodes: list[Any],
) -> None:
    """Before the first update the ratio is one: the gradient is that of -sum(advantage x log p) / tokens."""
    recipe = make_recipe({"epochs": 1, "minibatches": 1})
    roles = make_roles()
    trial = make_trial(roles, recipe)
    gradients = with_gradients(trial)
    minibatches = trial.score(episodes)
    trial.update(minibatches)
    other = make_roles()
    tokens = sum(len(episode.reply.ids) for episode in episodes)
    for scored in minibatches[0]:
        loss = -(scored.advantages * other.policy(scored.batch).logprobs)[scored.batch.is_response].sum() / tokens
        loss.backward()
    for mine, plain in zip(gradients[0][:28], trained(other)[:28], strict=True):
        torch.testing.assert_close(mine, plain.grad, **TIGHT)


def test_the_ratio_check_raises_when_old_logprobs_are_off(
    roles: Roles, make_recipe: Callable[..., PPORecipe], make_trial: Callable[..., Any], episodes: list[Any]
) -> None:
    trial = make_trial(roles, make_recipe())
    minibatches = trial.score(episodes)
    minibatches[0][1].old_logprobs[0, 0] += 1e-3
    before = trial.parameters()
    with pytest.raises(RuntimeError, match=r"max\|ratio - 1\| is 0.001, above 1e-08"):
        trial.update(minibatches)
    assert all(torch.equal(p, before[name]) for name, p in trial.parameters().items())


def test_a_gradient_that_is_no_number_raises_before_the_step(
    roles: Roles, make_recipe: Callable[..., PPORecipe], make_trial: Callable[..., Any], episodes: list[Any]
) -> None:
    trial = make_trial(roles, make_recipe())
    minibatches = trial.score(episodes)
    minibatches[0][0].advantages[0, 0] = float("inf")
    before = trial.parameters()
    with pytest.raises(FloatingPointError, match="gradient norm"):
        trial.update(minibatches)
    assert all(torch.equal(p, before[name]) for name, p in trial.parameters().items())


def test_the_kl_stop_ends_the_update_and_takes_no_further_step(
    make_roles: Callable[..., Roles],
    make_recipe: Callable[..., PPORecipe],
    make_trial: Callable[..., Any],
    episodes: list[Any],
) -> None:
    """Stopped at the third minibatch: the weights are those after two steps."""

    def updated(epochs: int, limit: float | None) -> tuple[dict[str, float], Any]:
        recipe = make_recipe({"epochs": epochs, "kl_minibatch_stop_nats": limit})
        trial = make_trial(make_roles(), recipe)
        return trial.update(trial.score(episodes)), trial.parameters()

    free, moved = updated(2, None)
    assert free["optimizer_steps"] == 4 and free["stopped_by_kl"] == 0.0
    one_epoch, after_two = updated(1, None)
    # no divergence in the first minibatch, all in the second, which has half of the tokens: the third is beyond it
    stopped, found = updated(2, 2.1 * one_epoch["approx_kl_nats"])
    assert stopped["optimizer_steps"] == 2 and stopped["stopped_by_kl"] == 1.0
    assert all(torch.equal(found[name], p) for name, p in after_two.items())
    assert any(not torch.equal(found[name], p) for name, p in moved.items())
    assert stopped["loss/policy"] == one_epoch["loss/policy"], "figures are of the steps that were taken"


@pytest.mark.parametrize("critic", ["adapter", "shared", "separate"])
def test_critic_warm_up_moves_the_critic_alone(
    make_roles: Callable[..., Roles],
    make_recipe: Callable[..., PPORecipe],
    make_trial: Callable[..., Any],
    episodes: list[Any],
    critic: str,
) -> None:
    roles = make_roles(critic=critic)
    data = {"train": [{"path": "x"}], "ptx": [{"path": "y"}]}
    recipe = make_recipe({"critic": critic, "critic_warmup_steps": 2, "ptx_coefficient": 0.5}, data=data)
    trial = make_trial(roles, recipe, PTX)
    for step in (0, 1):
        before = trial.parameters()
        figures = trial.update(trial.score(episodes), step)
        assert "loss/policy" not in figures and "loss/ptx" not in figures and figures["loss/value"] > 0
        for name, parameter in trial.parameters().items():
            assert torch.equal(parameter, before[name]) != roles.is_critics(name), name
    before = trial.parameters()
    assert trial.update(trial.score(episodes), 2)["loss/policy"] is not None
    assert not any(torch.equal(parameter, before[name]) for name, parameter in trial.parameters().items())


def test_learning_rates_are_a_function_of_the_step(roles: Roles, make_recipe: Callable[..., PPORecipe]) -> None:
    def rates(schedule: str, step: int) -> list[float]:
        recipe = make_recipe(train={"schedule": schedule})
        optimizer = make_optimizer(roles, recipe)
        set_learning_rates(optimizer, recipe, 7)  # whatever was before
        set_learning_rates(optimizer, recipe, step)
        return [group["lr"] for group in optimizer.param_groups]

    assert rates("cosine", 0) == pytest.approx([0.01, 0.025])
    assert rates("cosine", 1) == rates("cosine", 2) == pytest.approx([0.02, 0.05])
    assert rates("cosine", 6) == pytest.approx([0.01, 0.025])  # half of the way from step 2 to 10, on a cosine
    assert rates("cosine", 4) == pytest.approx([0.02 * 0.5 * (1 + math.sqrt(0.5)), 0.05 * 0.5 * (1 + math.sqrt(0.5))])
    assert rates("linear", 4) == pytest.approx([0.015, 0.0375])
    assert rates("constant", 9) == pytest.approx([0.02, 0.05])


def test_policy_and_critic_have_groups_of_their_own(
    make_roles: Callable[..., Roles], make_recipe: Callable[..., PPORecipe]
) -> None:
    recipe = make_recipe(train={"critic_learning_rate": None})
    for critic, count in (("adapter", 29), ("shared", 1), ("separate", 21)):
        roles = make_roles(critic=critic)
        optimizer = make_optimizer(roles, recipe)
        assert [len(group["params"]) for group in optimizer.param_groups] == [28, count]
        assert [group["peak"] for group in optimizer.param_groups] == [0.02, 0.02], "no rate of its own: the policy's"
        everything = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert everything == {id(p) for p in roles.trained_parameters().values()}
        group = optimizer.param_groups[0]
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-5, 0.1)


def test_the_norm_is_of_policy_and_critic_together(
    roles: Roles, make_recipe: Callable[..., PPORecipe], make_trial: Callable[..., Any]
) -> None:
    trial = make_trial(roles, make_recipe(train={"max_grad_norm": 0.5}))
    for name, parameter in roles.trained_parameters().items():
        parameter.grad = torch.zeros_like(parameter)
        if name == "value_head.weight":
            parameter.grad.view(-1)[0] = 4.0
    next(iter(roles.additions(POLICY))).down.grad.view(-1)[0] = 3.0
    norms = trial.updater.step(False)
    assert norms == (3.0, 4.0)
    assert float(roles.value_head.weight.grad.view(-1)[0]) == pytest.approx(4.0 * 0.5 / 5.0, rel=1e-5)


def test_mixed_in_text_is_a_function_of_seed_and_turn(
    make_roles: Callable[..., Roles],
    make_recipe: Callable[..., PPORecipe],
    make_trial: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every row once an epoch; the loss is the mean over the tokens in the loss, at temperature 1."""
    data = {"train": [{"path": "x"}], "ptx": [{"path": "y"}]}
    seen: list[list[int]] = []
    plain = module.make_text_batch

    def watched(rows: Any, group: list[int], pad_id: int) -> Any:
        seen[-1] += [rows[at][0][0] for at in group]
        return plain(rows, group, pad_id)

    monkeypatch.setattr(module, "make_text_batch", watched)
    roles = make_roles()

    def losses(seed: int) -> list[float]:
        recipe = make_recipe({"ptx_coefficient": 0.5}, {"seed": seed}, data=data)
        trial = make_trial(roles, recipe, PTX)
        found = []
        for turn in range(4):
            seen.append([])
            found.append(trial.updater.add_ptx(turn, 2))
        return found

    first, again, others = losses(1), losses(1), [losses(seed) for seed in (2, 3, 4)]
    assert first == again and any(first != other for other in others)
    for epoch in (seen[0] + seen[1], seen[2] + seen[3], seen[8] + seen[9]):
        assert sorted(epoch) == sorted(ids[0] for ids, _ in PTX)
    with torch.no_grad():
        batch = plain(PTX, [0, 1, 2, 3], 2)
        logprobs = roles.policy(batch, temperature=1.0).logprobs
        everything = make_trial(roles, make_recipe({"ptx_coefficient": 0.5}, data=data), PTX)
    assert everything.updater.add_ptx(0, 4) == pytest.approx(float(-logprobs.sum() / batch.is_response.sum()))
