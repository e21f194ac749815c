"""PPO's loop: one whole update against a slow and obvious one, its checks, its budget, and going on after a kill."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from baton.errors import UserError
from baton.recipe import PPORecipe
from stages import ppo
from stages.rollout import make_micro_batch

CPU = torch.device("cpu")
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def recipe() -> PPORecipe:
    """Settings of which none is neutral; the warm-up halves the first step's learning rates."""
    return PPORecipe.model_validate(
        {
            "stage": "ppo",
            "sft": "t/s:1",
            "reward": "t/r:1",
            "run_dir": "unused",
            "publish": {"name": "t/p"},
            "data": {"train": [{"path": "x"}]},
            "rollout": {"max_new_tokens": 6, "temperature": TEMPERATURE},
            "ppo": {
                "epochs": 2,
                "minibatches": 2,
                "kl_coefficient": 0.3,
                "clip_ratio": 0.1,
                "clip_value": 0.3,
                "value_coefficient": 0.5,
                "gamma": 0.9,
                "lam": 0.8,
                "missing_eos_penalty": 2.0,
            },
            "train": {
                "steps": 10,
                "episodes_per_batch": 8,
                "learning_rate": 0.02,
                "critic_learning_rate": 0.05,
                "warmup_steps": 2,
                "weight_decay": 0.1,
                "adam_beta2": 0.95,
                "max_grad_norm": 0.5,
            },
        }
    )


def scored(roles: Any, episodes: list[Any], recipe: PPORecipe, size: int) -> list[Any]:
    """Episodes in micro-batches of `size`, scored and with their advantages."""
    batches = [
        ppo.score_episodes(roles, make_micro_batch(episodes[at : at + size], 2, CPU), recipe)
        for at in range(0, len(episodes), size)
    ]
    ppo.set_advantages(batches, recipe, Accelerator(cpu=True))
    return batches


def one_step(roles: Any, batches: list[Any], recipe: PPORecipe) -> dict[str, float]:
    """The first step's update, as main makes it."""
    accelerator, scale = Accelerator(cpu=True), ppo.RunningScale()
    scale.add(ppo.global_sum(accelerator, torch.cat([batch.scores for batch in batches])))
    optimizer = ppo.make_optimizer(roles, recipe)
    ppo.set_learning_rates(optimizer, recipe, 0)
    return ppo.update(roles, roles, optimizer, batches, recipe, scale.deviation, accelerator, is_first=True)


