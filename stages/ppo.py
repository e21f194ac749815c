"""Stage 3: PPO against rewards; the loop reads top to bottom as the algorithm.

The details follow "The N+ Implementation Details of RLHF with PPO" (Huang et al. 2024).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from baton.recipe import PPORecipe
from baton.registry import Version
from baton.run import Run, program

if TYPE_CHECKING:
    import torch

    from stages.advantages import RunningScale
    from stages.engines import Engine
    from stages.prompts import PromptRow
    from stages.scoring import Scored, Scorer
    from stages.sharding import Spread


def main(recipe: PPORecipe) -> Version:
    """Optimise SFT's model against the rewards by PPO and publish the policy, and the critic if asked."""
    run = Run.start(recipe)
    if version := run.already_published():
        return run.finish(version, "up to date")
    from baton.preemption import Preempted, Preemption
    from baton.progress import Progress
    from stages.session import Session

    started = time.monotonic()
    train, settings = recipe.train, recipe.ppo
    with (
        closing(Session.open(run)) as session,
        Preemption() as preemption,
        Progress("ppo", train.steps, "episodes", session.state.step, shown=run.is_main) as progress,
    ):
        run.say(session.introduction())
        state, over_budget = session.state, False
        while state.step < train.steps and not over_budget:
            clock = [time.perf_counter()]
            chosen, episodes = collect(session.engine, session.prompts.train, recipe, session.spread, state.step)
            clock.append(time.perf_counter())
            share, keep_graph = len(episodes) // settings.minibatches, session.updater.continues_scoring(state.step)
            with session.spread.computing():
                minibatches = [
                    session.scorer.score(episodes[at : at + share], chosen[at : at + share], keep_graph=keep_graph)
                    for at in range(0, len(episodes), share)
                ]
            set_scores(minibatches, recipe, session.spread, state.raw_scale, state.scale)
            figures = summarise(minibatches, session.scorer, session.spread)
            session.scorer.check_agreement([s for batch in minibatches for s in batch], figures["engine_gap_nats"])
            over_budget = settings.kl_budget_nats is not None and figures["kl_nats"] > settings.kl_budget_nats
            if over_budget:
                # the newest weights whose KL was measured to be within the budget
                run.say(f"KL reached {figures['kl_nats']:.2f} nats a reply, over ppo.kl_budget_nats: stopping")
                if state.previous:
                    session.restore(state.previous)
                break
            if settings.kl_budget_nats is not None:
                state.previous = session.snapshot()
            figures |= set_advantages(minibatches, recipe, session.spread, state.kl.value)
            clock.append(time.perf_counter())
            figures |= session.updater.update(minibatches, state.step, state.kl.value, state.scale.deviation)
            session.spread.together(session.engine.push)
            clock.append(time.perf_counter())
            state.kl.adapt(figures["kl_nats"], train.episodes_per_batch)
            state.step += 1
            seconds = {name: clock[at + 1] - clock[at] for at, name in enumerate(("rollout", "score", "update"))}
            session.record(figures, seconds)
            if train.eval_every and state.step % train.eval_every == 0 and state.step < train.steps:
                session.evaluate()
            shown = {"reward": figures["reward"], "kl": figures["kl_nats"], "length": figures["length"]}
            progress.update(state.step, train.episodes_per_batch, shown, seconds)
            leaving = preemption.asked(session.spread.accelerator)
            if leaving or state.step % train.save_every == 0 or state.step == train.steps:
                session.save()
            if leaving:
                raise Preempted(state.step, saved=session.spread.can_save)

        metrics = session.conclude(went_back=over_budget and bool(state.previous))
        metrics["seconds"] = round(time.monotonic() - started, 1)
        run.log(int(metrics.get("published_step", state.step)), metrics)
        return run.finish(session.publish(metrics))


def collect(
    engine: Engine, prompts: Sequence[PromptRow], recipe: PPORecipe, spread: Spread, step: int
) -> tuple[list[PromptRow], list[Any]]:
    """This rank's share of the step's episodes, sampled from the policy: (prompt rows, episodes)."""
    from stages.rollout import Episode, episode_prompts

    total = recipe.train.episodes_per_batch
    at = episode_prompts(recipe.train.seed, len(prompts), step * total, total)
    mine = range(spread.rank, total, spread.world)  # interleaved: a minibatch holds the same episodes at any world size
    rows = [prompts[at[place]] for place in mine]
    indices = [step * total + place for place in mine]
    with spread.gathered():
        replies = spread.together(lambda: engine.generate([row.ids for row in rows], indices))
    return rows, [Episode(i, row.ids, reply) for i, row, reply in zip(indices, rows, replies, strict=True)]


