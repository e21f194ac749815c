"""PPO beside best-of-n at equal KL: both are sampled on the same prompts, and judged by a reward and a gold reward."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from baton.decode import Reply
from baton.errors import UserError
from baton.ppo_sections import RewardSource
from baton.registry import Registry, Version
from baton.sampling import best_of_kl
from reward.best_of import at_kl, best_of_rewards, n_at_kl
from reward.sample import Sample

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

Z_95 = 1.959963984540054
"""The normal quantile of a two-sided 95% interval."""
PROMPTS_AT_ONCE = 32
"""Prompts that are sampled between two lines on how far it is."""


@dataclass(frozen=True)
class Mean:
    """A mean over prompts, and half its 95% interval (None of a single prompt)."""

    value: float
    margin: float | None

    @classmethod
    def of(cls, values: np.ndarray) -> Mean:
        """values: (P,), one a prompt."""
        count = len(values)
        margin = Z_95 * float(values.std(ddof=1)) / math.sqrt(count) if count > 1 else None
        return cls(float(values.mean()), margin)

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if self.margin is None else f" ± {self.margin:.3f}")


@dataclass(frozen=True)
class BestOf:
    """Best-of-n for one n."""

    n: int
    kl_nats_at_most: float
    rewards: dict[str, Mean]  # "proxy", and "gold" where there is one


@dataclass(frozen=True)
class PolicyPoint:
    """A policy beside best-of-n at the same KL; `difference` is the policy's reward less best-of-n's, prompt by prompt.

    Where the policy spends more KL than best of all samples, it is compared with that, at `compared_kl_nats`.
    """

    ref: str
    kl_nats: Mean
    n_at_equal_kl: float
    compared_kl_nats: float
    rewards: dict[str, Mean]
    best_of: dict[str, Mean]
    difference: dict[str, Mean]

    @property
    def is_beyond(self) -> bool:
        return self.kl_nats.value > self.compared_kl_nats + 1e-9


@dataclass(frozen=True)
class Comparison:
    """All that was measured; JSON by `dataclasses.asdict`."""

    sft: str
    reward: str
    gold: str | None
    prompts: int
    samples: int  # of the SFT model, a prompt
    policy_samples: int
    temperature: float
    seed: int
    best_of: list[BestOf]
    policies: list[PolicyPoint]


@dataclass(frozen=True)
class Sampled:
    """Replies to each prompt, G of them, prompt by prompt."""

    replies: list[Reply]
    texts: list[str]


@dataclass(frozen=True)
class Settings:
    """How replies are sampled."""

    samples: int
    policy_samples: int
    max_new_tokens: int
    temperature: float
    seed: int


def reward_setting(text: str) -> RewardSource:
    """The reward of a command's argument: a registry reference, `pkg.module:function`, or a URL."""
    if text.startswith(("http://", "https://")):
        return RewardSource(url=text)
    if "/" not in text and ":" in text:
        return RewardSource(function=text)
    return RewardSource(model=text)


def check_versions(sft: Version, policies: Sequence[Version]) -> None:
    """Raises UserError where one does not answer prompts, or a policy's tokens are not the SFT model's."""
    from baton.models import check_answers

    for version in (sft, *policies):
        check_answers(version)
    for policy in policies:
        for key in ("tokenizer_digest", "chat_template_digest"):
            if policy.manifest[key] != sft.manifest[key]:
                what = key.removesuffix("_digest").replace("_", " ")
                raise UserError(f"{policy.ref} has another {what} than {sft.ref}: there is no KL between them")