class SlowPPO:
    """The same step by plain loops over episodes and tokens, on four separate models."""

    def __init__(self, oracle: Any, episodes: list[Any], recipe: PPORecipe) -> None:
        self.oracle, self.recipe = oracle, recipe
        self.rows = [(episode.prompt, episode.reply.ids) for episode in episodes]
        with torch.no_grad():
            self.old = [oracle.logprobs(oracle.policy, *row, TEMPERATURE) for row in self.rows]
            reference = [oracle.logprobs(oracle.reference, *row, TEMPERATURE) for row in self.rows]
            self.old_values = [oracle.values(*row) for row in self.rows]
        self.scores = [
            oracle.score(*row) - (0.0 if episode.reply.ended else recipe.ppo.missing_eos_penalty)
            for row, episode in zip(self.rows, episodes, strict=True)
        ]
        self.kl = [(ours - theirs).tolist() for ours, theirs in zip(self.old, reference, strict=True)]
        raw = [self.advantages(at) for at in range(len(self.rows))]
        self.returns = [
            [a + float(v) for a, v in zip(row, values, strict=True)]
            for row, values in zip(raw, self.old_values, strict=True)
        ]
        flat = [a for row in raw for a in row]
        mean = sum(flat) / len(flat)
        deviation = math.sqrt(sum((a - mean) ** 2 for a in flat) / len(flat))
        self.whitened = [[(a - mean) / (deviation + 1e-8) for a in row] for row in raw]

    def advantages(self, at: int) -> list[float]:
        """The sum over what follows of (gamma lambda)^l times each temporal difference."""
        settings, values = self.recipe.ppo, self.old_values[at].tolist()
        rewards = [-settings.kl_coefficient * kl for kl in self.kl[at]]
        rewards[-1] += self.scores[at]
        later = [*values[1:], 0.0]
        deltas = [r + settings.gamma * after - v for r, after, v in zip(rewards, later, values, strict=True)]
        decay = settings.gamma * settings.lam
        return [sum(decay**step * delta for step, delta in enumerate(deltas[t:])) for t in range(len(deltas))]

    def loss(self, members: range) -> torch.Tensor:
        """Policy and value loss of one minibatch, a mean over its tokens."""
        settings, total, count = self.recipe.ppo, torch.zeros((), dtype=torch.float64), 0
        mean_score = sum(self.scores) / len(self.scores)
        deviation = math.sqrt(sum((s - mean_score) ** 2 for s in self.scores) / len(self.scores))
        reach = settings.clip_value * deviation
        for at in members:
            new = self.oracle.logprobs(self.oracle.policy, *self.rows[at], TEMPERATURE)
            values = self.oracle.values(*self.rows[at])
            for t in range(len(new)):
                ratio, advantage = (new[t] - self.old[at][t]).exp(), self.whitened[at][t]
                bounded = ratio.clamp(1 - settings.clip_ratio, 1 + settings.clip_ratio)
                total = total - torch.minimum(ratio * advantage, bounded * advantage)
                old_value, goal = self.old_values[at][t], self.returns[at][t]
                near = old_value + (values[t] - old_value).clamp(-reach, reach)
                error = torch.maximum((values[t] - goal) ** 2, (near - goal) ** 2)
                total = total + settings.value_coefficient * 0.5 * error
                count += 1
        return total / count

    def run(self) -> None:
        """Two epochs of two minibatches, contiguous, in the same order each time."""
        train = self.recipe.train
        groups = [
            [p for p in model.parameters() if p.requires_grad]
            for model in (self.oracle.policy, self.oracle.value_model)
        ]
        assert train.critic_learning_rate
        rates = (train.learning_rate / 2, train.critic_learning_rate / 2)
        optimizer = torch.optim.AdamW(
            [{"params": group, "lr": rate} for group, rate in zip(groups, rates, strict=True)],
            betas=(0.9, train.adam_beta2),
            eps=1e-5,
            weight_decay=train.weight_decay,
        )
        for _ in range(2):
            for members in (range(0, 4), range(4, 8)):
                optimizer.zero_grad()
                self.loss(members).backward()
                parameters = groups[0] + groups[1]
                norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters))
                assert norm > train.max_grad_norm, "the clip should be active"
                for parameter in parameters:
                    parameter.grad *= train.max_grad_norm / (norm + 1e-6)
                optimizer.step()


def adapter(model: Any, name: str) -> dict[str, torch.Tensor]:
    """The LoRA tensors of one adapter under their names in a PEFT file."""
    from peft import get_peft_model_state_dict

    return {
        key.replace("base_model.model.model.", ""): tensor.detach()
        for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items()
        if "lora_" in key
    }


def test_one_update_equals_a_slow_and_obvious_one(
    roles: Any, oracle: Any, episodes: list[Any], recipe: PPORecipe
) -> None:
    slow = SlowPPO(oracle, episodes, recipe)
    slow.run()
    start = adapter(roles.peft, "policy")
    start = {key: tensor.clone() for key, tensor in start.items()}
    one_step(roles, scored(roles, episodes, recipe, 2), recipe)
    for role, theirs in (("policy", oracle.policy), ("value", oracle.value_model)):
        expected = adapter(theirs, "default")
        found = adapter(roles.peft, role)
        assert set(found) == set(expected) and len(found) == 28
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-8)
    head = oracle.value_model.base_model.model.score.modules_to_save["default"].weight
    torch.testing.assert_close(roles.value_head.weight, head, rtol=0, atol=1e-8)
    assert max(float((start[key] - tensor).abs().max()) for key, tensor in adapter(roles.peft, "policy").items()) > 0.01


