"""Alarms over a PPO run's own metrics: what is going wrong, the likely cause, and what to try.

Pure: a function of the metrics seen so far. Each alarm fires when its condition begins and again only after it has
cleared, by a margin, so that a figure at the threshold does not ring at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, NamedTuple

FIRST = 5
"""The median of so many first steps is a run's start."""
LATEST = 3
"""The mean of so many latest steps is where it is now: one odd batch rings no alarm."""
SUSTAINED = 5
"""So many steps in a row make something last."""
WINDOW = 20
"""The running median is over so many steps."""
EVALUATIONS = 200
"""Evaluations that are remembered, the oldest forgotten first."""

LENGTH_DRIFT = 0.5
CLIP_FRACTION, CLIP_TIMES, CLIP_FLOOR = 0.4, 4.0, 0.1  # below the floor, four times as many is still few
ENTROPY_SHARE = 0.2
EOS_SHARE, EOS_FROM = 0.5, 0.1  # replies that never ended cannot stop doing so
NEGATIVE_KL_NATS, NEGATIVE_KL_A_TOKEN = -0.1, -0.001  # a reply; whichever is further from zero
GOLD_ERRORS = 2.0


@dataclass(frozen=True)
class Alarm:
    """One alarm as it fires: a metric-like name, the step, and the message for a person."""

    name: str
    step: int
    message: str


class Verdict(NamedTuple):
    """What a rule finds: the message if it rings; whether it is quiet enough to ring anew later."""

    message: str | None = None
    clear: bool = True


class Series:
    """One metric: its first values and its latest; all plain numbers."""

    def __init__(self, first: list[float], latest: list[float], keep: int) -> None:
        self.first, self.latest, self.keep = first, latest, keep

    def add(self, value: float) -> None:
        if len(self.first) < FIRST:
            self.first.append(value)
        self.latest.append(value)
        del self.latest[: -self.keep]

    @property
    def start(self) -> float | None:
        """The median of the first steps, once they are over."""
        return median(self.first) if len(self.first) == FIRST else None

    @property
    def now(self) -> float:
        return fmean(self.latest[-LATEST:])

    def last(self, count: int) -> list[float]:
        """The last `count` values, or none while there are fewer."""
        return self.latest[-count:] if len(self.latest) >= count else []


