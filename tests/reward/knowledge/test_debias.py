"""The length's worth by numpy's least squares, and what the remedies do to a reward that is built to need them."""

import numpy as np
import pytest
import torch

from reward.knowledge.debias import fit_length, shape_by_reference
from reward.knowledge.length import Lengths
from reward.knowledge.remedies import compare_remedies, effect, penalised, reference_scores
from reward.knowledge.sft_samples import SftSample


def biased(num: int = 400, worth: float = 0.05):
    """(chosen, rejected, lengths, prompt): scores = truth + worth · tokens + what the prompt adds."""
    rng = np.random.default_rng(4)
    tokens = rng.integers(5, 100, size=(2, num)).astype(float)
    prompt = rng.normal(size=num) * 5
    truth = np.stack([np.ones(num), np.zeros(num)]) + rng.normal(size=(2, num)) * 0.3
    chosen, rejected = torch.tensor(truth + worth * tokens + prompt)
    return chosen, rejected, Lengths(*torch.tensor(tokens)), torch.tensor(prompt)


def test_fit_is_least_squares_with_a_constant_for_every_prompt() -> None:
    chosen, rejected, lengths, _ = biased(12)
    # independent: regress all 24 scores on tokens and 12 indicator columns
    design = np.concatenate([np.r_[lengths.chosen, lengths.rejected][:, None], np.tile(np.eye(12), (2, 1))], axis=1)
    scores = np.r_[chosen, rejected]
    solution, residual, *_ = np.linalg.lstsq(design, scores, rcond=None)
    fit = fit_length(chosen - rejected, lengths)
    assert fit is not None and fit.slope == pytest.approx(solution[0], abs=1e-9)
    # its standard error with 24 − 13 = 11 degrees of freedom
    covariance = np.linalg.inv(design.T @ design) * residual[0] / 11
    assert fit.error == pytest.approx(covariance[0, 0] ** 0.5, abs=1e-9)
    assert fit.mean_tokens == pytest.approx(np.r_[lengths.chosen, lengths.rejected].mean())


def test_no_fit_where_lengths_do_not_differ() -> None:
    same = torch.tensor([3.0, 4.0])
    assert fit_length(torch.tensor([1.0, 2.0]), Lengths(same, same)) is None


def test_penalty_removes_the_bias_and_nothing_else() -> None:
    chosen, rejected, lengths, _ = biased()
    fit = fit_length(chosen - rejected, lengths)
    assert fit is not None and fit.slope == pytest.approx(0.05, abs=4 * fit.error)
    before, after = compare_remedies(chosen, rejected, lengths, fit, None)
    assert before.length_within > 0.7 and abs(after.length_within) < 1e-9
    assert before.accuracy.rate < 0.75 and after.accuracy.rate > 0.95
    # half the penalty does half the work
    half = effect("", *penalised(chosen, rejected, lengths, fit, 0.5), lengths)
    assert before.accuracy.rate < half.accuracy.rate < after.accuracy.rate
    # a reply of mean length keeps its score: so does the mean score
    sides = penalised(chosen, rejected, lengths, fit)
    assert float(torch.cat(sides).mean()) == pytest.approx(float(torch.cat([chosen, rejected]).mean()))


def test_reference_takes_away_what_the_prompt_adds() -> None:
    chosen, rejected, lengths, prompt = biased(worth=0.0)
    none, shaped = compare_remedies(chosen, rejected, lengths, None, prompt)
    assert (none.name, shaped.name) == ("none", "reference_shaping")
    assert none.accuracy == shaped.accuracy and none.calibration_error == pytest.approx(shaped.calibration_error)
    assert none.across_prompts < 0.6 and shaped.across_prompts > 0.97
    assert shape_by_reference(torch.tensor([[3.0], [1.0]]), torch.tensor([2.0])).tolist() == [[1.0], [-1.0]]


def test_pairs_without_a_reference_leave_every_row() -> None:
    chosen, rejected, lengths, prompt = biased(10)
    prompt[:4] = float("nan")
    fit = fit_length(chosen - rejected, lengths)
    rows = compare_remedies(chosen, rejected, lengths, fit, prompt)
    assert [row.name for row in rows] == ["none", "length_penalty", "reference_shaping", "both"]
    assert {row.count for row in rows} == {6}
    assert "both/accuracy" in rows[-1].metrics()


def test_reference_scores_are_means_by_prompt(make_pair) -> None:
    def asked(text):
        return [{"role": "user", "content": text}]

    samples = [SftSample(asked(text), [1], [2], True) for text in "aab"]
    pairs = [make_pair(1, 1, prompt=asked(text)) for text in "bac"]
    found = reference_scores(pairs, samples, torch.tensor([1.0, 3.0, 7.0])).tolist()
    assert found[:2] == [7.0, 2.0] and found[2] != found[2]
