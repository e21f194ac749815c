"""Alarms on made-up runs: each rings for its reason, once, again after it cleared, and alike after a resume."""

import json
import random
from collections.abc import Iterable, Sequence

import pytest

from stages.alarms import Alarm, Alarms

CALM = {
    "reward": 0.1,
    "reward/helpful": 0.1,
    "kl_nats": 1.0,
    "length": 40.0,
    "eos_rate": 0.9,
    "entropy_nats": 2.0,
    "clip_fraction/policy": 0.05,
    "explained_variance": 0.4,
}


def steps(key: str, values: Iterable[float]) -> list[dict[str, float]]:
    """Calm steps, in which only rewards wobble and `key` takes `values`."""
    rows = []
    for at, value in enumerate(values):
        wobble = 0.1 + 0.01 * (at % 3)
        rows.append({**CALM, "reward": wobble, "reward/helpful": wobble, key: value})
    return rows


def rung(rows: Sequence[dict[str, float]], alarms: Alarms | None = None) -> list[tuple[str, int]]:
    alarms = alarms or Alarms()
    return [(alarm.name, alarm.step) for step, row in enumerate(rows, 1) for alarm in alarms.check(step, row)]


def test_a_calm_run_rings_nothing() -> None:
    noise = random.Random(0)
    rows = [{key: value * noise.uniform(0.8, 1.2) for key, value in CALM.items()} for _ in range(200)]
    assert rung(rows) == []


@pytest.mark.parametrize(
    ("name", "key", "values", "at"),
    [
        # the mean of the last three crosses 60 (or 20) with the third value of 61 (or 19)
        ("length_drift", "length", [40] * 5 + [61] * 4, 8),
        ("length_drift", "length", [40] * 5 + [19] * 4, 8),
        ("negative_explained_variance", "explained_variance", [0.2, 0.1, -0.1, -0.2, -0.1, -0.3, -0.1, -0.4], 7),
        ("clip_fraction_spike", "clip_fraction/policy", [0.3, 0.41], 2),
        ("clip_fraction_spike", "clip_fraction/policy", [0.04, 0.04, 0.05, 0.04, 0.03, 0.17], 6),
        ("entropy_collapse", "entropy_nats", [2.0] * 5 + [0.39] * 4, 8),
        ("negative_kl", "kl_nats", [0.0, -0.2, -0.3, -0.2, -0.15, -0.11, -0.2], 6),
        ("eos_collapse", "eos_rate", [0.9] * 5 + [0.4] * 4, 8),
        ("reward_stuck/helpful", "reward/helpful", [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 6),
    ],
)
def test_each_rings_once_for_its_reason(name: str, key: str, values: list[float], at: int) -> None:
    assert rung(steps(key, values)) == [(name, at)]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("length", [40] * 5 + [59] * 5 + [21] * 5),
        ("length", [40] * 5 + [40, 40, 99, 40, 40]),  # one odd batch
        ("length", [10, 40, 40, 40, 90, 40, 40, 40]),  # the start is a median
        ("explained_variance", [-0.5] * 4 + [0.1] + [-0.5] * 4),
        ("clip_fraction/policy", [0.39] * 5),
        ("clip_fraction/policy", [0.01] * 6 + [0.09]),  # nine times as many, and still few
        ("entropy_nats", [2.0] * 5 + [0.41] * 5),
        ("kl_nats", [0.0, -0.2, -0.3, -0.2, -0.15, -0.09, -0.2, -0.2]),
        ("eos_rate", [0.05] * 5 + [0.0] * 5),  # hardly any ended to begin with
        ("eos_rate", [0.9] * 5 + [0.46] * 5),
    ],
)
def test_within_bounds_is_quiet(key: str, values: list[float]) -> None:
    assert rung(steps(key, values)) == []


def test_one_reward_alone_is_called_reward() -> None:
    assert rung([{"reward": 0.5}] * 7) == [("reward_stuck", 5)]
    assert rung([{"reward": 0.5, "reward/a": 0.5}] * 7) == [("reward_stuck/a", 5)]  # not twice
    assert rung([{"reward": 0.1 * at} for at in range(7)]) == []


def test_negative_kl_is_relative_to_length() -> None:
    rows = [{"kl_nats": -0.2, "length": 1000.0}] * 8
    assert rung(rows) == []
    assert rung([{"kl_nats": -1.1, "length": 1000.0}] * 8) == [("negative_kl", 5)]


