"""Episodes scored: old log-probabilities by the training forward, reference, values, rewards by component, the KL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from baton.build import reward_role, shares_base
from baton.errors import UserError
from baton.recipe import PPORecipe
from baton.registry.compatibility import differences
from baton.run import Run
from reward.sources import Sample, Source, checked, open_source
from stages.engines.agreement import check_engine, importance_weights
from stages.micro_batch import MicroBatch, group_by_length, make_micro_batch
from stages.roles import REFERENCE, Roles
from stages.rollout import Episode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.prompts import PromptRow

GOLD = "gold"
DRIFT_NATS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.15}
"""How far engine and trainer may be apart on average by rounding alone. In bfloat16 a logit of 20 is a multiple of 1/8:
0.045 nats a token were seen between cached decoding and whole rows of one and the same model."""


@dataclass
class Scored:
    """A micro-batch of episodes with everything that the update needs; tensors (B, T) unless said otherwise."""

    batch: MicroBatch
    old_logprobs: torch.Tensor
    entropies: torch.Tensor
    reference: torch.Tensor  # log-probabilities under the reference
    old_values: torch.Tensor  # (B, S)
    rewards: dict[str, torch.Tensor]  # (B,) by component, before weights
    total: torch.Tensor  # (B,), their weighted sum
    engine: torch.Tensor  # the engine's log-probabilities; the trainer's where the engine gives none
    weights: torch.Tensor | None = None  # importance weights, for an engine with other numerics
    scores: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # (B,): what is optimised
    advantages: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # (B, S)
    returns: torch.Tensor = field(default_factory=lambda: torch.zeros(0))  # (B, S)

    @property
    def gap(self) -> torch.Tensor:
        """How far engine and trainer are apart in nats (B, T)."""
        return (self.engine - self.old_logprobs).abs()

    @property
    def kl(self) -> torch.Tensor:
        """log pi - log pi_ref of the sampled tokens (B, T)."""
        return self.old_logprobs - self.reference


def reward_versions(run: Run[PPORecipe]) -> dict[str, Any]:
    """label -> registry version of every `model:` reward, gold included."""
    recipe = run.recipe
    found = {s.label: run.inputs.versions[reward_role(recipe, s)] for s in recipe.rewards if s.model}
    if recipe.gold is not None and recipe.gold.model:
        found[GOLD] = run.inputs.versions[reward_role(recipe, recipe.gold)]
    return found


class Scorer:
    """All rewards of a run: those on the policy's base by its roles, the others by themselves."""

    def __init__(self, run: Run[PPORecipe], roles: Roles, tokenizer: PreTrainedTokenizerBase, spread: Any) -> None:
        recipe = run.recipe
        self.recipe, self.roles, self.tokenizer, self.spread = recipe, roles, tokenizer, spread
        self.device = run.state.device
        self.pad_id = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
        self.weights = {source.label: source.weight for source in recipe.rewards}
        self.aboard: list[str] = []  # labels that the roles score
        self.sources: dict[str, Source] = {}  # label -> what scores the others
        versions, sft = reward_versions(run), run.inputs.versions["sft"]
        wanted = {source.label: source for source in recipe.rewards}
        wanted |= {GOLD: recipe.gold} if recipe.gold is not None else {}
        if GOLD in self.weights:
            raise UserError(
                f"{recipe.path}: a reward is called {GOLD}, which is kept for the reward that is not optimised"
            )
        for label, setting in wanted.items():
            version = versions.get(label)
            if version is not None and shares_base(sft, version):
                self.aboard.append(label)
                continue
            self.sources[label] = open_source(
                setting,
                registry=run.registry,
                version=version,
                folder=recipe.folder,
                device=self.device,
                dtype=run.dtype,
                max_tokens=recipe.train.tokens_per_micro_batch,
            )
            if version is not None:
                run.say(
                    f"{version.ref} has a base or tokenizer of its own: it reads replies as text, by its own template"
                )
                for difference in differences(sft, version):
                    run.say(f"  {difference}")

    def groups(self, episodes: Sequence[Episode]) -> list[MicroBatch]:
        """Micro-batches under the token budget, as many on every rank."""
        lengths = [len(episode.prompt) + len(episode.reply.ids) for episode in episodes]
        budget = self.recipe.train.tokens_per_micro_batch
        groups = group_by_length(lengths, budget)
        count = self.spread.maximum(len(groups))
        if len(groups) < count:
            groups = group_by_length(lengths, budget, count)
        after = self.recipe.ppo.score_after_eos
        batches = [
            make_micro_batch(episodes, group, self.pad_id, score_after_eos=after).to(self.device) for group in groups
        ]
        return batches + [batches[-1].blank() for _ in range(count - len(batches))]

    def judge(
        self, episodes: Sequence[Episode], rows: Sequence[PromptRow], labels: Sequence[str]
    ) -> dict[str, list[float]]:
        """Rewards of the sources that are not aboard, by label; `rows` are the episodes' prompts."""
        foreign = [label for label in labels if label in self.sources]
        if not foreign:
            return {}
        samples = [
            Sample(
                prompt=row.messages,
                prompt_ids=episode.prompt,
                response_ids=episode.reply.ids,
                response=str(self.tokenizer.decode(episode.reply.ids, skip_special_tokens=True)),
                columns=row.columns,
            )
            for episode, row in zip(episodes, rows, strict=True)
        ]
        return self.spread.together(lambda: {label: checked(self.sources[label], samples) for label in foreign})

    def check_finite(self, batch: MicroBatch, rewards: dict[str, torch.Tensor]) -> None:
        """Raises FloatingPointError with the row of the first reward that is no finite number."""
        for label, scores in rewards.items():
            if not torch.isfinite(scores).all():
                at = int((~torch.isfinite(scores)).nonzero()[0])
                text = self.tokenizer.decode(batch.input_ids[at, : int(batch.last[at]) + 1].tolist())
                raise FloatingPointError(f"the reward {label} of {text!r} is {float(scores[at])}")

    @torch.no_grad()
    def rewards_of(
        self, batch: MicroBatch, judged: dict[str, list[float]], labels: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """label -> (B,) of one micro-batch."""
        found = {}
        for label in labels:
            if label in self.aboard:
                scores = self.roles.scores(label, batch)
                found[label] = scores if batch.members else scores.new_zeros(len(scores))
            else:
                rows = [judged[label][at] for at in batch.members] or [0.0] * len(batch.last)
                found[label] = torch.tensor(rows, device=batch.last.device, dtype=torch.float32)
        return found

    @torch.no_grad()
    def score(self, episodes: Sequence[Episode], rows: Sequence[PromptRow]) -> list[Scored]:
        """One minibatch's episodes of this rank, scored."""
        labels = list(self.weights)
        judged = self.judge(episodes, rows, labels)
        found = []
        for batch in self.groups(episodes):
            old = self.roles(batch)
            reference = self.roles.logprobs(REFERENCE, batch).logprobs
            rewards = self.rewards_of(batch, judged, labels)
            total = sum((self.weights[label] * rewards[label] for label in labels), torch.zeros(()))
            engine = engine_logprobs(episodes, batch, old.logprobs)
            scored = Scored(
                batch=batch,
                old_logprobs=old.logprobs,
                entropies=old.entropies,
                reference=reference,
                old_values=old.values,
                rewards=rewards,
                total=total.to(old.logprobs),
                engine=engine,
            )
            if self.recipe.rollout.importance_cap is not None:
                scored.weights = importance_weights(old.logprobs, engine, self.recipe.rollout.importance_cap)
            found.append(scored)

        def check() -> None:
            for scored in found:
                self.check_finite(scored.batch, scored.rewards)

        self.spread.together(check)  # after the forward passes, which all ranks make together
        return found

    def check_agreement(self, batches: Sequence[Scored], gap_nats: float) -> None:
        """Stop where the engine samples from another policy than the one that is trained.

        `gap_nats` is the mean over the whole batch on all ranks: so all of them stop, or none does.
        """
        limit = self.recipe.rollout.drift_nats or DRIFT_NATS[self.roles.arithmetic]
        if gap_nats <= limit:
            return
        pairs = [
            (scored.engine[at][mask], scored.old_logprobs[at][mask])
            for scored in batches
            for at, mask in enumerate(scored.batch.is_response)
        ]
        check_engine([ours.tolist() for ours, _ in pairs], [theirs.tolist() for _, theirs in pairs], limit)
        raise UserError(
            f"the rollout engine and the trainer disagree about the sampled tokens: {gap_nats:.4g} nats a token on "
            f"average over all processes (at most {limit:g}; see rollout.drift_nats)"
        )


def engine_logprobs(episodes: Sequence[Episode], batch: MicroBatch, trainer: torch.Tensor) -> torch.Tensor:
    """The engine's log-probabilities (B, T) of its own tokens; the trainer's where the engine gives none."""
    found = trainer.clone()
    for at, member in enumerate(batch.members):
        given = episodes[member].reply.logprobs
        assert len(given) in (0, len(episodes[member].reply.ids))
        if given:
            found[at, : len(given)] = torch.tensor(given, dtype=found.dtype, device=found.device)
    return found
