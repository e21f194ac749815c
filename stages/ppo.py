"""Stage 3: PPO against a trained reward model; the loop reads top to bottom as the algorithm.

The details follow "The N+ Implementation Details of RLHF with PPO" (Huang et al. 2024).
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from baton.recipe import PPORecipe
from baton.registry import Version
from baton.run import Run, program

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from stages.roles import Roles
    from stages.rollout import Episode, MicroBatch


@dataclass
class Scored:
    """A micro-batch of episodes with everything that the update needs; tensors (B, T) unless said otherwise."""

    batch: MicroBatch
    old_logprobs: torch.Tensor
    old_values: torch.Tensor
    kl: torch.Tensor  # log pi - log pi_ref of the sampled tokens
    scores: torch.Tensor  # (B,), the missing-EOS penalty included
    raw_scores: torch.Tensor  # (B,), the reward model's own
    advantages: torch.Tensor
    returns: torch.Tensor


@dataclass
class RunningScale:
    """Mean and deviation of all scores so far (Welford's sums); value clipping is relative to it."""

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def add(self, sums: list[float]) -> None:
        self.count, self.total, self.squares = (
            self.count + sums[0],
            self.total + sums[1],
            self.squares + sums[2],
        )

    @property
    def deviation(self) -> float:
        mean = self.total / max(self.count, 1)
        return math.sqrt(max(self.squares / max(self.count, 1) - mean * mean, 1e-8))


def main(recipe: PPORecipe) -> Version:
    """Optimise SFT's adapter against the reward model by PPO and publish the policy, and the value model if asked."""
    run = Run.start(recipe)
    if version := run.already_published():
        return run.finish(version, "up to date")
    import torch
    from accelerate import Accelerator

    from baton.models import base_folder, load_tokenizer
    from baton.progress import Progress
    from baton.questions import load_questions
    from stages.outcome import evaluate, publish
    from stages.ppo_checkpoint import load_checkpoint, save_checkpoint
    from stages.prompts import encode_prompts, micro_batch_size, read_prompts
    from stages.roles import Roles
    from stages.rollout import make_micro_batch

    started = time.monotonic()
    train, settings = recipe.train, recipe.ppo
    micro = micro_batch_size(run)
    rows, questions = read_prompts(run), load_questions(recipe.data.questions, recipe.folder)
    sft, reward = run.inputs.versions["sft"], run.inputs.versions["reward"]
    with run.state.main_process_first():
        folders = run.registry.materialise(sft), run.registry.materialise(reward)
        base = base_folder(run.registry, sft)
    tokenizer = load_tokenizer(folders[0])
    prompts = encode_prompts(run, tokenizer, rows, questions)
    assert tokenizer.pad_token_id is not None
    pad_id = int(tokenizer.pad_token_id)

    accelerator = Accelerator(cpu=run.state.device.type == "cpu")
    dtype = run.dtype
    roles = Roles(base, *folders, dtype, recipe.rollout.temperature).to(accelerator.device)
    optimizer = make_optimizer(roles, recipe)
    trained = accelerator.prepare_model(roles)
    scale, first, over_budget = RunningScale(), 0, False
    previous = snapshot(roles)  # the newest weights whose KL was measured to be within the budget
    if last := run.last_checkpoint():
        state, previous = load_checkpoint(last, roles, optimizer)
        first, scale = state["step"], RunningScale(*state["scale"])
        run.say(f"continuing from {last}")
    run.trim_metrics(first)

    with Progress("ppo", train.steps, "episodes", first, shown=run.is_main) as progress:
        for step in range(first, train.steps):
            episodes = collect(run, roles, tokenizer, prompts.train, step)
            batches = [
                score_episodes(roles, make_micro_batch(episodes[at : at + micro], pad_id, accelerator.device), recipe)
                for at in range(0, len(episodes), micro)
            ]
            figures = summarise(batches, accelerator)
            over_budget = settings.kl_budget_nats is not None and figures["kl_nats"] > settings.kl_budget_nats
            if over_budget:
                break
            previous = snapshot(roles)
            scale.add(global_sum(accelerator, torch.cat([b.scores for b in batches])))
            set_advantages(batches, recipe, accelerator)
            set_learning_rates(optimizer, recipe, step)
            figures |= update(
                trained, roles, optimizer, batches, recipe, scale.deviation, accelerator, is_first=not step
            )
            run.log(step + 1, figures)
            shown = {"reward": figures["reward"], "kl": figures["kl_nats"], "length": figures["length"]}
            progress.update(step + 1, train.episodes_per_batch, shown)
            if run.is_main and ((step + 1) % train.save_every == 0 or step + 1 == train.steps):
                save_checkpoint(
                    run.checkpoints,
                    step + 1,
                    roles,
                    optimizer,
                    previous,
                    {"scale": list(vars(scale).values())},
                )

    if over_budget:
        run.say(f"KL reached {figures['kl_nats']:.2f} nats a reply, over ppo.kl_budget_nats: stopping")
        restore(roles, previous)
    metrics = evaluate(run, roles, tokenizer, prompts) if run.is_main else {}
    budget = settings.kl_budget_nats
    if budget and not over_budget and metrics.get("eval/kl_nats", 0.0) > budget:
        # only held-out prompts have seen the weights after the last update
        run.say(f"held-out KL is {metrics['eval/kl_nats']:.2f} nats a reply, over ppo.kl_budget_nats: one update back")
        restore(roles, previous)
        metrics = evaluate(run, roles, tokenizer, prompts)
    if budget and metrics.get("eval/kl_nats", 0.0) > budget:
        run.say(f"warning: held-out KL is still {metrics['eval/kl_nats']:.2f} nats a reply; it is in the metrics")
    metrics["seconds"] = round(time.monotonic() - started, 1)
    run.log(train.steps, metrics)
    return run.finish(publish(run, roles, tokenizer, metrics, base, dtype, prompts))


def snapshot(roles: Roles) -> dict[str, torch.Tensor]:
    """A copy of everything that is trained."""
    return {name: parameter.detach().clone() for name, parameter in roles.trained_parameters().items()}


def restore(roles: Roles, weights: dict[str, torch.Tensor]) -> None:
    """Put the weights of a `snapshot` back."""
    for name, parameter in roles.trained_parameters().items():
        parameter.data.copy_(weights[name])


def make_optimizer(roles: Roles, recipe: PPORecipe) -> torch.optim.Optimizer:
    """AdamW with one group for the policy and one for the value model."""
    import torch

    from stages.roles import POLICY

    train = recipe.train
    policy: list[torch.nn.Parameter] = []
    value: list[torch.nn.Parameter] = []
    for name, parameter in roles.trained_parameters().items():
        (policy if f".{POLICY}." in name else value).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": policy, "peak": train.learning_rate},
            {"params": value, "peak": train.critic_learning_rate or train.learning_rate},
        ],
        lr=train.learning_rate,
        betas=(0.9, train.adam_beta2),
        eps=1e-5,
        weight_decay=train.weight_decay,
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, recipe: PPORecipe, step: int) -> None:
    """Warm-up, then the recipe's schedule over the steps; a function of `step` alone."""
    train = recipe.train
    if step < train.warmup_steps:
        factor = (step + 1) / train.warmup_steps
    else:
        done = (step - train.warmup_steps) / max(train.steps - train.warmup_steps, 1)
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[train.schedule]
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def collect(
    run: Run[PPORecipe], roles: Roles, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], step: int
) -> list[Episode]:
    """This rank's share of the step's episodes, sampled from the policy."""
    from stages.prompts import sample
    from stages.rollout import episode_prompts

    recipe = run.recipe
    total, world, rank = recipe.train.episodes_per_batch, run.state.num_processes, run.state.process_index
    chosen = episode_prompts(recipe.train.seed, len(prompts), step * total, total)
    mine = range(rank, total, world)  # interleaved: every minibatch then holds the same episodes at any world size
    return sample(
        run.recipe,
        roles,
        tokenizer,
        [prompts[chosen[at]] for at in mine],
        [step * total + at for at in mine],
        "policy",
    )