def compare(
    registry: Registry,
    sft: Version,
    policies: Sequence[Version],
    rewards: dict[str, RewardSource],
    rows: Sequence[dict[str, Any]],
    settings: Settings,
    shown: bool = True,
) -> Comparison:
    """Sample, score and compare on `rows` of data (prompt, columns). rewards: "proxy", and "gold" if there is one.

    KL is measured by its plain estimate, the mean over sampled replies of log pi - log pi_sft, at the temperature that
    is sampled at; both by the same kind of forward. `shown` prints a line on how far it is.
    """
    from baton.sampling import can_answer, reply_logprobs

    # now: an alias may mean another version when the samples are drawn
    labels = {
        name: registry.resolve(setting.model).ref if setting.model else str(setting.function or setting.url)
        for name, setting in rewards.items()
    }
    judges = {name: _open(registry, setting) for name, setting in rewards.items()}
    model, tokenizer = _load(registry, sft)
    rows = [row for row in rows if can_answer(model, tokenizer, row["prompt"], settings.max_new_tokens)]
    if not rows:
        raise UserError(
            "no prompt leaves room for a reply in the model's context, without spelling out a special token"
        )
    drawn = _sample(sft.ref, model, tokenizer, rows, settings.samples, settings, shown)
    scores = {name: _scored(judge, tokenizer, rows, drawn) for name, judge in judges.items()}
    curves = {name: best_of_rewards(scores["proxy"], values) for name, values in scores.items()}
    points = []
    for version in policies:
        policy, _ = _load(registry, version)
        theirs = _sample(version.ref, policy, tokenizer, rows, settings.policy_samples, settings, shown)
        prompt_ids = _spread(tokenizer, rows, theirs)[1]
        said = [(ids, reply.ids) for ids, reply in zip(prompt_ids, theirs.replies, strict=True)]
        logprobs = [reply_logprobs(each, said, settings.temperature) for each in (policy, model)]
        del policy
        kl_nats = (logprobs[0] - logprobs[1]).reshape(len(rows), -1).mean(1)
        reached = {name: _scored(judge, tokenizer, rows, theirs).mean(1) for name, judge in judges.items()}
        points.append(_point(version.ref, kl_nats, reached, curves))
    best_of = [
        BestOf(n, best_of_kl(n), {name: Mean.of(curve[:, n - 1]) for name, curve in curves.items()})
        for n in range(1, settings.samples + 1)
    ]
    return Comparison(
        sft=sft.ref,
        reward=labels["proxy"],
        gold=labels.get("gold"),
        prompts=len(rows),
        samples=settings.samples,
        policy_samples=settings.policy_samples,
        temperature=settings.temperature,
        seed=settings.seed,
        best_of=best_of,
        policies=points,
    )


def _point(ref: str, kl_nats: np.ndarray, reached: dict[str, np.ndarray], curves: dict[str, np.ndarray]) -> PolicyPoint:
    """kl_nats, reached: (P,) of the policy; curves: (P, N) of best-of-n."""
    spent = Mean.of(kl_nats)
    compared = min(max(spent.value, 0.0), best_of_kl(curves["proxy"].shape[1]))
    equal = {name: at_kl(curve, compared) for name, curve in curves.items()}
    return PolicyPoint(
        ref=ref,
        kl_nats=spent,
        n_at_equal_kl=n_at_kl(spent.value),
        compared_kl_nats=compared if spent.value > 0 else spent.value,
        rewards={name: Mean.of(values) for name, values in reached.items()},
        best_of={name: Mean.of(values) for name, values in equal.items()},
        difference={name: Mean.of(reached[name] - equal[name]) for name in curves},
    )


def tables(found: Comparison) -> list[Table]:
    """Best-of-n by n (powers of two, and all samples), and the policies at equal KL."""
    from rich.table import Table

    names = list(found.best_of[0].rewards)
    first = Table(title="best of n", title_justify="left")
    for heading in ("n", "KL at most, nats", *names):
        first.add_column(heading, justify="right")
    for row in found.best_of:
        if row.n & (row.n - 1) == 0 or row.n == found.samples:
            first.add_row(str(row.n), f"{row.kl_nats_at_most:.3f}", *(str(row.rewards[name]) for name in names))
    if not found.policies:
        return [first]
    second = Table(title="policies beside best of n at equal KL", title_justify="left")
    for heading in ("policy", "KL, nats", "n", "reward", "policy", "best of n", "difference"):
        second.add_column(heading, justify="left" if heading in ("policy", "reward") else "right")
    for point in found.policies:
        n = f"{found.samples} (equal: {point.n_at_equal_kl:.3g})" if point.is_beyond else f"{point.n_at_equal_kl:.2f}"
        for at, name in enumerate(names):
            head = (point.ref, str(point.kl_nats), n) if not at else ("", "", "")
            figures = (point.rewards[name], point.best_of[name], point.difference[name])
            second.add_row(*head, name, *map(str, figures), end_section=at == len(names) - 1)
    return [first, second]


