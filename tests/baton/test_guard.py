"""The guard by itself: what a spike is, worked by hand; healthy curves pass; what is remembered."""

import math
from pathlib import Path

import numpy as np
import pytest

from baton.corpus.mixture import MixedSource, Mixture
from baton.guard import Diverged, Guard, RollBack, read_rollbacks, skipped_batches, usual, write_rollbacks
from baton.train_sections import GuardSettings


def guard(**settings: float) -> Guard:
    """A window of 8, in which one high loss is a spike."""
    return Guard(GuardSettings(**{"window": 8, "spike_steps": 1, **settings}))


def feed(guarded: Guard, losses: list[float], start: int = 0) -> None:
    for step, loss in enumerate(losses, start):
        assert guarded.takes(step, loss, 1.0)


def test_median_and_deviation_by_hand() -> None:
    # median 3; distances 2, 1, 0, 1, 97: median 1
    assert usual([1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, pytest.approx(1.4826))
    # still losses: a fiftieth of the median
    assert usual([5.0] * 4) == (5.0, pytest.approx(0.1))


# median 2, distances 0.1 and 0.3: deviation 1.4826 * 0.2 = 0.29652, and 6 of them end at 3.77912
LOSSES = [1.9, 2.1, 1.7, 2.3] * 2


@pytest.mark.parametrize(("loss", "is_spike"), [(3.77, False), (3.79, True), (1e9, True), (-50.0, False)])
def test_a_spike_is_so_many_deviations_above_the_median(loss: float, is_spike: bool) -> None:
    guarded = guard()
    feed(guarded, LOSSES)
    if not is_spike:
        assert guarded.takes(8, loss, 1.0)
        return
    with pytest.raises(RollBack) as found:
        guarded.takes(8, loss, 1.0)
    assert (found.value.step, found.value.first, found.value.usual) == (8, 8, 2.0)
    assert found.value.sigmas == pytest.approx((loss - 2) / 0.29652, rel=1e-4)


def test_fewer_deviations_or_a_longer_window_change_what_is_a_spike() -> None:
    narrow, wide, long = guard(spike_sigmas=3), guard(spike_sigmas=20), guard(window=9)
    for guarded in (narrow, wide, long):
        feed(guarded, LOSSES)
    with pytest.raises(RollBack):
        narrow.takes(8, 3.0, 1.0)  # 2 + 3 * 0.29652 = 2.89
    assert wide.takes(8, 3.79, 1.0)
    assert long.takes(8, 3.79, 1.0)  # not full yet


def test_a_small_rise_over_still_losses_is_no_spike() -> None:
    guarded = guard()
    feed(guarded, [0.01] * 8)
    assert guarded.takes(8, 0.25, 1.0)
    with pytest.raises(RollBack):
        guarded.takes(9, 0.3, 1.0)


def test_where_three_in_a_row_are_a_spike_two_are_none() -> None:
    guarded = guard(spike_steps=3)
    feed(guarded, [*LOSSES, 9.0, 9.0, 2.0, 9.0, 9.0])
    with pytest.raises(RollBack) as found:
        guarded.takes(13, 9.0, 1.0)
    assert (found.value.step, found.value.first) == (13, 11)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_what_is_no_number_is_not_taken_and_counted(loss: float, norm: float) -> None:
    guarded = guard(max_skipped=2)
    assert guarded.takes(0, 2.0, 1.0)
    assert not guarded.takes(1, loss, norm)
    assert not guarded.takes(2, loss, norm)
    assert guarded.takes(3, 2.0, 1.0)  # and the count in a row begins anew
    assert not guarded.takes(4, loss, norm)
    assert not guarded.takes(5, loss, norm)
    assert guarded.skipped_steps == 4
    with pytest.raises(Diverged, match="at step 7, as in 2 steps before it.*Lower train.learning_rate"):
        guarded.takes(6, loss, norm)


def test_without_a_guard_the_first_number_that_is_none_ends_it_and_spikes_pass() -> None:
    guarded = Guard(None)
    feed(guarded, [*[1.0] * 100, 1e9])
    with pytest.raises(Diverged, match=r"the loss is nan .* at step 102.*train.guard: null"):
        guarded.takes(101, math.nan, 1.0)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("noise", [0.001, 0.05, 0.3])
def test_healthy_curves_never_roll_back(seed: int, noise: float) -> None:
    """A power law from ln 8192 down, steeper at first, with noise; a warm-up in which the loss rises a little."""
    draws = np.random.Generator(np.random.Philox(key=[seed, 7]))
    guarded = Guard(GuardSettings())
    for step in range(1500):
        loss = 1.5 + 7.5 * (1 + step / 20) ** -0.5 + 0.3 * math.sin(step / 40) * (step < 120)
        assert guarded.takes(step, loss + noise * float(draws.standard_normal()), 1.0)


@pytest.mark.parametrize(("rows", "share", "gap"), [(2, 0.1, 2.0), (4, 0.05, 2.0), (8, 0.02, 3.0), (16, 0.02, 3.0)])
def test_a_rare_hard_source_in_small_batches_is_no_spike(rows: int, share: float, gap: float) -> None:
    mixture = Mixture(
        [MixedSource("en", 10**6, 10**9, share=1 - share), MixedSource("ja", 10**5, 10**8, share=share)], 0
    )
    draws = np.random.Generator(np.random.Philox(key=[1, 7]))
    guarded = Guard(GuardSettings())
    for step in range(1000):
        hard = sum(mixture.sample(step * rows + at).source for at in range(rows))
        assert guarded.takes(step, 2.5 + gap * hard / rows + 0.15 * float(draws.standard_normal()) / rows**0.5, 1.0)


def test_what_was_usual_is_forgotten_where_other_text_begins() -> None:
    guarded = guard(spike_steps=2)
    feed(guarded, [*LOSSES, 9.0])
    guarded.forget()
    feed(guarded, [9.0] * 8, 9)
    with pytest.raises(RollBack):
        feed(guarded, [18.0, 18.0], 17)


def test_a_window_that_a_checkpoint_kept_judges_alike() -> None:
    one, other = guard(spike_steps=2), guard(spike_steps=2)
    feed(one, [*LOSSES, 9.0])
    one.takes(9, math.nan, 1.0)
    other.load(one.state())
    assert other.state() == one.state() and other.skipped_steps == 1
    for guarded in (one, other):
        with pytest.raises(RollBack):
            guarded.takes(10, 9.0, 1.0)


def test_rollbacks_are_kept_for_this_build_only(tmp_path: Path) -> None:
    record = tmp_path / "skipped.json"
    assert read_rollbacks(record, "a") == []
    write_rollbacks(record, "a", [{"batches": [7, 8]}, {"batches": [3, 7]}])
    assert read_rollbacks(record, "b") == []
    assert skipped_batches(read_rollbacks(record, "a")) == (3, 7, 8)