def score_episodes(roles: Roles, batch: MicroBatch, recipe: PPORecipe) -> Scored:
    """Old log-probabilities by the training forward, reference, values and scores; all without gradients."""
    import torch

    from stages.roles import REFERENCE

    with torch.no_grad():
        old = roles(batch)
        reference = roles.logprobs(REFERENCE, batch)
        raw = roles.scores(batch)
    if not torch.isfinite(raw).all():
        at = int((~torch.isfinite(raw)).nonzero()[0])
        raise FloatingPointError(f"the reward of ids {batch.input_ids[at].tolist()} is {float(raw[at])}")
    scores = raw - recipe.ppo.missing_eos_penalty * (~batch.ended).float()
    nothing = torch.zeros_like(old.values)
    return Scored(batch, old.logprobs, old.values, old.logprobs - reference, scores, raw, nothing, nothing)


def set_advantages(batches: list[Scored], recipe: PPORecipe, accelerator: Any) -> None:
    """Rewards, GAE and returns; advantages are whitened over the global batch, rewards keep their mean."""
    from stages.advantages import gae, moments, token_rewards, whiten

    settings = recipe.ppo
    for scored in batches:
        is_response = scored.batch.is_response
        rewards = token_rewards(scored.scores, scored.kl, is_response, settings.kl_coefficient)
        scored.advantages = gae(rewards, scored.old_values, is_response, settings.gamma, settings.lam)
        scored.returns = scored.advantages + scored.old_values
    if settings.whiten_advantages:
        total = sum(moments(scored.advantages, scored.batch.is_response) for scored in batches)
        total = accelerator.reduce(total, reduction="sum")
        for scored in batches:
            scored.advantages = whiten(scored.advantages, total)


