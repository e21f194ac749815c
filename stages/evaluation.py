"""Held-out prompts: what the policy and the reference are measured by, who wins, the best step, and samples."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward.knowledge.accuracy import wilson

if TYPE_CHECKING:
    from rich.table import Table

SHOWN_CHARACTERS = 240
"""A text of the printed table is shortened to so many; samples.jsonl holds all of it."""


@dataclass(frozen=True)
class Judged:
    """One held-out prompt under one role."""

    prompt: str
    reply: str
    rewards: dict[str, float]  # label -> the component's own score, no penalty, no shaping and no weight
    reward: float  # the weighted sum of what shaping makes of them: what PPO optimises
    gold: float | None  # by a reward that is never optimised
    kl_nats: float  # log pi - log pi_ref, summed over the reply
    length: int  # tokens of the reply, the stop token included
    ended: bool
    details: dict[str, float] = field(default_factory=dict)  # LABEL/shaped, LABEL/deviation, LABEL/member_0 …


def judge(
    prompts: Sequence[str],
    replies: Sequence[str],
    rewards: Mapping[str, Sequence[float]],
    weights: Mapping[str, float],
    kl_nats: Sequence[float],
    lengths: Sequence[int],
    ended: Sequence[bool],
    gold: Sequence[float] | None = None,
    shaped: Mapping[str, Sequence[float]] | None = None,
    details: Mapping[str, Sequence[float]] | None = None,
) -> list[Judged]:
    """Rows from columns, one value a prompt each; rewards and weights by component label.

    `shaped` is what the weights apply to, the rewards themselves unless given; `details` are reported as they are.

    Raises FloatingPointError, with the row, where a reward is not finite: it would hide in a mean.
    """
    shaped, details = rewards if shaped is None else shaped, details or {}
    assert rewards.keys() == weights.keys() == shaped.keys(), "every component has a weight"
    rows = []
    columns = zip(prompts, replies, kl_nats, lengths, ended, strict=True)
    given = (*rewards.values(), *shaped.values(), *details.values(), *([gold] if gold is not None else []))
    assert all(len(column) == len(prompts) for column in given)
    for at, (prompt, reply, kl, length, done) in enumerate(columns):
        scores = {label: float(column[at]) for label, column in rewards.items()}
        golden = None if gold is None else float(gold[at])
        for label, score in [*scores.items(), ("gold", golden)]:
            if score is not None and not math.isfinite(score):
                raise FloatingPointError(
                    f"the reward {label} of a held-out reply is {score}; prompt {prompt!r}, reply {reply!r}"
                )
        total = sum(weights[label] * float(column[at]) for label, column in shaped.items())
        if not math.isfinite(total):
            raise FloatingPointError(f"the shaped reward of a held-out reply is {total}; prompt {prompt!r}")
        more = {name: float(column[at]) for name, column in details.items()}
        rows.append(Judged(prompt, reply, scores, total, golden, float(kl), int(length), bool(done), more))
    return rows


def summarise(rows: Sequence[Judged]) -> dict[str, float]:
    """Means over the prompts; every component by itself where there are several, or it is an ensemble or shaped.

    `eval/gold_se` is the standard error of the gold mean over prompts: alarms compare falls with it.
    """
    assert rows, "nothing was judged"
    found = {"eval/reward": _mean([row.reward for row in rows])}
    if len(rows[0].rewards) > 1 or rows[0].details:
        found |= {f"eval/reward/{label}": _mean([row.rewards[label] for row in rows]) for label in rows[0].rewards}
        found |= {f"eval/reward/{name}": _mean([row.details[name] for row in rows]) for name in rows[0].details}
    gold = [row.gold for row in rows if row.gold is not None]
    if gold:
        assert len(gold) == len(rows), "all rows have a gold reward or none has"
        found["eval/gold"] = mean = _mean(gold)
        if len(gold) > 1:
            variance = math.fsum((score - mean) ** 2 for score in gold) / (len(gold) - 1)
            found["eval/gold_se"] = math.sqrt(variance / len(gold))
    found["eval/kl_nats"] = _mean([row.kl_nats for row in rows])
    found["eval/length"] = _mean([row.length for row in rows])
    found["eval/eos_rate"] = _mean([row.ended for row in rows])
    return found


def win_rate(policy: Sequence[Judged], reference: Sequence[Judged]) -> dict[str, float]:
    """How often the reward prefers the policy's reply to the reference's, prompt by prompt; a tie is half a win.

    Each pair is judged both ways round, and the verdicts are averaged. For a reward that scores one reply at a time,
    as all of Baton's do, the order cannot matter; so this is exact, and a pair that came out differently would count
    as a tie. Identical replies tie whatever their scores: they differ by the rounding of their micro-batches alone.

    `_low` and `_high` are Wilson's 95% interval (Wilson 1927). Half wins vary less than whole ones, so with ties it
    is a little too wide, never too narrow.
    """
    assert len(policy) == len(reference) > 0, "the same prompts for both"
    points, ties = 0.0, 0
    for ours, theirs in zip(policy, reference, strict=True):
        assert ours.prompt == theirs.prompt, "the same prompts in the same order for both"
        swapped = 1.0 - _preference(theirs, ours)
        verdict = (_preference(ours, theirs) + swapped) / 2
        points += verdict
        ties += verdict == 0.5
    rate = points / len(policy)
    low, high = wilson(rate, len(policy))
    return {
        "eval/win_rate": rate,
        "eval/win_rate_low": low,
        "eval/win_rate_high": high,
        "eval/tie_rate": ties / len(policy),
    }


class Best:
    """The step with the highest held-out reward among those within the KL budget (None: any KL).

    Where two are equal the earlier stays: it has spent less. The highest of many noisy means flatters itself; a figure
    to be quoted is measured on prompts that did not choose the step.
    """

    def __init__(self, kl_budget_nats: float | None) -> None:
        self.kl_budget_nats = kl_budget_nats
        self.step: int | None = None
        self.metrics: dict[str, float] = {}

    def offer(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether `step`, with its `eval/reward` and `eval/kl_nats`, is the new best."""
        reward, kl_nats = metrics["eval/reward"], metrics["eval/kl_nats"]
        if self.kl_budget_nats is not None and not kl_nats <= self.kl_budget_nats:
            return False
        if not math.isfinite(reward) or (self.step is not None and reward <= self.metrics["eval/reward"]):
            return False
        self.step = step
        self.metrics = {key: value for key, value in metrics.items() if key.startswith("eval/")}
        return True

    def state(self) -> dict[str, Any]:
        """Plain JSON for a checkpoint."""
        return {"step": self.step, "metrics": dict(self.metrics)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], kl_budget_nats: float | None) -> Best:
        """The inverse of `state`; the budget comes from the recipe."""
        best = cls(kl_budget_nats)
        best.step, best.metrics = state["step"], dict(state["metrics"])
        return best


