"""What the replies of SFT's model score: one greedy reply a prompt, made and scored once, kept in the checkpoints."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from baton.decode import decode
from baton.recipe import PPORecipe
from stages.prompts import PromptRow
from stages.roles import REFERENCE
from stages.rollout import Episode, episode_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.scoring import Scorer

Scores = dict[str, list[float]]
"""label -> each member's score, less what the reply's length is worth."""


def prompts_of_run(recipe: PPORecipe, prompts: Sequence[PromptRow]) -> list[PromptRow]:
    """The training prompts that some step takes, each once."""
    count = recipe.train.steps * recipe.train.episodes_per_batch
    if count >= len(prompts):
        return list(prompts)
    return [prompts[at] for at in sorted(set(episode_prompts(recipe.train.seed, len(prompts), 0, count)))]


class References:
    """Scores of the reference's replies by prompt. Floats, and their JSON, hold a score exactly."""

    def __init__(self) -> None:
        self.scores: dict[str, Scores] = {}

    def prepare(
        self,
        scorer: Scorer,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[PromptRow],
        labels: Sequence[str],
        say: Callable[[str], None],
    ) -> None:
        """Answer and score every prompt that is not known yet, each rank its share; says what it cost. A collective."""
        missing = {key: row for row in rows if not self.scores.get(key := prompt_key(row), {}).keys() >= set(labels)}
        if not missing or not labels:
            return
        begun = time.monotonic()
        # in one order everywhere: what a rank is given is the same however often a run is begun
        keys = list(missing)
        world, rank = scorer.spread.world, scorer.spread.rank
        mine = keys[rank::world] or keys[:1]  # all ranks make the same number of forward passes
        chosen = [missing[key] for key in mine]
        episodes = _answer(scorer, tokenizer, chosen)
        found = _score(scorer, episodes, chosen, labels)
        counts = [sum(len(episode.reply.ids) for episode in episodes) if keys[rank::world] else 0]
        for part in scorer.spread.collect(dict(zip(mine, found, strict=True))):
            for key, scores in part.items():
                self.scores[key] = self.scores.get(key, {}) | scores
        tokens = sum(count for part in scorer.spread.collect(counts) for count in part)
        say(
            f"shape: reference: SFT's model answered {len(keys):,} prompts with {tokens:,} tokens, scored by "
            f"{', '.join(labels)}: {time.monotonic() - begun:.1f} s, once in a run"
        )

    def of(self, label: str, rows: Sequence[PromptRow]) -> list[list[float]]:
        """Each member's scores (K lists of N) of the reference's replies to `rows`."""
        known = [self.scores[prompt_key(row)][label] for row in rows]
        return [list(member) for member in zip(*known, strict=True)]


def prompt_key(row: PromptRow) -> str:
    """What decides a prompt's reply and its reward: ids, messages, columns."""
    content = json.dumps([row.ids, row.messages, row.columns], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _answer(scorer: Scorer, tokenizer: PreTrainedTokenizerBase, rows: Sequence[PromptRow]) -> list[Episode]:
    """SFT's likeliest reply to each prompt, token by token."""
    from baton.chat import stop_ids

    rollout = scorer.recipe.rollout
    with scorer.spread.gathered(), scorer.roles.sampling(REFERENCE) as model:
        replies = decode(
            model,
            [row.ids for row in rows],
            max_new_tokens=rollout.max_new_tokens,
            stop_ids=stop_ids(tokenizer),
            pad_id=scorer.pad_id,
            max_rows=rollout.rows,
        )
    return [Episode(at, row.ids, reply) for at, (row, reply) in enumerate(zip(rows, replies, strict=True))]


@torch.no_grad()
def _score(
    scorer: Scorer, episodes: Sequence[Episode], rows: Sequence[PromptRow], labels: Sequence[str]
) -> list[Scores]:
    judged = scorer.judge(episodes, rows, labels)
    found: list[Scores] = [{} for _ in episodes]
    scored: list[Any] = []
    with scorer.spread.computing():
        for batch in scorer.groups(episodes):
            members = scorer.members_of(batch, judged, labels)
            if not batch.members:
                continue
            scored.append((batch, members))
            tokens = batch.is_response.sum(-1)
            for label, scores in members.items():
                columns = scorer.shapings[label].by_length(scores, tokens).T.tolist()
                for at, column in zip(batch.members, columns, strict=True):
                    found[at][label] = column

    def check() -> None:
        for batch, members in scored:
            scorer.check_finite(batch, {label: scores.sum(0) for label, scores in members.items()})

    scorer.spread.together(check)
    return found