@pytest.mark.parametrize("size", [1, 4])
def test_micro_batches_do_not_weigh_in(
    roles: Any, role_folders: Any, episodes: list[Any], recipe: PPORecipe, size: int
) -> None:
    other = copy.deepcopy(roles)
    figures = one_step(roles, scored(roles, episodes, recipe, 2), recipe)
    others = one_step(other, scored(other, episodes, recipe, size), recipe)
    assert others == pytest.approx(figures, abs=1e-8)
    for name, parameter in roles.trained_parameters().items():
        torch.testing.assert_close(other.trained_parameters()[name], parameter, rtol=0, atol=1e-8)


def test_the_missing_end_is_penalised_on_the_last_token(roles: Any, episodes: list[Any], recipe: PPORecipe) -> None:
    # without discount, KL and values the advantage of every token is the score that its reply gets at its end
    plain = recipe.model_copy(
        update={
            "ppo": recipe.ppo.model_copy(
                update={"gamma": 1.0, "lam": 0.0, "kl_coefficient": 0.0, "whiten_advantages": False}
            )
        }
    )
    with torch.no_grad():
        roles.value_head.weight.zero_()
    for batch in scored(roles, episodes, plain, 4):
        penalty = torch.where(batch.batch.ended, 0.0, 2.0)
        torch.testing.assert_close(batch.scores, batch.raw_scores - penalty)
        for row, count in enumerate(batch.batch.is_response.sum(-1).tolist()):
            assert batch.advantages[row, count - 1] == batch.scores[row]
            assert (batch.advantages[row, : count - 1] == 0).all()
    assert {episode.reply.ended for episode in episodes} == {True, False}


def test_the_ratio_check_raises_when_old_logprobs_are_off(roles: Any, episodes: list[Any], recipe: PPORecipe) -> None:
    batches = scored(roles, episodes, recipe, 4)
    batches[0].old_logprobs[1, 0] += 1e-3
    before = ppo.snapshot(roles)
    with pytest.raises(RuntimeError, match=r"max\|ratio - 1\| is 0.001, above 0.0001"):
        one_step(roles, batches, recipe)
    for name, parameter in roles.trained_parameters().items():
        assert torch.equal(parameter, before[name])


def test_a_reward_that_is_no_number_raises(roles: Any, episodes: list[Any], recipe: PPORecipe) -> None:
    with torch.no_grad():
        roles.reward_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the reward of ids"):
        scored(roles, episodes, recipe, 4)


def test_a_gradient_that_is_no_number_raises_before_the_step(
    roles: Any, episodes: list[Any], recipe: PPORecipe
) -> None:
    batches = scored(roles, episodes, recipe, 4)
    batches[0].advantages[0, 0] = float("inf")
    before = ppo.snapshot(roles)
    with pytest.raises(FloatingPointError, match="gradient norm"):
        one_step(roles, batches, recipe)
    assert all(torch.equal(parameter, before[name]) for name, parameter in roles.trained_parameters().items())


def test_learning_rates_are_a_function_of_the_step(roles: Any, recipe: PPORecipe) -> None:
    optimizer = ppo.make_optimizer(roles, recipe)

    def rates(step: int) -> list[float]:
        ppo.set_learning_rates(optimizer, recipe, step)
        return [group["lr"] for group in optimizer.param_groups]

    assert rates(0) == pytest.approx([0.01, 0.025])
    assert rates(1) == rates(2) == pytest.approx([0.02, 0.05])
    assert rates(6) == pytest.approx([0.01, 0.025])  # half of the way from step 2 to 10, on a cosine
    assert rates(0) == pytest.approx([0.01, 0.025])


def test_the_running_deviation() -> None:
    scale = ppo.RunningScale()
    scale.add([2.0, 4.0, 10.0])  # 1 and 3
    assert scale.deviation == pytest.approx(1.0)
    scale.add([2.0, 12.0, 74.0])  # 5 and 7
    assert scale.deviation == pytest.approx(math.sqrt(5))
    same = ppo.RunningScale()
    same.add([3.0, 6.0, 12.0])
    assert same.deviation > 0