def test_rings_again_only_after_it_cleared() -> None:
    spikes = [0.5, 0.6, 0.39, 0.45, 0.1, 0.45, 0.45]  # 0.39 does not ring, but is too close to clear
    assert rung(steps("clip_fraction/policy", spikes)) == [("clip_fraction_spike", 1), ("clip_fraction_spike", 6)]
    drift = [40.0] * 5 + [70] * 5 + [57] * 5 + [70] * 5 + [40] * 5 + [70] * 3
    assert rung(steps("length", drift)) == [("length_drift", 8), ("length_drift", 28)]


def evaluations(*pairs: tuple[float, float], error: float | None = None) -> list[dict[str, float]]:
    more = {} if error is None else {"eval/gold_se": error}
    return [{"eval/reward": reward, "eval/gold": gold, **more} for reward, gold in pairs]


def test_gold_falls_while_the_proxy_rises() -> None:
    run = [(0.0, 1.0), (1.0, 2.0), (2.0, 1.8), (3.0, 1.5), (4.0, 1.0)]
    assert rung(evaluations(*run)) == [("gold_falling", 4)]  # the first with two evaluations past the peak
    assert rung(evaluations(*run, error=0.2)) == [("gold_falling", 5)]  # two errors below the peak is 1.6
    assert rung(evaluations(*run, error=0.3)) == []  # or 1.4, where only the last lies below
    assert rung(evaluations(*run, (5.0, 0.9), error=0.3)) == [("gold_falling", 6)]
    assert rung(evaluations((0.0, 1.0), (1.0, 2.0), (0.9, 1.8), (0.8, 1.5))) == []  # both fall: no exploit
    assert rung(evaluations((0.0, 1.0), (1.0, 1.1), (2.0, 1.2), (3.0, 1.3))) == []
    assert rung(evaluations(*run, (5.0, 2.5), (6.0, 1.0), (7.0, 1.0))) == [("gold_falling", 4), ("gold_falling", 8)]


def test_messages_hold_the_figures_a_cause_and_a_cure() -> None:
    alarms, found = Alarms(), []
    rows = [
        *steps("length", [40] * 5 + [84] * 3),
        *evaluations((0.0, 2.0), (1.0, 1.5), (2.0, 1.0)),
        {"explained_variance": -0.25},
    ]
    rows += [{"explained_variance": -0.25}] * 4 + [{"clip_fraction/policy": 0.5}]
    rows += [{"entropy_nats": 0.1, "kl_nats": -3.0, "eos_rate": 0.0}] * 5 + [{"reward/rule": 0.0}] * 5
    for step, row in enumerate(rows):
        found += alarms.check(step, row)
    messages = {alarm.name: alarm.message for alarm in found}
    assert len(messages) == 8 and sorted(messages) == alarms.ringing
    assert all("Likely" in text and "Try: " in text for text in messages.values())
    # the alarm rings at the second long step: (40 + 84 + 84) / 3
    assert messages["length_drift"].startswith("length drift: replies of 69.3 tokens, 1.73 times the 40.0 ")
    assert "gold reward 1.000, down from 2.000 at its best" in messages["gold_falling"]
    assert "-0.25" in messages["negative_explained_variance"] and "50.0%" in messages["clip_fraction_spike"]
    assert "5.0% is usual" in messages["clip_fraction_spike"]


def test_what_is_absent_or_not_finite_is_passed_over() -> None:
    alarms = Alarms()
    for step in range(8):
        assert alarms.check(step, {"explained_variance": float("nan"), "clip_fraction/policy": float("inf")}) == []
        assert alarms.check(step, {"loss/policy": 0.0, "eval/reward": 1.0}) == []


def test_a_resumed_run_rings_alike() -> None:
    noise = random.Random(3)
    rows = [{key: value * noise.uniform(0.0, 3.0) for key, value in CALM.items()} for _ in range(120)]
    for at, row in enumerate(rows[::7]):
        row |= {"eval/reward": at, "eval/gold": -at + noise.random(), "eval/gold_se": 0.05}
    for row in rows[30:60]:
        row |= {"reward/helpful": 1.0, "explained_variance": -1.0, "kl_nats": -2.0}

    def run(cuts: Sequence[int]) -> list[Alarm]:
        alarms, found = Alarms(), []
        for step, row in enumerate(rows):
            if step in cuts:
                alarms = Alarms.from_state(json.loads(json.dumps(alarms.state())))
            found += alarms.check(step, row)
        return found

    whole = run([])
    assert len({alarm.name for alarm in whole}) >= 6
    assert run(range(120)) == run([33, 58, 90]) == whole


def test_the_state_does_not_grow() -> None:
    alarms = Alarms()
    for step in range(500):
        alarms.check(step, {**CALM, "eval/reward": step, "eval/gold": step})
    assert len(json.dumps(alarms.state())) < 20_000
