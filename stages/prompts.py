"""The data of a PPO run as token ids: prompts with their rows' columns, questions, and text that is mixed in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from baton.chat import Messages
from baton.data import load, mix, report
from baton.errors import UserError
from baton.questions import Question
from baton.recipe import PPORecipe, Source
from baton.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EVAL_PROMPTS = 128
TextRow = tuple[list[int], list[bool]]
"""Token ids, and which of them are in the loss."""


@dataclass(frozen=True)
class PromptRow:
    """One prompt: as messages, as the ids that open the assistant's turn, and its row's further columns."""

    messages: Messages
    ids: list[int]
    columns: dict[str, Any]


@dataclass
class Prompts:
    """The data by use."""

    train: list[PromptRow]
    eval: list[PromptRow]
    questions: list[Question] = field(default_factory=list)
    ptx: list[TextRow] = field(default_factory=list)


def check_batch(run: Run[PPORecipe]) -> None:
    """Raises UserError when the batch does not split evenly into minibatches and over processes."""
    train, settings, world = run.recipe.train, run.recipe.ppo, run.state.num_processes
    share, left = divmod(train.episodes_per_batch, settings.minibatches * world)
    if left or not share:
        raise UserError(
            f"train.episodes_per_batch = {train.episodes_per_batch} cannot be split evenly into ppo.minibatches = "
            f"{settings.minibatches} on {world} processes"
        )


def read_prompts(run: Run[PPORecipe], tokenizer: PreTrainedTokenizerBase, questions: list[Question]) -> Prompts:
    """Read and encode everything; prints what was kept and dropped. Raises UserError when nothing is left."""
    data = run.recipe.data
    train, held_out = _rows(run, data.train, "train", "prompt"), _rows(run, data.eval, "eval", "prompt")
    return Prompts(
        train=_encode(run, tokenizer, train, "train"),
        eval=_some(run, _encode(run, tokenizer, held_out, "eval")),
        questions=questions,
        ptx=_ptx(run, tokenizer),
    )


def _some(run: Run[PPORecipe], rows: list[PromptRow]) -> list[PromptRow]:
    if len(rows) > EVAL_PROMPTS:
        run.say(f"eval: measuring on the first {EVAL_PROMPTS} of {len(rows):,} prompts")
    return rows[:EVAL_PROMPTS]


def _rows(run: Run[PPORecipe], sources: list[Source], use: str, kind: str) -> list[dict[str, Any]]:
    loaded = [load(source, run.recipe.folder, kind) for source in sources]
    if loaded:
        run.say(f"{use}: {report(loaded)}")
    return mix(loaded, run.recipe.train.seed)


def _encode(
    run: Run[PPORecipe], tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], use: str
) -> list[PromptRow]:
    """Rendered prompts that open the assistant's turn; those over `max_prompt_tokens` are dropped and counted."""
    from baton.chat import CannotRenderError, encode_prompt, has_control_text

    limit = run.recipe.rollout.max_prompt_tokens
    plain = [row for row in rows if not has_control_text(tokenizer, row["prompt"])]
    if len(plain) < len(rows):
        run.say(f"{use}: {len(rows) - len(plain):,} prompts that spell out a special token dropped")
    encoded: list[PromptRow] = []
    refused: Counter[str] = Counter()
    for row in plain:
        try:
            encoded.append(PromptRow(row["prompt"], encode_prompt(tokenizer, row["prompt"]), row["columns"]))
        except CannotRenderError as fault:
            refused[fault.reason] += 1
    for reason, count in refused.most_common():
        run.say(f"{use}: {count:,} prompts dropped because {reason}")
    kept = [row for row in encoded if len(row.ids) <= limit]
    if rows and not kept:
        raise UserError(
            f"data.{use}: none of {len(rows):,} prompts is left: all are longer than rollout.max_prompt_tokens = "
            f"{limit}, which could be raised, spell out a special token, or are refused by the chat template"
        )
    if len(kept) < len(encoded):
        run.say(f"{use}: {len(encoded) - len(kept):,} prompts longer than {limit} tokens dropped")
    return kept


def _ptx(run: Run[PPORecipe], tokenizer: PreTrainedTokenizerBase) -> list[TextRow]:
    """Documents, all of them in the loss, and dialogues, the assistant's turns; in pieces of an episode's length."""
    from baton.chat import encode_dialogue, has_control_text

    recipe = run.recipe
    limit = recipe.rollout.max_prompt_tokens + recipe.rollout.max_new_tokens
    rows: list[TextRow] = []
    for source in recipe.data.ptx:
        is_text = source.format in ("text", "lines") or source.path.endswith((".txt", ".txt.gz", ".txt.zst"))
        for row in _rows(run, [source], "ptx", "text" if is_text else "dialogue"):
            if is_text:
                ids = list(tokenizer(row["text"], add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
                pieces = [ids[at : at + limit] for at in range(0, len(ids), limit)]
                rows += [(piece, [True] * len(piece)) for piece in pieces if len(piece) > 1]
            elif not has_control_text(tokenizer, row["messages"], row.get("tools")):
                ids, in_loss = encode_dialogue(tokenizer, row["messages"], row.get("tools"))
                if any(in_loss[1:limit]):
                    rows.append((ids[:limit], in_loss[:limit]))
    if recipe.data.ptx and not rows:
        raise UserError("data.ptx: no row is left that has a token to train on")
    return rows