def write_comparison(found: Comparison, folder: Path) -> list[Path]:
    """comparison.json and comparison.png in `folder`: rewards by the root of KL, as Gao et al. (2022) draw them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from baton.plots import COLOURS

    folder.mkdir(parents=True, exist_ok=True)
    data, picture = folder / "comparison.json", folder / "comparison.png"
    data.write_text(json.dumps(asdict(found), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    names = list(found.best_of[0].rewards)
    figure = Figure(figsize=(5.6 * len(names), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        across = [math.sqrt(row.kl_nats_at_most) for row in found.best_of]
        middle = np.array([row.rewards[name].value for row in found.best_of])
        margin = np.array([row.rewards[name].margin or 0.0 for row in found.best_of])
        axes.plot(across, middle, color=COLOURS[0], marker=".", label=f"best of 1 to {found.samples}")
        axes.fill_between(across, middle - margin, middle + margin, color=COLOURS[0], alpha=0.15, linewidth=0)
        for point, colour in zip(
            found.policies, (COLOURS[1:] * len(found.policies))[: len(found.policies)], strict=True
        ):
            place = math.sqrt(max(point.kl_nats.value, 0.0)), point.rewards[name].value
            axes.errorbar(*place, yerr=point.rewards[name].margin, fmt="o", color=colour, capsize=3, label=point.ref)
        axes.set_title({"proxy": f"proxy: {found.reward}", "gold": f"gold: {found.gold}"}[name], fontsize="medium")
        axes.set_xlabel(f"√KL from {found.sft} (nats; of best-of-n at most)")
        axes.set_ylabel("reward, 95% interval over prompts")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="small")
    figure.savefig(picture, dpi=120)
    return [data, picture]


def _open(registry: Registry, setting: RewardSource) -> Any:
    """A source of scores. Raises UserError."""
    import torch

    from baton.models import compute_dtype
    from reward.sources import open_sources

    versions = [registry.resolve(setting.model)] if setting.model else []
    for version in versions:
        if version.kind != "reward":
            raise UserError(f"{version.ref} is a {version.kind} model; expected a version of the reward stage")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (source,) = open_sources(
        setting,
        registry=registry,
        versions=versions,
        folder=Path.cwd(),
        device=device,
        dtype=compute_dtype("auto"),
        max_tokens=8192,
    )
    return source


def _load(registry: Registry, version: Version) -> tuple[Any, PreTrainedTokenizerBase]:
    import torch

    from baton.models import load_policy

    model, tokenizer = load_policy(registry, version)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _sample(
    label: str,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    count: int,
    settings: Settings,
    shown: bool,
) -> Sampled:
    from baton.progress import Progress
    from baton.sampling import answers, reply_text

    replies: list[Reply] = []
    with Progress(label, len(rows), "replies", shown=shown) as progress:
        for start in range(0, len(rows), PROMPTS_AT_ONCE):
            group = rows[start : start + PROMPTS_AT_ONCE]
            replies += answers(
                model,
                tokenizer,
                [row["prompt"] for row in group for _ in range(count)],
                [draw for _ in group for draw in range(count)],
                seed=settings.seed,
                temperature=settings.temperature,
                max_new_tokens=settings.max_new_tokens,
            )
            progress.update(start + len(group), len(group) * count, {})
    return Sampled(replies, [reply_text(tokenizer, reply) for reply in replies])


def _scored(
    judge: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], drawn: Sampled
) -> np.ndarray:
    """(P, G)."""
    from reward.sources import checked

    samples = [
        Sample(row["prompt"], ids, reply.ids, text, row["columns"])
        for row, ids, reply, text in zip(*_spread(tokenizer, rows, drawn), drawn.replies, drawn.texts, strict=True)
    ]
    return np.array(checked(judge, samples)).reshape(len(rows), -1)


def _spread(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], drawn: Sampled
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """(row, prompt ids) of each reply."""
    from baton.chat import encode_prompt

    each = len(drawn.replies) // len(rows)
    ids = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    return [row for row in rows for _ in range(each)], [prompt for prompt in ids for _ in range(each)]
