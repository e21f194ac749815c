"""PPO's update: epochs over minibatches of micro-batches, one optimizer step a minibatch, gradients clipped."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from baton.recipe import PPORecipe
from stages.kl import kl_estimate
from stages.losses import policy_loss, value_loss
from stages.micro_batch import MicroBatch, group_by_length, make_text_batch
from stages.prompts import TextRow
from stages.roles import Roles
from stages.rollout import episode_prompts
from stages.scoring import Scored
from stages.sharding import Spread

RATIO_BOUNDS = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-3}
"""How far from 1 a ratio may be before the first update, by rounding alone, in each number format."""
PTX_SEED = 0x9797
FIGURES = ("policy", "value", "clipped", "value_clipped", "approx_kl", "kl_loss", "entropy", "tokens", "states")


class Updater:
    """The optimizer and what it does with a scored batch."""

    def __init__(self, recipe: PPORecipe, roles: Roles, spread: Spread, ptx: Sequence[TextRow], pad_id: int) -> None:
        self.recipe, self.roles, self.spread, self.ptx, self.pad_id = recipe, roles, spread, ptx, pad_id
        self.parameters = roles.trained_parameters()
        self.optimizer = spread.adopt(roles, make_optimizer(roles, recipe))
        self.device = spread.device

    def continues_scoring(self, step: int) -> bool:
        """Whether the step may begin with a forward pass that scoring made: its first minibatch is all episodes.

        Not where another graph comes first (PPO-ptx), nor where weights or gradients are spread over processes.
        """
        if self.spread.sharded or self.spread.steps_itself or self.ptx:
            return False
        return self.recipe.ppo.minibatches == 1 and step >= self.recipe.ppo.critic_warmup_steps

    def update(
        self, minibatches: Sequence[Sequence[Scored]], step: int, kl_coefficient: float, deviation: float
    ) -> dict[str, float]:
        """One PPO step; `deviation` of the scores so far scales the value clip. Raises FloatingPointError."""
        recipe, settings = self.recipe, self.recipe.ppo
        warming = step < settings.critic_warmup_steps
        set_learning_rates(self.optimizer, recipe, step)
        sums = torch.zeros(len(FIGURES), dtype=torch.float64, device=self.device)
        norms: list[tuple[float, ...]] = []
        ptx_losses: list[float] = []
        worst = 0.0
        stopped = False
        for epoch in range(settings.epochs):
            for at, minibatch in enumerate(minibatches):
                self.optimizer.zero_grad(set_to_none=True)
                with self.spread.computing():
                    if self.ptx and not warming:
                        turn = (step * settings.epochs + epoch) * len(minibatches) + at
                        ptx_losses.append(self.add_ptx(turn, sum(len(s.batch.members) for s in minibatch)))
                    found, gap = self.add_gradients(minibatch, kl_coefficient, deviation, warming=warming)
                if epoch == at == 0 and not warming:
                    worst = self.check_same_policy(gap)
                tokens = max(float(found[FIGURES.index("tokens")]), 1.0)
                divergence = float(found[FIGURES.index("approx_kl")]) / tokens
                limit = settings.kl_minibatch_stop_nats
                if limit is not None and divergence > limit:
                    stopped = True  # this minibatch's gradient is not used either
                    break
                norms.append(self.step(warming))
                sums += found
            if stopped:
                break
        self.optimizer.zero_grad(set_to_none=True)
        return self.figures(sums, norms, ptx_losses, worst, stopped=stopped, warming=warming)

    def add_gradients(
        self, minibatch: Sequence[Scored], kl_coefficient: float, deviation: float, *, warming: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Backward passes of one minibatch; (sums of FIGURES over all ranks, the largest |log ratio| on this rank)."""
        counts = torch.stack(
            [
                torch.stack([scored.batch.is_response.sum(), scored.batch.is_state.sum()]).double()
                for scored in minibatch
            ]
        ).sum(0)
        tokens, states = self.spread.sum(counts).clamp(min=1).tolist()
        sums = torch.zeros(len(FIGURES), dtype=torch.float64, device=self.device)
        worst = torch.zeros((), device=self.device)
        joint = self.recipe.ppo.critic == "shared" or self.spread.steps_itself
        for at, scored in enumerate(minibatch):
            self.spread.accumulate(at == len(minibatch) - 1)
            batch = scored.batch
            known, scored.forward = scored.forward, None  # good for one backward pass
            if joint:
                forward = known or self.roles(batch, entropy_gradient=self.recipe.ppo.entropy_coefficient > 0)
                policy, figures = self.policy_part(scored, forward.logprobs, forward.entropies, kl_coefficient)
                value, others = self.value_part(scored, forward.values, deviation)
                self.spread.backward(policy / tokens + value / states)
                sums += figures + others
            else:
                # one graph after the other: half the activations live at a time
                if not warming:
                    slopes = self.recipe.ppo.entropy_coefficient > 0
                    found = known or self.roles.policy(batch, entropy_gradient=slopes)
                    logprobs, entropies = found[:2]
                    policy, figures = self.policy_part(scored, logprobs, entropies, kl_coefficient)
                    self.spread.backward(policy / tokens)
                    sums += figures
                value, figures = self.value_part(scored, self.roles.values(batch), deviation)
                self.spread.backward(value / states)
                sums += figures
            if (joint or not warming) and batch.is_response.any():
                new = forward.logprobs if joint else logprobs
                gaps = (new.detach() - scored.old_logprobs)[batch.is_response].abs()
                worst = torch.maximum(worst, gaps.max().to(worst.dtype))
        self.spread.sum_gradients(self.parameters)
        return self.spread.sum(sums), worst

    def policy_part(
        self, scored: Scored, logprobs: torch.Tensor, entropies: torch.Tensor, kl_coefficient: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The policy's loss, a sum over tokens, and its FIGURES."""
        settings, batch = self.recipe.ppo, scored.batch
        steps = batch.is_response.shape[1]
        found = policy_loss(
            logprobs,
            scored.old_logprobs,
            scored.advantages[:, :steps],
            batch.is_response,
            settings.clip_ratio,
            settings.clip_ratio if settings.clip_ratio_high is None else settings.clip_ratio_high,
            dual_clip=settings.dual_clip,
            weights=scored.weights,
        )
        loss, kl, entropy = found.loss, torch.zeros_like(found.loss), (entropies * batch.is_response).sum()
        if settings.kl_in == "loss" and kl_coefficient:
            estimate = kl_estimate(logprobs, scored.reference, settings.kl_estimator)
            kl = torch.where(batch.is_response, estimate, 0).sum()
            loss = loss + kl_coefficient * kl
        if settings.entropy_coefficient:
            loss = loss - settings.entropy_coefficient * entropy
        numbers = {
            "policy": found.loss,
            "clipped": found.num_clipped,
            "approx_kl": found.approx_kl,
            "kl_loss": kl,
            "entropy": entropy,
            "tokens": batch.is_response.sum(),
        }
        return loss, _figures(numbers, self.device)

    def value_part(self, scored: Scored, values: torch.Tensor, deviation: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The critic's loss times its coefficient, a sum over states, and its FIGURES."""
        settings, is_state = self.recipe.ppo, scored.batch.is_state
        found = value_loss(values, scored.old_values, scored.returns, is_state, settings.clip_value * deviation)
        numbers = {"value": found.loss, "value_clipped": found.num_clipped, "states": is_state.sum()}
        return settings.value_coefficient * found.loss, _figures(numbers, self.device)

    def add_ptx(self, turn: int, episodes: int) -> float:
        """Add the gradient of the mixed-in text's loss; as many rows as episodes. Ouyang et al. 2022, eq. 2.

        Returns the loss in nats a token. Rows are a function of seed and `turn` alone, dealt to the ranks in turn.
        """
        total = int(self.spread.sum(torch.tensor(episodes, device=self.device)))
        seed = self.recipe.train.seed ^ PTX_SEED
        chosen = episode_prompts(seed, len(self.ptx), turn * total, total)[self.spread.rank :: self.spread.world]
        rows = [self.ptx[at] for at in chosen]
        batches: list[MicroBatch] = []
        lengths = [len(ids) for ids, _ in rows]
        budget = self.recipe.train.tokens_per_micro_batch
        count = self.spread.maximum(len(group_by_length(lengths, budget)))
        for group in group_by_length(lengths, budget, count):
            batches.append(make_text_batch(rows, group, self.pad_id).to(self.device))
        batches += [batches[-1].blank() for _ in range(count - len(batches))]
        tokens = self.spread.sum(torch.stack([batch.is_response.sum() for batch in batches]).sum()).clamp(min=1)
        total_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.spread.accumulate(False)
        for batch in batches:
            loss = -(self.roles.policy(batch, temperature=1.0).logprobs).sum()
            self.spread.backward(self.recipe.ppo.ptx_coefficient * loss / tokens)
            total_loss += loss.detach().double()
        return float(self.spread.sum(total_loss) / tokens)

    def step(self, warming: bool) -> tuple[float, ...]:
        """Clip and apply the gradients; the norms before clipping: the policy's and the critic's, or one for both."""
        if self.spread.steps_itself:
            return (_finite(self.spread.step()),)
        policy = [p for name, p in self.parameters.items() if not self.roles.is_critics(name)]
        critic = [p for name, p in self.parameters.items() if self.roles.is_critics(name)]
        if warming:
            for parameter in policy:
                parameter.grad = None  # no step, no decay, no moments
        norms = self.spread.norm(policy), self.spread.norm(critic)
        norm = _finite(math.hypot(*norms))
        self.spread.scale(self.parameters.values(), min(1.0, self.recipe.train.max_grad_norm / (norm + 1e-6)))
        self.optimizer.step()
        return norms

    def check_same_policy(self, gap: torch.Tensor) -> float:
        """Before the first update of a batch the new policy is the old one: max|ratio - 1| is zero up to rounding."""
        found = math.expm1(self.spread.largest(gap))
        bound = RATIO_BOUNDS[self.roles.arithmetic]
        if not found <= bound:
            raise RuntimeError(
                f"before the first update max|ratio - 1| is {found:.3g}, above {bound:g}: the log-probabilities that "
                "PPO compares come from different functions, so its updates would be wrong"
            )
        return found

    def figures(
        self,
        sums: torch.Tensor,
        norms: list[tuple[float, ...]],
        ptx: list[float],
        worst: float,
        *,
        stopped: bool,
        warming: bool,
    ) -> dict[str, float]:
        """What metrics.jsonl says of the update: means over tokens and states, over all epochs that were made."""
        totals = dict(zip(FIGURES, sums.tolist(), strict=True))
        tokens, states = max(totals["tokens"], 1), max(totals["states"], 1)
        found = {
            "loss/value": totals["value"] / states,
            "clip_fraction/value": totals["value_clipped"] / states,
            "optimizer_steps": len(norms),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        names = ("grad_norm",) if self.spread.steps_itself else ("grad_norm/policy", "grad_norm/value")
        for at, name in enumerate(names):
            if not (warming and name == "grad_norm/policy"):
                found[name] = sum(norm[at] for norm in norms) / max(len(norms), 1)
        if not warming:
            found |= {
                "loss/policy": totals["policy"] / tokens,
                "clip_fraction/policy": totals["clipped"] / tokens,
                "approx_kl_nats": totals["approx_kl"] / tokens,
                "first_ratio_gap": worst,
                "stopped_by_kl": float(stopped),
            }
        if self.recipe.ppo.kl_in == "loss":
            found["loss/kl"] = totals["kl_loss"] / tokens
        if ptx:
            found["loss/ptx"] = sum(ptx) / len(ptx)
        return found


def make_optimizer(roles: Roles, recipe: PPORecipe) -> torch.optim.Optimizer:
    """AdamW with one group for the policy and one for the critic."""
    train = recipe.train
    named = roles.trained_parameters()
    policy = [parameter for name, parameter in named.items() if not roles.is_critics(name)]
    critic = [parameter for name, parameter in named.items() if roles.is_critics(name)]
    return torch.optim.AdamW(
        [
            {"params": policy, "peak": train.learning_rate},
            {"params": critic, "peak": train.critic_learning_rate or train.learning_rate},
        ],
        lr=train.learning_rate,
        betas=(0.9, train.adam_beta2),
        eps=1e-5,
        weight_decay=train.weight_decay,
        # one kernel for all parameters; sharded ones are not plain tensors
        fused=not any(hasattr(parameter, "full_tensor") for parameter in named.values()),
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


def _finite(norm: float) -> float:
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient norm is {norm}; lower train.learning_rate (checkpoints are untouched)")
    return norm


def _figures(numbers: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([numbers[name].detach().double() if name in numbers else zero for name in FIGURES])