def update(
    trained: Any,
    roles: Roles,
    optimizer: torch.optim.Optimizer,
    batches: list[Scored],
    recipe: PPORecipe,
    deviation: float,
    accelerator: Any,
    *,
    is_first: bool,
) -> dict[str, float]:
    """Epochs over minibatches of micro-batches: one optimizer step a minibatch, gradients clipped."""
    import torch

    from stages.losses import policy_loss, value_loss

    settings, world = recipe.ppo, accelerator.num_processes
    size = len(batches) // settings.minibatches
    sums = torch.zeros(6, dtype=torch.float64, device=accelerator.device)
    norms: list[float] = []
    for epoch in range(settings.epochs):
        for start in range(0, len(batches), size):
            minibatch = batches[start : start + size]
            tokens = accelerator.reduce(
                torch.stack([scored.batch.is_response.sum() for scored in minibatch]).sum(), reduction="sum"
            )
            optimizer.zero_grad(set_to_none=True)
            for at, scored in enumerate(minibatch):
                is_response = scored.batch.is_response
                last = at == len(minibatch) - 1
                with accelerator.no_sync(trained) if not last else nullcontext():
                    new = trained(scored.batch)
                    if is_first and epoch == start == 0:
                        check_same_policy(new.logprobs, scored, roles.compute_dtype)
                    policy = policy_loss(
                        new.logprobs, scored.old_logprobs, scored.advantages, is_response, settings.clip_ratio
                    )
                    value = value_loss(
                        new.values,
                        scored.old_values,
                        scored.returns,
                        is_response,
                        settings.clip_value * deviation,
                    )
                    # DDP averages over ranks, and the sums are over all of them: multiply by their number
                    loss = (policy.loss + settings.value_coefficient * value.loss) * world / tokens
                    loss.backward()
                done = (policy.loss, value.loss, policy.num_clipped, value.num_clipped, policy.approx_kl)
                sums += torch.stack([*(item.detach().double() for item in done), is_response.sum().double()])
            norm = torch.nn.utils.clip_grad_norm_(roles.trained_parameters().values(), recipe.train.max_grad_norm)
            if not torch.isfinite(norm):
                raise FloatingPointError(
                    f"the gradient norm is {float(norm)}; lower train.learning_rate (checkpoints are untouched)"
                )
            norms.append(float(norm))
            optimizer.step()
    totals = accelerator.reduce(sums, reduction="sum").tolist()
    count = max(totals[5], 1.0)
    return {
        "loss/policy": totals[0] / count,
        "loss/value": totals[1] / count,
        "clip_fraction/policy": totals[2] / count,
        "clip_fraction/value": totals[3] / count,
        "approx_kl_nats": totals[4] / count,
        "grad_norm": sum(norms) / len(norms),
        "learning_rate": optimizer.param_groups[0]["lr"],
    }


def check_same_policy(logprobs: torch.Tensor, scored: Scored, dtype: torch.dtype) -> None:
    """Before the first update the new policy is the old one: max|ratio - 1| must be zero up to rounding."""
    import torch

    bound = 1e-4 if dtype is torch.float32 else 2e-2
    gap = float(((logprobs.detach() - scored.old_logprobs).exp() - 1)[scored.batch.is_response].abs().max())
    if gap > bound:
        raise RuntimeError(
            f"before the first update max|ratio - 1| is {gap:.3g}, above {bound:g}: the log-probabilities that PPO "
            "compares come from different functions, so its updates would be wrong"
        )


def summarise(batches: list[Scored], accelerator: Any) -> dict[str, float]:
    """Means over the global batch of episodes; KL in nats a reply, from the reference."""
    import torch

    rows = torch.cat(
        [
            torch.stack(
                [
                    scored.raw_scores.double(),
                    scored.kl.double().sum(-1),
                    scored.batch.is_response.sum(-1).double(),
                    scored.batch.ended.double(),
                    torch.ones_like(scored.raw_scores, dtype=torch.float64),
                ]
            )
            for scored in batches
        ],
        dim=1,
    ).sum(-1)
    reward, kl, length, ended, count = accelerator.reduce(rows, reduction="sum").tolist()
    return {
        "reward": reward / count,
        "kl_nats": kl / count,
        "length": length / count,
        "eos_rate": ended / count,
    }


def global_sum(accelerator: Any, scores: torch.Tensor) -> list[float]:
    """[count, sum, sum of squares] of the scores on all ranks."""
    import torch

    wide = scores.double()
    sums = torch.stack([wide.new_tensor(float(len(wide))), wide.sum(), wide.square().sum()])
    return accelerator.reduce(sums, reduction="sum").tolist()


if __name__ == "__main__":
    program(main, PPORecipe)
