"""Preference pairs for the reward model: read, audited and encoded as both sides' token ids."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from baton.data import Loaded, load, mix, report
from baton.data.turns import Messages
from baton.errors import UserError
from baton.recipe import RewardRecipe
from baton.run import Run
from reward.audit import Placed, audit, check_leakage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Use = Literal["train", "eval"]


@dataclass(frozen=True)
class Pair:
    """One encoded preference."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    shared: int  # so many tokens both sides begin with; below the length of either, so that each has an end of its own
    prompt: Messages
    chosen: Messages
    rejected: Messages
    source: str  # the data source's path as the recipe gives it
    turns: int  # user turns of the prompt
    margin: float | None = None
    is_tie: bool = False


@dataclass(frozen=True)
class PairRows:
    """The rows of both uses, mixed by weight, and what their audit found, as metrics `data/…` for the manifest."""

    train: list[dict[str, Any]]
    eval: list[dict[str, Any]]
    facts: dict[str, float]


def read_all_pairs(run: Run[RewardRecipe]) -> PairRows:
    """Training and held-out rows, audited, with no prompt in both; prints what was found.

    A row is a normalised preference row with its `source`. Raises UserError for unreadable data, and for leakage.
    """
    data = run.recipe.data
    train, eval_ = _load(run, "train"), _load(run, "eval")
    kept, found = audit(_placed(train), data.repeated)
    held_out, found_held_out = audit(_placed(eval_), data.repeated)
    run.say(found.report("train", data.repeated))
    if eval_:
        run.say(found_held_out.report("eval", data.repeated))
    clean = check_leakage(kept, held_out, data.leakage)
    if leaked := len(kept) - len(clean):
        run.say(f"train: {leaked:,} of {len(kept):,} pairs left out: their prompts are held out")
    facts = found.facts("train") | (found_held_out.facts("eval") if eval_ else {}) | {"data/train/leaked": leaked}
    return PairRows(_mixed(run, train, clean), _mixed(run, eval_, held_out), facts)


def _load(run: Run[RewardRecipe], use: Use) -> list[Loaded]:
    """The sources of one use, each row with its `source`; prints what was kept and dropped."""
    loaded = [load(source, run.recipe.folder, "preference") for source in getattr(run.recipe.data, use)]
    for item in loaded:
        for row in item.rows:
            row["source"] = item.fingerprint["path"]
    if loaded:
        run.say(report(loaded))
    return loaded


def _placed(loaded: list[Loaded]) -> list[Placed]:
    return [
        Placed(row, file, number, source)
        for source, item in enumerate(loaded)
        for row, (file, number) in zip(item.rows, item.places, strict=True)
    ]


def _mixed(run: Run[RewardRecipe], loaded: list[Loaded], kept: list[Placed]) -> list[dict[str, Any]]:
    """One epoch of the rows that were kept, by the weights of their sources; a source without any is left out."""
    rows: list[list[dict[str, Any]]] = [[] for _ in loaded]
    for item in kept:
        rows[item.source] += turn_by_turn(item.row) if run.recipe.data.every_turn else [item.row]
    if kept and run.recipe.data.every_turn and sum(map(len, rows)) == len(kept):
        raise UserError(
            "data.every_turn would be ignored: no pair has replies of more than one turn; leave it out of the recipe"
        )
    return mix([replace(item, rows=own) for item, own in zip(loaded, rows, strict=True) if own], run.recipe.train.seed)


def turn_by_turn(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The pairs of prefixes of a pair whose replies have several turns: both cut after each turn of the assistant's.

    The judgement is taken to hold for every prefix. Cut only where the user has said the same on both sides so far and
    the assistant has not; the last pair is the whole one.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    prefixes = []
    for end in range(1, max(len(chosen), len(rejected))):
        sides = chosen[:end], rejected[:end]
        roles = [side[-1]["role"] for side in sides]
        asked = [[turn for turn in side if turn["role"] != "assistant"] for side in sides]
        if (
            len(sides[0]) == len(sides[1])
            and roles == ["assistant"] * 2
            and asked[0] == asked[1]
            and sides[0] != sides[1]
        ):
            prefixes.append({**row, "chosen": sides[0], "rejected": sides[1]})
    return [*prefixes, row]


def encode_pairs(
    run: Run[RewardRecipe], tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], use: Use
) -> list[Pair]:
    """Both sides as the reward model reads them; a pair with a side over `max_length` tokens is dropped and counted."""
    from baton.chat import CannotRenderError, has_control_text

    refused: Counter[str] = Counter()
    pairs: list[Pair] = []
    limit = run.recipe.train.max_length
    num_long = num_control = 0
    for row in rows:
        if has_control_text(tokenizer, row["prompt"] + row["chosen"] + row["rejected"]):
            num_control += 1
            continue
        try:
            pair = encode_pair(tokenizer, row)
        except CannotRenderError as fault:
            refused[fault.reason] += 1
            continue
        if max(len(pair.chosen_ids), len(pair.rejected_ids)) > limit:
            num_long += 1
            continue
        pairs.append(pair)
    if rows and not pairs:
        raise UserError(
            f"data.{use}: none of {len(rows):,} pairs is left: all have a side longer than train.max_length = {limit} "
            "tokens; raise it"
        )
    if rows:
        run.say(
            f"{use}: {len(pairs):,} pairs; {num_long:,} longer than {limit} tokens dropped, "
            f"{num_control:,} that spell out a special token dropped"
        )
    for reason, count in refused.most_common():
        run.say(f"{use}: {count:,} pairs dropped because {reason}")
    return pairs


def encode_pair(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> Pair:
    """A normalised preference row as token ids."""
    from baton.chat import encode_scored

    chosen = encode_scored(tokenizer, row["prompt"] + row["chosen"])
    rejected = encode_scored(tokenizer, row["prompt"] + row["rejected"])
    return Pair(
        chosen_ids=chosen,
        rejected_ids=rejected,
        shared=shared_tokens(chosen, rejected),
        prompt=row["prompt"],
        chosen=row["chosen"],
        rejected=row["rejected"],
        source=row.get("source", ""),
        turns=sum(message["role"] == "user" for message in row["prompt"]),
        margin=row.get("margin"),
        is_tie=bool(row.get("is_tie")),
    )


def shared_tokens(chosen: list[int], rejected: list[int]) -> int:
    """How many tokens both sequences begin with, leaving each at least its last one."""
    # found in the ids and not from the rendered prompt: a tokenizer may merge over the prompt's end
    same = sum(1 for _ in takewhile(lambda ids: ids[0] == ids[1], zip(chosen, rejected, strict=False)))
    return min(same, len(chosen) - 1, len(rejected) - 1)
