"""Mixtures against plain counting: shares at every point, rows once an epoch, caps, and too little text."""

import pickle
import random
from collections import Counter

import pytest

from baton.corpus.mixture import MixedSource, Mixture, Sample
from baton.corpus_sections import CorpusData
from baton.errors import UserError


def full(name: str, num_rows: int, **wanted: float) -> MixedSource:
    """A source whose rows of 10 tokens are full."""
    return MixedSource(name, num_rows, 10 * num_rows, **wanted)  # type: ignore[arg-type]


def drawn(mixture: Mixture, count: int) -> list[Sample]:
    return [mixture.sample(number) for number in range(count)]


def test_every_row_once_an_epoch_and_each_epoch_in_another_order() -> None:
    samples = drawn(Mixture([full("a", 30)], seed=1), 90)
    assert [sample.epoch for sample in samples] == [0] * 30 + [1] * 30 + [2] * 30
    orders = [[sample.row for sample in samples[at : at + 30]] for at in (0, 30, 60)]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_a_sample_depends_on_seed_and_number_alone() -> None:
    sources = [full("a", 30), full("b", 7, weight=3.0)]
    one, other = Mixture(sources, seed=1), Mixture(sources, seed=1)
    in_order = drawn(one, 200)
    numbers = list(range(200))
    random.Random(0).shuffle(numbers)
    assert {number: other.sample(number) for number in numbers} == dict(enumerate(in_order))
    assert drawn(pickle.loads(pickle.dumps(one)), 200) == in_order
    assert drawn(Mixture(sources, seed=2), 200) != in_order


def test_without_weights_every_source_gives_its_own_tokens() -> None:
    mixture = Mixture([full("a", 60), full("b", 30), full("c", 10)], seed=0)
    assert mixture.counts(100) == [60, 30, 10]
    assert mixture.epochs(250) == pytest.approx([2.5, 2.5, 2.5], abs=0.11)


def test_a_weight_multiplies_and_a_share_sets_outright() -> None:
    # 60 rows at weight 1 and 10 at weight 3: two to one
    assert Mixture([full("a", 60), full("b", 10, weight=3.0)], seed=0).counts(900) == [600, 300]
    assert Mixture([full("a", 60, share=0.25), full("b", 10, share=0.75)], seed=0).counts(900) == [225, 675]


def test_a_share_is_of_the_tokens_not_of_the_rows() -> None:
    # half the tokens each: rows of 5 tokens must come twice as often as rows of 10
    sources = [MixedSource("a", 100, 1000, share=0.5), MixedSource("b", 100, 500, share=0.5)]
    assert Mixture(sources, seed=0).counts(300) == [100, 200]


def test_shares_that_miss_one_by_rounding_are_scaled() -> None:
    thirds = [full(name, 10, share=0.333) for name in "abc"]
    assert Mixture(thirds, seed=0).counts(3000) == [1000, 1000, 1000]


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.7, 0.2, 0.1], [0.9, *[0.01] * 10], [0.4, 0.3, 0.2, 0.06, 0.04]])
def test_every_source_has_its_share_after_any_number_of_samples(shares: list[float]) -> None:
    mixture = Mixture([full(str(share), 50, share=share) for share in shares], seed=0)
    taken = Counter[int]()
    for number in range(2000):
        taken[mixture.sample(number).source] += 1
        assert all(abs(taken[at] - share * (number + 1)) < 1.05 for at, share in enumerate(shares)), number
    assert mixture.counts(2000) == [taken[at] for at in range(len(shares))]


def test_rare_sources_come_too() -> None:
    mixture = Mixture([full("large", 10**9), full("small", 100)], seed=0)
    # one row in ten million and one
    assert mixture.counts(10**9 + 100) == [10**9, 100]


def test_a_capped_source_makes_place_for_the_others_in_proportion() -> None:
    sources = [full("a", 20, share=0.5, max_epochs=2), full("b", 100, share=0.3), full("c", 100, share=0.2)]
    mixture = Mixture(sources, seed=0)
    # a's 40 rows are half of the first 80 samples; the 100 after them are b's and c's, 3 to 2
    assert mixture.counts(80) == [40, 24, 16]
    assert mixture.counts(180) == [40, 84, 56]
    samples = drawn(mixture, 180)
    assert Counter(sample.source for sample in samples) == {0: 40, 1: 84, 2: 56}
    assert Counter(sample.row for sample in samples if sample.source == 0) == dict.fromkeys(range(20), 2)
    later = [sample.row for sample in samples if sample.source == 1]
    assert len(set(later)) == len(later), "its epoch went on where it was"


def test_sources_that_are_all_capped_end_together_with_every_row_read() -> None:
    sources = [full("a", 7, max_epochs=2), full("b", 5, max_epochs=1), full("c", 11, weight=0.3, max_epochs=1)]
    mixture = Mixture(sources, seed=3)
    assert mixture.num_samples == 14 + 5 + 11
    seen = Counter((sample.source, sample.epoch, sample.row) for sample in drawn(mixture, 30))
    assert len(seen) == 30
    assert mixture.counts(30) == [14, 5, 11]


def test_a_part_of_an_epoch() -> None:
    assert Mixture([full("a", 10, max_epochs=0.5)], seed=0).num_samples == 5


def test_too_little_text_under_the_caps_is_refused_with_figures() -> None:
    mixture = Mixture([full("a", 20, max_epochs=2), full("b", 10, max_epochs=1)], seed=0)
    mixture.check(batches=12, rows_per_batch=4, sequence_length=10)
    with pytest.raises(UserError) as caught:
        mixture.check(batches=13, rows_per_batch=4, sequence_length=10)
    # 20 rows twice and 10 once are 50 rows
    assert str(caught.value) == (
        "training needs 520 tokens (13 batches of 4 rows of 10); there are 500 under max_epochs "
        "(a: 200 tokens × 2 epochs; b: 100 tokens × 1 epochs). "
        "Set train.steps to 12 at most, raise max_epochs or add text"
    )
    Mixture([full("a", 20)], seed=0).check(batches=10**9, rows_per_batch=10**6, sequence_length=10)


def test_a_source_without_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"b has no text to train on"):
        Mixture([full("a", 3), full("b", 0)], seed=0)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ([{"share": 0.5}, {}], "some training sources have a share and b has none; give all of them one, or none"),
        ([{"share": 0.5}, {"share": 0.4}], r"the shares are 0\.5 \+ 0\.4 = 0\.9 of the tokens; they must add up to 1"),
        ([{"share": 0.5, "weight": 2}, {"share": 0.5}], "a has a share and a weight, which would be ignored"),
        ([{"share": 1.5}, {"share": 0.5}], "less than or equal to 1"),
        ([{"max_epochs": 0}, {}], "greater than 0"),
    ],
)
def test_a_recipe_that_cannot_be_mixed_is_refused(train: list[dict[str, float]], expected: str) -> None:
    sources = [{"path": path, **wanted} for path, wanted in zip("ab", train, strict=True)]
    with pytest.raises(ValueError, match=expected):
        CorpusData.model_validate({"train": sources})


@pytest.mark.parametrize("key", ["weight", "share", "max_epochs"])
def test_held_out_text_is_not_mixed(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} would be ignored"):
        CorpusData.model_validate({"train": [{"path": "a"}], "eval": [{"path": "b", key: 0.5}]})