def test_figures_are_means_over_replies(roles: Any, episodes: list[Any], recipe: PPORecipe, oracle: Any) -> None:
    slow = SlowPPO(oracle, episodes, recipe)
    figures = ppo.summarise(scored(roles, episodes, recipe, 2), Accelerator(cpu=True))
    raw = [oracle.score(*row) for row in slow.rows]
    assert figures["reward"] == pytest.approx(sum(raw) / 8)
    assert figures["kl_nats"] == pytest.approx(sum(sum(kl) for kl in slow.kl) / 8)
    assert figures["length"] == pytest.approx(sum(len(e.reply.ids) for e in episodes) / 8)
    assert figures["eos_rate"] == pytest.approx(sum(e.reply.ended for e in episodes) / 8)


def test_goes_on_after_a_kill_bit_by_bit(
    assert_resumes: Callable[[str, int, Path], Any], tmp_path: Path, tiny_chain: Any
) -> None:
    copied = assert_resumes("ppo", 2, tmp_path)
    value, before = (chain.registry.resolve("tiny/value:candidate") for chain in (copied, tiny_chain))
    assert value.manifest["files"] == before.manifest["files"]


def published_tensors(version: Any, chain: Any) -> dict[str, torch.Tensor]:
    return load_file(chain.registry.materialise(version) / "adapter_model.safetensors")


def test_the_kl_budget_stops_and_goes_back(tiny_chain: Any, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    budget = 0.02
    overrides = [
        f"ppo.kl_budget_nats={budget}",
        "train.learning_rate=0.03",
        "train.steps=8",
        "train.save_every=1",
        "data.eval=[]",
        "data.questions=[]",
    ]
    for folder in (first, second):
        folder.mkdir()
    chain = tiny_chain.copy(first)
    version = ppo.main(chain.recipe("ppo", *overrides))
    rows = [row for row in chain.metrics("ppo") if "kl_nats" in row]
    updates = len(rows)
    assert 1 <= updates < 8, "the budget should have stopped it"
    assert all(row["kl_nats"] <= budget for row in rows)
    checkpoint = chain.run_dir("ppo") / f"checkpoints/checkpoint-{updates}"
    kept = load_file(checkpoint / "trained.safetensors")
    found = published_tensors(version, chain)
    for key, tensor in found.items():
        inside = "peft." + key.replace(".weight", ".policy.weight")
        assert torch.equal(tensor, kept[f"previous/{inside}"])
    assert any(
        not torch.equal(tensor, kept["weight/peft." + key.replace(".weight", ".policy.weight")])
        for key, tensor in found.items()
    ), "the last update is undone"
    if updates == 1:
        start = load_file(tiny_chain.folder("sft") / "adapter_model.safetensors")
        assert all(torch.equal(tensor, start[key]) for key, tensor in found.items())
    # killed after its last checkpoint, the run comes to the same end
    again = tiny_chain.copy(second)
    again.run_dir("ppo").mkdir(parents=True)
    (again.run_dir("ppo") / "checkpoints").mkdir()
    checkpoint.rename(again.run_dir("ppo") / "checkpoints" / checkpoint.name)
    (again.run_dir("ppo") / "build.json").write_text((chain.run_dir("ppo") / "build.json").read_text())
    repeated = ppo.main(again.recipe("ppo", *overrides))
    assert [f["sha256"] for f in repeated.manifest["files"]] == [f["sha256"] for f in version.manifest["files"]]


def test_the_chain_moved_the_policy_from_sft(tiny_chain: Any) -> None:
    policy = published_tensors(tiny_chain.versions["ppo"], tiny_chain)
    sft = load_file(tiny_chain.folder("sft") / "adapter_model.safetensors")
    assert set(policy) == set(sft)
    assert any(not torch.equal(policy[key], sft[key]) for key in sft)
    first = tiny_chain.metrics("ppo")[0]
    assert first["kl_nats"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.episodes_per_batch=7", "cannot be split evenly into ppo.minibatches = 2"),
        ("rollout.max_prompt_tokens=3", "rollout.max_prompt_tokens = 3; raise it"),
    ],
)
def test_refusals_publish_nothing(tiny_chain: Any, tmp_path: Path, override: str, message: str) -> None:
    chain = tiny_chain.copy(tmp_path)
    before = chain.registry.numbers("tiny/policy")
    with pytest.raises(UserError, match=message):
        ppo.main(chain.recipe("ppo", override))
    assert chain.registry.numbers("tiny/policy") == before
