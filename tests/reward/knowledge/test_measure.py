"""The manifest's figures from scores that are worked by hand, and what `know` makes of a tiny reward."""

import math

import pytest
import torch

from reward.knowledge.measure import know, measure, measure_samples, measure_ties
from reward.knowledge.sft_samples import SftSample

CHOSEN = torch.tensor([[3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
REJECTED = torch.tensor([[1.0, 2.0, 1.0, 1.0], [1.0, 2.0, 1.0, -1.0]])


@pytest.fixture
def four(make_pair):
    """Margins (2, −1, 1, −1) and (0, −1, −1, 1); their mean (1, −1, 0, 0)."""
    return [
        make_pair(10, 8),
        make_pair(20, 19, source="b.jsonl", turns=2, margin=1.0),
        make_pair(5, 9, margin=3.0),
        make_pair(7, 7, source="b.jsonl", margin=3.0),
    ]


def test_measure_by_hand(four) -> None:
    found = measure(CHOSEN, REJECTED, four)
    assert found["eval/pairs"] == 4 and found["eval/accuracy"] == 0.5
    assert found["eval/accuracy_low"] == pytest.approx(1 - found["eval/accuracy_high"])
    assert found["eval/margin"] == 0.0
    # −log sigmoid of 1, −1, 0, 0
    losses = [math.log(1 + math.exp(-margin)) for margin in (1.0, -1.0, 0.0, 0.0)]
    assert found["eval/loss"] == pytest.approx(sum(losses) / 4)
    # longer: right, right, wrong, equal
    assert found["eval/accuracy_longer"] == (1 + 1 + 0 + 0.5) / 4
    # of like length: 20 and 19, 7 and 7; the reward gets 0 and ½, the longer one 1 and ½
    assert found["eval/pairs_matched"] == 2
    assert (found["eval/accuracy_matched"], found["eval/accuracy_longer_matched"]) == (0.25, 0.75)
    # ½ of confidence 0.731 is right (mean of 1 and 0), ½ of 0.5 (twice ½)
    assert found["eval/calibration_error"] == pytest.approx(0.5 * (1 / (1 + math.exp(-1)) - 0.5))
    # signs + − + − and 0 − − +
    assert (found["eval/agreement"], found["eval/agreement_pairwise"]) == (0.25, 0.25)
    # of the members' deviations 1, 0, 1, 1 the one right pair has 1: over 1 of the wrong, equal to 2
    assert found["eval/deviation_auroc"] == pytest.approx(1 - (1 + 2 / 2) / 3)
    assert [found[f"eval/accuracy/member/{k}"] for k in range(2)] == [0.5, (0.5 + 0 + 0 + 1) / 4]
    assert (found["eval/accuracy/a.jsonl"], found["eval/accuracy/b.jsonl"]) == (0.75, 0.25)
    assert (found["eval/accuracy/turns/1"], found["eval/accuracy/turns/2"]) == (2 / 3, 0.0)
    assert (found["eval/accuracy/margin/1"], found["eval/accuracy/margin/3"]) == (0.0, 0.5)


def test_one_member_has_no_agreement_and_equal_scores_no_correlation(four) -> None:
    found = measure(torch.zeros(1, 4), torch.zeros(1, 4), four)
    assert not {key for key in found if "agreement" in key or "correlation" in key or "member" in key}
    assert found["eval/accuracy"] == 0.5 and all(math.isfinite(value) for value in found.values())


def test_ties_score_closer_together() -> None:
    found = measure_ties(torch.tensor([[2.0, -3.0]]), torch.tensor([[0.5, -2.5]]))
    # |margin| 2 and 3 against 0.5 and 2.5: of four comparisons three are won
    assert found == {"eval/ties": 2.0, "eval/tie_margin": 1.5, "eval/tie_auroc": 0.75}


def test_samples_by_hand() -> None:
    samples = [SftSample([], [1], [2, 3], True), SftSample([], [1], [2, 3, 4, 5], False)]
    found = measure_samples(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), samples)
    # means 3 and 4; each member about its own mean: −1, 1 and 0, 0, so deviations of ½
    assert (found["sft/score_mean"], found["sft/score_deviation"]) == (3.5, 0.5)
    assert found["sft/member_deviation"] == 0.5
    assert (found["sft/score_mean/0"], found["sft/score_deviation/0"], found["sft/score_mean/1"]) == (2.0, 1.0, 5.0)
    assert (found["sft/tokens"], found["sft/ended"], found["sft/samples"]) == (3.0, 0.5, 2.0)


@pytest.fixture(scope="session")
def tokenizer(tiny_chain):
    from baton.models import load_tokenizer

    return load_tokenizer(tiny_chain.folder("sft"))


def told(tokenizer, prompt: str, chosen: str, rejected: str, **more):
    from reward.pairs import encode_pair

    def said(role, text):
        return [{"role": role, "content": text}]

    row = {"prompt": said("user", prompt), "chosen": said("assistant", chosen), "rejected": said("assistant", rejected)}
    return encode_pair(tokenizer, row | more)


def test_know_of_a_reward_that_counts_tokens(tokenizer) -> None:
    from baton.chat import encode_prompt

    pairs = [
        told(tokenizer, "Who?", "Someone whom I know.", "A man.", source="a"),
        told(tokenizer, "What?", "A dog.", "It is a dog that barks.", source="a"),
        told(tokenizer, "Where?", "Here and there.", "There.", source="b", is_tie=True),
    ]
    prompt = encode_prompt(tokenizer, pairs[0].prompt)
    samples = [SftSample(pairs[0].prompt, prompt, [9] * count, True) for count in (2, 4)]

    def scorer(sequences):
        return torch.tensor([[0.5 * len(ids) for ids in sequences]])

    known = know(scorer, tokenizer, pairs, samples=samples, num_perturbed=2)
    m = known.metrics
    assert m["eval/pairs"] == 2 and m["eval/ties"] == 1 and m["eval/accuracy"] == 0.5
    assert m["eval/accuracy"] == m["eval/accuracy_longer"]
    assert m["eval/length_correlation_within"] == pytest.approx(1.0)
    assert (m["length/slope"], m["length/slope_error"]) == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-6))
    assert (m["sft/score_mean"], m["sft/score_deviation"]) == (0.5 * (len(prompt) + 3), 0.5)
    # doubled, a reply always scores more, in units of that deviation
    assert m["perturbed/repeated/risen"] == 1.0 and m["perturbed/repeated"] > 1
    assert m["length_penalty/accuracy"] == 0.5 and "reference_shaping/accuracy" in m
    # tokens count from behind the prompt, up to the one that ends the turn
    assert float(known.lengths.chosen[0]) == len(pairs[0].chosen_ids) - len(prompt)
    assert all(math.isfinite(value) for value in m.values())


def test_the_slope_comes_from_training_pairs_where_there_are_any(tokenizer) -> None:
    pairs = [told(tokenizer, "Who?", "Someone whom I know.", "A man.")]
    fitting = [told(tokenizer, "Who?", "A woman and a man.", "Me.")]
    seen = []

    def scorer(sequences):
        seen.append(len(sequences))
        return torch.tensor([[float(ids == fitting[0].chosen_ids) for ids in sequences]])

    from reward.knowledge.debias import LengthFit

    earlier = LengthFit(0.25, 0.1, 4.0)
    difference = len(fitting[0].chosen_ids) - len(fitting[0].rejected_ids)
    fitted = know(scorer, tokenizer, pairs, fitting=fitting, num_perturbed=0)
    assert fitted.metrics["length/slope"] == pytest.approx(1 / difference) and "1 training" in fitted.fitted_on
    assert know(scorer, tokenizer, pairs, num_perturbed=0, fit=earlier).metrics["length/slope"] == 0.25
    assert know(scorer, tokenizer, pairs, num_perturbed=0).metrics["length/slope"] == 0.0
