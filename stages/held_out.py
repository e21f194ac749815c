"""The policy and the reference on held-out prompts: sampled, scored and compared, each rank with its share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stages.evaluation import Judged, judge, summarise, win_rate
from stages.prompts import PromptRow
from stages.roles import POLICY, REFERENCE, Roles
from stages.rollout import Episode, sample_with
from stages.scoring import GOLD, Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EPISODES_FROM = 1 << 40
"""Held-out rollouts take their sampling noise from here on, away from training's."""


class HeldOut:
    """The same prompts and the same noise at every evaluation; the reference is judged once."""

    def __init__(
        self, prompts: list[PromptRow], scorer: Scorer, roles: Roles, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.prompts, self.scorer, self.roles, self.tokenizer = prompts, scorer, roles, tokenizer
        self.spread, self.recipe = scorer.spread, scorer.recipe
        self._reference: list[Judged] | None = None

    @property
    def reference(self) -> list[Judged]:
        """The reference's replies, judged. A collective the first time."""
        if self._reference is None:
            self._reference = self.rows(REFERENCE)
        return self._reference

    def measure(self) -> tuple[dict[str, float], list[Judged]]:
        """(eval/… of the policy and, with `_before`, of the reference; the policy's rows). A collective."""
        before = self.reference
        rows = self.rows(POLICY)
        metrics = {f"{key}_before": value for key, value in summarise(before).items()}
        return metrics | summarise(rows) | win_rate(rows, before), rows

    def rows(self, role: str) -> list[Judged]:
        """All held-out prompts under `role`, in order. A collective."""
        from baton.chat import stop_ids

        rollout = self.recipe.rollout
        world, rank = self.spread.world, self.spread.rank
        # a rank without a prompt of its own takes the first: all ranks make the same number of forward passes
        mine = list(range(rank, len(self.prompts), world)) or [0]
        chosen = [self.prompts[at] for at in mine]
        with self.spread.gathered(), self.roles.sampling(role) as model:
            replies = sample_with(
                model,
                [row.ids for row in chosen],
                [EPISODES_FROM + at for at in mine],
                seed=self.recipe.train.seed,
                temperature=rollout.temperature,
                max_new_tokens=rollout.max_new_tokens,
                stop_ids=stop_ids(self.tokenizer),
                pad_id=self.scorer.pad_id,
                rows=rollout.rows,
            )
        episodes = [Episode(at, row.ids, reply) for at, row, reply in zip(mine, chosen, replies, strict=True)]
        judged = self._judged(role, episodes, chosen)
        found = dict(
            pair for part in self.spread.collect(dict(zip(mine, judged, strict=True))) for pair in part.items()
        )
        return [found[at] for at in range(len(self.prompts))]

    def _judged(self, role: str, episodes: list[Episode], rows: list[PromptRow]) -> list[Judged]:
        gold = [GOLD] if self.recipe.gold is not None else []
        labels = [*self.scorer.weights, *gold]
        texts = self.scorer.judge(episodes, rows, labels)
        kl = torch.zeros(len(episodes))
        raw, shaped = ({label: torch.zeros(len(episodes)) for label in labels} for _ in range(2))
        details = {name: torch.zeros(len(episodes)) for name in self.scorer.details}
        with torch.no_grad(), self.spread.computing():
            for batch in self.scorer.groups(episodes):
                ours = self.roles.logprobs(role, batch).logprobs
                theirs = ours if role == REFERENCE else self.roles.logprobs(REFERENCE, batch).logprobs
                rewards = self.scorer.rewards_of(batch, rows, texts, labels)
                if batch.members:
                    kl[batch.members] = (ours - theirs).sum(-1).float().cpu()
                    pairs = ((raw, rewards.raw), (shaped, rewards.shaped), (details, rewards.details))
                    for columns, found in pairs:
                        for name in columns:
                            columns[name][batch.members] = found[name].float().cpu()

        def text(ids: list[int]) -> str:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))

        def judged() -> list[Judged]:
            return judge(
                [text(episode.prompt) for episode in episodes],
                [text(episode.reply.ids) for episode in episodes],
                {label: raw[label].tolist() for label in self.scorer.weights},
                self.scorer.weights,
                kl.tolist(),
                [len(episode.reply.ids) for episode in episodes],
                [episode.reply.ended for episode in episodes],
                shaped[GOLD].tolist() if gold else None,
                shaped={label: shaped[label].tolist() for label in self.scorer.weights},
                details={name: column.tolist() for name, column in details.items()},
            )

        return list(self.spread.together(judged))