def set_scores(
    minibatches: Sequence[Sequence[Scored]],
    recipe: PPORecipe,
    spread: Spread,
    raw_scale: RunningScale,
    scale: RunningScale,
) -> None:
    """From the rewards' sums to what is optimised; both running scales learn the batch first."""
    import torch

    from stages.advantages import shape_scores

    real = [scored for minibatch in minibatches for scored in minibatch if scored.batch.members]
    raw_scale.add(_moments([scored.total for scored in real], spread))
    for minibatch in minibatches:
        for scored in minibatch:
            scored.scores = shape_scores(
                scored.total,
                scored.batch.ended,
                scored.batch.is_response.sum(-1),
                recipe.rollout.max_new_tokens,
                raw_scale.deviation,
                recipe.ppo,
            )
    scale.add(_moments([scored.scores for scored in real], spread))
    assert all(torch.isfinite(scored.scores).all() for scored in real)


def _moments(rows: Sequence[torch.Tensor], spread: Spread) -> list[float]:
    """[count, sum, sum of squares] of all ranks' numbers."""
    import torch

    wide = torch.cat([torch.zeros(0, dtype=torch.float64, device=spread.device), *(row.double() for row in rows)])
    sums = torch.stack([wide.new_tensor(float(len(wide))), wide.sum(), wide.square().sum()])
    return spread.sum(sums).tolist()


def set_advantages(
    minibatches: Sequence[Sequence[Scored]], recipe: PPORecipe, spread: Spread, kl_coefficient: float
) -> dict[str, float]:
    """Token rewards, GAE and returns; advantages are whitened over the global batch, rewards keep their mean."""
    import torch

    from stages.advantages import explained_variance, gae, moments, token_rewards, whiten
    from stages.kl import kl_estimate

    settings = recipe.ppo
    in_reward = kl_coefficient if settings.kl_in == "reward" else 0.0
    every = [scored for minibatch in minibatches for scored in minibatch]
    totals = torch.zeros(3, 3, dtype=torch.float64, device=spread.device)
    for scored in every:
        batch = scored.batch
        if not batch.members:
            scored.advantages = scored.returns = torch.zeros_like(scored.old_values)
            continue
        kl = kl_estimate(scored.old_logprobs, scored.reference, settings.kl_estimator)
        rewards = token_rewards(scored.scores, kl, batch.is_response, batch.is_state, in_reward)
        scored.advantages = gae(rewards, scored.old_values, batch.is_state, settings.gamma, settings.lam)
        scored.returns = scored.advantages + scored.old_values
        steps = batch.is_response.shape[1]
        totals[0] += moments(scored.advantages[:, :steps], batch.is_response)
        totals[1] += moments(scored.advantages, batch.is_state)  # returns - values
        totals[2] += moments(scored.returns, batch.is_state)
    totals = spread.sum(totals)
    if settings.whiten_advantages:
        for scored in every:
            scored.advantages = whiten(scored.advantages, totals[0])
    return {"explained_variance": explained_variance(totals[1], totals[2]), "kl_coefficient": kl_coefficient}


def summarise(minibatches: Sequence[Sequence[Scored]], scorer: Scorer, spread: Spread) -> dict[str, float]:
    """Means over the global batch of episodes; KL in nats a reply, from the reference."""
    import torch

    # prefixed: a reward may be called length
    labels = {f"reward/{label}": label for label in scorer.weights}
    details = {f"reward/{name}": name for name in scorer.details}
    names = ["reward", "score", "kl_nats", "length", "eos_rate", "entropy", "gap", "count", *labels, *details]
    sums = torch.zeros(len(names), dtype=torch.float64, device=spread.device)
    for scored in (scored for minibatch in minibatches for scored in minibatch if scored.batch.members):
        batch = scored.batch
        parts = [scored.total, scored.scores, scored.kl, batch.is_response, batch.ended]
        parts += [scored.entropies, scored.gap, torch.ones_like(scored.total)]
        parts += [scored.rewards[label] for label in labels.values()]
        parts += [scored.details[name] for name in details.values()]
        sums += torch.stack([part.double().sum() for part in parts])
    found = dict(zip(names, spread.sum(sums).tolist(), strict=True))
    count, tokens = found["count"], found["length"]
    figures = {name: found[name] / count for name in ("reward", "score", "kl_nats", "length", "eos_rate")}
    figures |= {"entropy_nats": found["entropy"] / tokens, "engine_gap_nats": found["gap"] / tokens}
    if len(labels) > 1 or details:
        figures |= {name: found[name] / count for name in (*labels, *details)}
    return figures


if __name__ == "__main__":
    program(main, PPORecipe)
