"""Episodes scored: old log-probabilities by the training forward, reference, values, rewards by component, the KL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from baton.build import reward_roles, shares_base
from baton.errors import UserError
from baton.ppo_sections import RewardSource
from baton.recipe import PPORecipe
from baton.registry import Version
from baton.registry.compatibility import differences
from baton.run import Run
from reward.combine import Shaping, deviation
from reward.sources import Sample, Source, checked_members, open_sources
from stages.engines.agreement import check_engine, importance_weights
from stages.micro_batch import MicroBatch, group_by_length, make_micro_batch
from stages.references import References
from stages.roles import REFERENCE, Forward, Roles
from stages.rollout import Episode
from stages.shaping import shaping_of

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
    rewards: dict[str, torch.Tensor]  # (B,) by component: its own score, an ensemble's mean
    details: dict[str, torch.Tensor]  # (B,): what else is said of components, see `Scorer.details`
    total: torch.Tensor  # (B,): the weighted sum of what shaping makes of them
    engine: torch.Tensor  # the engine's log-probabilities; the trainer's where the engine gives none
    weights: torch.Tensor | None = None  # importance weights, for an engine with other numerics
    forward: Forward | None = None  # with its graph, for the update to begin with; values only of `critic: shared`
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


class Rewards(NamedTuple):
    """A micro-batch's rewards by component, (B,) each."""

    raw: dict[str, torch.Tensor]  # the component's own score; an ensemble's mean over members
    shaped: dict[str, torch.Tensor]  # what is optimised of it, before its weight
    details: dict[str, torch.Tensor]  # LABEL/shaped, LABEL/deviation and LABEL/member_0 …, where there is such a thing


def reward_settings(recipe: PPORecipe) -> dict[str, RewardSource]:
    """label -> setting of every reward, gold included."""
    found = {source.label: source for source in recipe.rewards}
    if GOLD in found:
        raise UserError(f"{recipe.path}: a reward is called {GOLD}, which is kept for the reward that is not optimised")
    return found | ({GOLD: recipe.gold} if recipe.gold is not None else {})


def reward_versions(run: Run[PPORecipe]) -> dict[str, list[Version]]:
    """label -> registry versions of every `model:` and `models:` reward, gold included."""
    settings = reward_settings(run.recipe)
    return {
        label: [run.inputs.versions[role] for role in reward_roles(run.recipe, setting)]
        for label, setting in settings.items()
        if setting.references
    }


def reward_shapings(run: Run[PPORecipe]) -> dict[str, Shaping]:
    """label -> what its scores go through. Raises UserError where a version lacks what a setting reads."""
    versions = reward_versions(run)
    sft = run.inputs.versions["sft"]
    return {
        label: shaping_of(label, setting, versions.get(label, []), sft)
        for label, setting in reward_settings(run.recipe).items()
    }


def on_base(sft: Version, versions: Sequence[Version]) -> bool:
    """Whether a reward's members all read the policy's ids on the policy's own base: then the roles score it."""
    return bool(versions) and all(shares_base(sft, version) for version in versions)