def write_samples(path: Path, step: int, before: Sequence[Judged], after: Sequence[Judged], append: bool) -> None:
    """Write a line a prompt to samples.jsonl; `append` keeps the other steps' lines and replaces this step's.

    The file is written aside and renamed: whoever reads along sees whole lines.
    """
    kept = _lines(path, lambda seen: seen != step) if append else []
    for old, new in zip(before, after, strict=True):
        assert old.prompt == new.prompt, "the same prompts in the same order for both"
        row: dict[str, Any] = {"step": step, "prompt": new.prompt, "before": old.reply, "after": new.reply}
        row |= {"reward_before": old.reward, "reward": new.reward}
        row |= {"rewards_before": old.rewards, "rewards": new.rewards}
        if new.details:
            row |= {"details_before": old.details, "details": new.details}
        if new.gold is not None:
            row |= {"gold_before": old.gold, "gold": new.gold}
        row |= {"kl_nats": new.kl_nats, "length_before": old.length, "length": new.length}
        row |= {"ended_before": old.ended, "ended": new.ended}
        kept.append(json.dumps(row, ensure_ascii=False))
    _replace(path, kept)


def trim_samples(path: Path, step: int) -> None:
    """Forget the samples after `step`: a run that resumes there writes them again."""
    if path.is_file():
        _replace(path, _lines(path, lambda seen: seen <= step))


def sample_table(before: Sequence[Judged], after: Sequence[Judged], count: int) -> Table:
    """The first `count` prompts with the replies and rewards before and after; it fits any width.

    Texts are shown as they are, never as rich's markup or as a terminal's control sequences.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Samples on held-out prompts", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("prompt", "before", "after"):
        table.add_column(name, ratio=1, overflow="fold")
    table.add_column("reward", justify="right")
    for old, new in list(zip(before, after, strict=True))[:count]:
        texts = (_tail(new.prompt), _shown(old), _shown(new))
        table.add_row(*(Text(text) for text in texts), f"{old.reward:.2f} →\n{new.reward:.2f}", end_section=True)
    return table


def _preference(first: Judged, second: Judged) -> float:
    if first.reply == second.reply and first.ended == second.ended:
        return 0.5
    return 1.0 if first.reward > second.reward else 0.0 if first.reward < second.reward else 0.5


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _shown(row: Judged) -> str:
    """The reply's beginning; an ellipsis in brackets says that the reply itself was cut off."""
    text = _plain(row.reply)
    text = text[: SHOWN_CHARACTERS - 1] + "…" if len(text) > SHOWN_CHARACTERS else text
    return text if row.ended else f"{text} […]"


def _tail(prompt: str) -> str:
    """The prompt's end: of a dialogue, what the reply answers."""
    text = _plain(prompt)
    return "…" + text[1 - SHOWN_CHARACTERS :] if len(text) > SHOWN_CHARACTERS else text


def _plain(text: str) -> str:
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


def _lines(path: Path, keep: Callable[[int], bool]) -> list[str]:
    """The whole lines of samples.jsonl whose step is to be kept; half a line, of a killed run, never is."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):  # not splitlines: U+2028 may occur inside a row
        try:
            if keep(json.loads(line)["step"]):
                kept.append(line)
        except ValueError:
            continue
    return kept


def _replace(path: Path, lines: Sequence[str]) -> None:
    aside = path.with_name(path.name + ".new")
    aside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(aside, path)
