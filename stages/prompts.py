"""The prompts of a PPO run as token ids, how a batch of them is split, and how a role replies to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from baton.data import load, mix, report
from baton.errors import UserError
from baton.questions import Question
from baton.recipe import PPORecipe, Source
from baton.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from stages.roles import Roles
    from stages.rollout import Episode

EVAL_PROMPTS = 128


@dataclass
class Prompts:
    """Token ids of the prompts by use, and the questions asked before and after."""

    train: list[list[int]]
    eval: list[list[int]]
    questions: list[Question] = field(default_factory=list)


def micro_batch_size(run: Run[PPORecipe]) -> int:
    """Episodes a micro-batch; raises UserError when the batch does not split evenly."""
    train, settings, world = run.recipe.train, run.recipe.ppo, run.state.num_processes
    share, left = divmod(train.episodes_per_batch, settings.minibatches * world)
    if left or not share:
        raise UserError(
            f"train.episodes_per_batch = {train.episodes_per_batch} cannot be split evenly into ppo.minibatches = "
            f"{settings.minibatches} on {world} processes"
        )
    most = min(train.episodes_per_micro_batch or share, share)
    return max(size for size in range(1, most + 1) if share % size == 0)


def read_prompts(run: Run[PPORecipe]) -> dict[str, list[dict[str, Any]]]:
    """{"train", "eval"} -> prompt rows; prints what was kept and dropped."""
    data = run.recipe.data

    def read(sources: list[Source], use: str) -> list[dict[str, Any]]:
        loaded = [load(source, run.recipe.folder, "prompt") for source in sources]
        if loaded:
            run.say(f"{use}: {report(loaded)}")
        return mix(loaded, run.recipe.train.seed)

    return {"train": read(data.train, "train"), "eval": read(data.eval, "eval")}


def encode_prompts(
    run: Run[PPORecipe],
    tokenizer: PreTrainedTokenizerBase,
    rows: dict[str, list[dict[str, Any]]],
    questions: list[Question],
) -> Prompts:
    """Rendered prompts that open the assistant's turn; those over `max_prompt_tokens` are dropped and counted."""
    from baton.chat import encode_prompt, has_control_text

    limit = run.recipe.rollout.max_prompt_tokens
    kept: dict[str, list[list[int]]] = {}
    for use in ("train", "eval"):
        plain = [row["prompt"] for row in rows[use] if not has_control_text(tokenizer, row["prompt"])]
        if len(plain) < len(rows[use]):
            run.say(f"{use}: {len(rows[use]) - len(plain):,} prompts that spell out a special token dropped")
        encoded = [encode_prompt(tokenizer, prompt) for prompt in plain]
        kept[use] = [ids for ids in encoded if len(ids) <= limit]
        if encoded and not kept[use]:
            raise UserError(
                f"data.{use}: none of {len(encoded):,} prompts is left: all are longer than "
                "rollout.max_prompt_tokens = "
                f"{limit}; raise it"
            )
        if len(kept[use]) < len(encoded):
            run.say(f"{use}: {len(encoded) - len(kept[use]):,} prompts longer than {limit} tokens dropped")
    return Prompts(kept["train"], kept["eval"][:EVAL_PROMPTS], questions)


def sample(
    recipe: PPORecipe,
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    indices: list[int],
    role: str,
) -> list[Episode]:
    """One sampled reply a prompt; `indices` choose the noise."""
    import numpy as np

    from baton.chat import stop_ids
    from stages.rollout import Episode, sample_replies, sampling_noise

    rollout = recipe.rollout
    noise = np.stack([sampling_noise(recipe.train.seed, index, rollout.max_new_tokens) for index in indices])
    with roles.acting_as(role) as model:
        replies = sample_replies(
            model,
            prompts,
            noise,
            temperature=rollout.temperature,
            max_new_tokens=rollout.max_new_tokens,
            stop_ids=stop_ids(tokenizer),
            pad_id=int(tokenizer.pad_token_id),  # type: ignore[arg-type]
        )
    return [Episode(index, prompt, reply) for index, prompt, reply in zip(indices, prompts, replies, strict=True)]