class Scorer:
    """All rewards of a run: those on the policy's base by its roles, the others by themselves."""

    def __init__(self, run: Run[PPORecipe], roles: Roles, tokenizer: PreTrainedTokenizerBase, spread: Any) -> None:
        recipe = run.recipe
        self.recipe, self.roles, self.tokenizer, self.spread = recipe, roles, tokenizer, spread
        self.device = run.state.device
        self.pad_id = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
        self.weights = {source.label: source.weight for source in recipe.rewards}
        self.aboard: list[str] = []  # labels that the roles score
        self.sources: dict[str, list[Source]] = {}  # label -> what scores the others
        self.shapings = reward_shapings(run)
        self.references = References()
        versions, sft = reward_versions(run), run.inputs.versions["sft"]
        for label, setting in reward_settings(recipe).items():
            theirs = versions.get(label, [])
            if (shaping := self.shapings[label]).deviation_penalty and not (shaping.scales or shaping.by_reference):
                run.say(
                    f"reward {label}: each member's scores are known but for a constant, and members that differ by it "
                    "count as disagreeing; normalise: sft or shape: reference takes it away"
                )
            if on_base(sft, theirs):
                self.aboard.append(label)
                continue
            self.sources[label] = open_sources(
                setting,
                registry=run.registry,
                versions=theirs,
                folder=recipe.folder,
                device=self.device,
                dtype=run.dtype,
                max_tokens=recipe.train.tokens_per_micro_batch,
            )
            for version in theirs:
                run.say(
                    f"{version.ref} has a base or tokenizer of its own: it reads replies as text, by its own template"
                )
                for difference in differences(sft, version):
                    run.say(f"  {difference}")

    @property
    def details(self) -> list[str]:
        """The figures beside the components' own that the optimised rewards have: the same on every rank."""
        return [name for label in self.weights for name in detail_names(label, self.shapings[label])]

    def by_reference(self, labels: Sequence[str]) -> list[str]:
        """Those that are measured against the reference's reply."""
        return [label for label in labels if self.shapings[label].by_reference]

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
    ) -> dict[str, list[list[float]]]:
        """Scores of the sources that are not aboard, by label and member; `rows` are the episodes' prompts."""
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
        return self.spread.together(
            lambda: {
                label: [member for source in self.sources[label] for member in checked_members(source, samples)]
                for label in foreign
            }
        )

    def check_finite(self, batch: MicroBatch, rewards: dict[str, torch.Tensor]) -> None:
        """Raises FloatingPointError with the row of the first reward that is no finite number."""
        for label, scores in rewards.items():
            if not torch.isfinite(scores).all():
                at = int((~torch.isfinite(scores)).nonzero()[0])
                text = self.tokenizer.decode(batch.input_ids[at, : int(batch.last[at]) + 1].tolist())
                raise FloatingPointError(f"the reward {label} of {text!r} is {float(scores[at])}")

    @torch.no_grad()
    def members_of(
        self, batch: MicroBatch, judged: dict[str, list[list[float]]], labels: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """label -> every member's scores (K, B) of one micro-batch, as they are."""
        found = {}
        for label in labels:
            if label in self.aboard:
                scores = self.roles.scores(label, batch)
                found[label] = scores if batch.members else torch.zeros_like(scores)
            else:
                rows = [[member[at] for at in batch.members] or [0.0] * len(batch.last) for member in judged[label]]
                found[label] = torch.tensor(rows, device=batch.last.device, dtype=torch.float32)
        return found

    @torch.no_grad()
    def rewards_of(
        self,
        batch: MicroBatch,
        rows: Sequence[PromptRow],
        judged: dict[str, list[list[float]]],
        labels: Sequence[str],
    ) -> Rewards:
        """All components of one micro-batch, shaped; `rows` are the prompts of all episodes that were grouped."""
        found = Rewards({}, {}, {})
        tokens = batch.is_response.sum(-1)
        for label, scores in self.members_of(batch, judged, labels).items():
            shaping = self.shapings[label]
            reference = None
            if shaping.by_reference:
                known = self.references.of(label, [rows[at] for at in batch.members])
                reference = torch.tensor(known, dtype=scores.dtype, device=scores.device) if known else scores
            each = shaping.each(scores, tokens, reference)
            found.raw[label], found.shaped[label] = scores.mean(0), shaping.combine(each)
            parts = [found.shaped[label]] if shaping.changes else []
            parts += [deviation(each), *scores] if shaping.members > 1 else []
            found.details.update(zip(detail_names(label, shaping), parts, strict=True))
        return found

    @torch.no_grad()
    def score(
        self, episodes: Sequence[Episode], rows: Sequence[PromptRow], *, keep_graph: bool = False
    ) -> list[Scored]:
        """One minibatch's episodes of this rank, scored.

        With `keep_graph` the first micro-batch, which the update begins with, keeps its forward pass: the old policy is
        the new one until the first step. It is computed last, so that no more than one graph lives at a time.
        """
        labels = list(self.weights)
        judged = self.judge(episodes, rows, labels)
        batches, late = self.groups(episodes), int(keep_graph)
        found: list[Scored] = []
        for batch in batches[late:] + batches[:late]:
            reference = self.roles.logprobs(REFERENCE, batch).logprobs
            rewards = self.rewards_of(batch, rows, judged, labels)
            total = sum((self.weights[label] * rewards.shaped[label] for label in labels), torch.zeros(()))
            kept = keep_graph and batch is batches[0]
            forward = self._forward(batch, graph=kept)
            logprobs, entropies, values = (tensor.detach() for tensor in forward)
            engine = engine_logprobs(episodes, batch, logprobs)
            scored = Scored(
                batch=batch,
                old_logprobs=logprobs,
                entropies=entropies,
                reference=reference,
                old_values=values,
                rewards=rewards.raw,
                details=rewards.details,
                total=total.to(logprobs),
                engine=engine,
                forward=forward if kept else None,
            )
            if self.recipe.rollout.importance_cap is not None:
                scored.weights = importance_weights(logprobs, engine, self.recipe.rollout.importance_cap)
            found.append(scored)
        found = found[-1:] + found[:-1] if late else found

        def check() -> None:
            for scored in found:
                self.check_finite(scored.batch, scored.rewards | scored.details)

        self.spread.together(check)  # after the forward passes, which all ranks make together
        return found

    def _forward(self, batch: MicroBatch, *, graph: bool) -> Forward:
        """Policy and values as the update computes them; a critic with passes of its own gets no graph."""
        slopes = graph and self.recipe.ppo.entropy_coefficient > 0
        if self.recipe.ppo.critic == "shared":
            with torch.set_grad_enabled(graph):
                return self.roles(batch, entropy_gradient=slopes)  # type: ignore[no-any-return]
        with torch.set_grad_enabled(graph):
            policy = self.roles.policy(batch, entropy_gradient=slopes)
        return Forward(*policy, self.roles.values(batch))

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


def detail_names(label: str, shaping: Shaping) -> list[str]:
    """What `Rewards.details` holds of a component."""
    names = [f"{label}/shaped"] if shaping.changes else []
    if shaping.members > 1:
        names += [f"{label}/deviation", *(f"{label}/member_{at}" for at in range(shaping.members))]
    return names