class Alarms:
    """Feed it every step's metrics, and every evaluation's; it returns the alarms that begin to ring."""

    def __init__(self) -> None:
        self._series: dict[str, Series] = {}
        self._evaluations: list[list[float]] = []  # gold, its standard error, reward
        self._ringing: set[str] = set()

    def check(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """The alarms that `metrics`, of `step`, set off; a metric that is absent or not finite is passed over."""
        found = {key: float(value) for key, value in metrics.items() if math.isfinite(value)}
        for key, value in found.items():
            if key in RULES or _is_component(key):
                self._series.setdefault(key, Series([], [], WINDOW + 1)).add(value)
        verdicts = {name: rule(self._series) for key, (name, rule) in RULES.items() if key in found}
        components = [key for key in found if key.startswith("reward/")]
        for key in components or [key for key in found if key == "reward"]:  # their sum is stuck only if all are
            label = key.removeprefix("reward").removeprefix("/")
            verdicts["reward_stuck" + (f"/{label}" if label else "")] = stuck(self._series[key], label)
        if "eval/gold" in found and "eval/reward" in found:
            self._evaluations.append([found["eval/gold"], found.get("eval/gold_se", 0.0), found["eval/reward"]])
            del self._evaluations[:-EVALUATIONS]
            verdicts["gold_falling"] = gold_falling(self._evaluations)
        return [alarm for name, verdict in verdicts.items() if (alarm := self._ring(name, step, verdict))]

    @property
    def ringing(self) -> list[str]:
        """The names of the alarms whose condition lasts."""
        return sorted(self._ringing)

    def state(self) -> dict[str, Any]:
        """Plain JSON for a checkpoint: a run that resumes with it rings as if it had not been interrupted."""
        series = {key: {"first": list(s.first), "latest": list(s.latest)} for key, s in self._series.items()}
        evaluations = [list(row) for row in self._evaluations]
        return {"series": series, "evaluations": evaluations, "ringing": self.ringing}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Alarms:
        """The inverse of `state`."""
        alarms = cls()
        for key, s in state["series"].items():
            alarms._series[key] = Series(list(s["first"]), list(s["latest"]), WINDOW + 1)
        alarms._evaluations = [list(row) for row in state["evaluations"]]
        alarms._ringing = set(state["ringing"])
        return alarms

    def _ring(self, name: str, step: int, verdict: Verdict) -> Alarm | None:
        if verdict.message is None:
            if verdict.clear:
                self._ringing.discard(name)
            return None
        if name in self._ringing:
            return None
        self._ringing.add(name)
        return Alarm(name, step, f"{name.replace('_', ' ')}: {verdict.message}")


def length_drift(series: Mapping[str, Series]) -> Verdict:
    """Mean length against the first steps' median, both ways."""
    length = series["length"]
    if not length.start:
        return Verdict()
    now, drift = length.now, length.now / length.start - 1
    if abs(drift) <= LENGTH_DRIFT:
        return Verdict(clear=abs(drift) < 0.8 * LENGTH_DRIFT)
    longer = drift > 0
    cause = "the reward pays for length itself" if longer else "short replies are the cheapest way to a score"
    cure = (
        "compare rewards of long and short replies, add ppo.overlong_tokens or a length-penalising reward"
        if longer
        else "look at samples.jsonl, lower ppo.missing_eos_penalty or the learning rate"
    )
    return Verdict(
        f"replies of {now:.1f} tokens, {now / length.start:.2f} times the {length.start:.1f} of the first steps. "
        f"Likely {cause}. Try: {cure}, or raise ppo.kl_coefficient."
    )


def gold_falling(evaluations: list[list[float]]) -> Verdict:
    """Over-optimisation (Gao et al. 2022): gold past its peak while the optimised reward still rises.

    evaluations: rows of gold, its standard error, reward. Rings when the last two evaluations lie below the best gold
    by more than `GOLD_ERRORS` of its standard errors while their reward lies above that evaluation's.
    """
    if len(evaluations) < 3:
        return Verdict()
    gold, error, reward = max(evaluations[:-2], key=lambda row: row[0])
    margin = GOLD_ERRORS * error
    if not all(row[0] < gold - margin and row[2] > reward for row in evaluations[-2:]):
        return Verdict(clear=evaluations[-1][0] >= gold - margin / 2 or evaluations[-1][2] <= reward)
    latest = evaluations[-1]
    return Verdict(
        f"gold reward {latest[0]:.3f}, down from {gold:.3f} at its best, while the optimised reward rose from "
        f"{reward:.3f} to {latest[2]:.3f}. Likely the policy exploits the reward model rather than getting better. "
        "Try: publish an earlier step, set ppo.kl_budget_nats to the KL where gold peaked, raise ppo.kl_coefficient, "
        "or train the reward model on the policy's own replies."
    )


def explained_variance(series: Mapping[str, Series]) -> Verdict:
    """A critic that predicts returns worse than their mean would."""
    values = series["explained_variance"].last(SUSTAINED)
    if not values or max(values) >= 0:
        return Verdict()
    return Verdict(
        f"explained variance {values[-1]:.2f}, below zero for {SUSTAINED} steps: the critic predicts returns worse "
        "than their mean. Likely it has not caught up with the policy, or its updates are too large. Try: "
        "ppo.critic_warmup_steps, another train.critic_learning_rate, ppo.critic: adapter if it is shared."
    )


def clip_spike(series: Mapping[str, Series]) -> Verdict:
    """The share of tokens whose ratio met the clip, by itself or against its running median."""
    *before, now = series["clip_fraction/policy"].latest
    usual = median(before) if len(before) >= FIRST else None
    jumped = usual is not None and now > CLIP_FLOOR and now > CLIP_TIMES * usual
    if now <= CLIP_FRACTION and not jumped:
        calm = now < 0.8 * CLIP_FRACTION and (usual is None or now <= max(CLIP_FLOOR, CLIP_TIMES / 2 * usual))
        return Verdict(clear=calm)
    against = f"; {usual:.1%} is usual here" if usual is not None else ""
    return Verdict(
        f"{now:.1%} of the tokens were clipped{against}. Likely the policy moves too far within one rollout. Try: a "
        "lower train.learning_rate, fewer ppo.epochs, larger minibatches, or ppo.kl_minibatch_stop_nats."
    )


def entropy_collapse(series: Mapping[str, Series]) -> Verdict:
    """Entropy per token against the first steps' median."""
    entropy = series["entropy_nats"]
    if not entropy.start or entropy.start <= 0:
        return Verdict()
    share = entropy.now / entropy.start
    if share >= ENTROPY_SHARE:
        return Verdict(clear=share > 1.25 * ENTROPY_SHARE)
    return Verdict(
        f"{entropy.now:.3f} nats a token, {share:.0%} of the {entropy.start:.3f} of the first steps. Likely the policy "
        "has settled on a few replies and explores no more. Try: raise ppo.kl_coefficient or ppo.entropy_coefficient, "
        "lower train.learning_rate."
    )


def negative_kl(series: Mapping[str, Series]) -> Verdict:
    """A KL divergence is never negative: its estimate is so for long only if the samples are not the policy's."""
    values = series["kl_nats"].last(SUSTAINED)
    length = series["length"].now if "length" in series else 0.0
    bound = min(NEGATIVE_KL_NATS, NEGATIVE_KL_A_TOKEN * length)
    if not values or max(values) >= bound:
        return Verdict(clear=not values or values[-1] > bound / 2)
    return Verdict(
        f"KL from the reference {values[-1]:.2f} nats a reply, below {bound:.2g} for {SUSTAINED} steps; it cannot be "
        "negative. Likely replies are sampled from another distribution than the one that is trained: another "
        "temperature, top-k or top-p, a missing stop token in the sum, or an engine with old weights. Try: "
        "rollout.engine: built-in, and look at engine_gap_nats."
    )


def eos_collapse(series: Mapping[str, Series]) -> Verdict:
    """The share of replies that end, against the first steps' median."""
    eos = series["eos_rate"]
    if eos.start is None or eos.start < EOS_FROM:
        return Verdict()
    share = eos.now / eos.start
    if share >= EOS_SHARE:
        return Verdict(clear=share > 1.25 * EOS_SHARE)
    return Verdict(
        f"{eos.now:.1%} of the replies end, {eos.start:.1%} did in the first steps. Likely going on pays, or the limit "
        "is too short. Try: raise ppo.missing_eos_penalty or rollout.max_new_tokens; check that the reward sees the "
        "end of turn."
    )


def stuck(component: Series, label: str) -> Verdict:
    """A reward whose mean has not moved at all: it teaches nothing."""
    values = component.last(SUSTAINED)
    if not values or max(values) - min(values) > 1e-9 * max(1.0, abs(values[-1])):
        return Verdict()
    return Verdict(
        f"the reward{' ' + label if label else ''} was {values[-1]:.4g} on average in each of {SUSTAINED} steps, with "
        "no variance. Likely it fails for every reply alike (a wrong format or column), or all replies have its "
        "highest score. Try: score a few lines of samples.jsonl by hand; drop it if it is done."
    )


def _is_component(key: str) -> bool:
    return key == "reward" or key.startswith("reward/")


RULES: dict[str, tuple[str, Callable[[Mapping[str, Series]], Verdict]]] = {
    "length": ("length_drift", length_drift),
    "explained_variance": ("negative_explained_variance", explained_variance),
    "clip_fraction/policy": ("clip_fraction_spike", clip_spike),
    "entropy_nats": ("entropy_collapse", entropy_collapse),
    "kl_nats": ("negative_kl", negative_kl),
    "eos_rate": ("eos_collapse", eos_collapse),
}
"""metric -> (the alarm's name, its rule); a rule runs where its metric is given."""
