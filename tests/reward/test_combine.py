"""Members' scores combined and shaped; every expected value is worked by hand."""

from typing import Any

import pytest
import torch

from reward.combine import Shaping, deviation, pessimistic

MEMBERS = torch.tensor([[1.0, 4.0, -2.0], [3.0, 4.0, 1.0], [8.0, 4.0, 4.0]])
"""Three members, three replies: means 4, 4, 1; deviations sqrt(26/3), 0, sqrt 6."""
TOKENS = torch.tensor([2, 5, 11])


def test_the_deviation_is_the_populations() -> None:
    assert deviation(MEMBERS).tolist() == pytest.approx([(26 / 3) ** 0.5, 0.0, 6**0.5])
    assert deviation(MEMBERS[:1]).tolist() == [0.0, 0.0, 0.0]


def test_mean_less_what_members_disagree_about() -> None:
    assert pessimistic(MEMBERS, 0.0).tolist() == [4.0, 4.0, 1.0]
    assert pessimistic(MEMBERS, 0.5).tolist() == pytest.approx([4 - 0.5 * (26 / 3) ** 0.5, 4.0, 1 - 0.5 * 6**0.5])


def shaped(scores: torch.Tensor, reference: torch.Tensor | None = None, **settings: Any) -> list[float]:
    shaping = Shaping(members=len(scores), **settings)
    return shaping.combine(shaping.each(scores, TOKENS, reference)).tolist()


def test_one_model_without_settings_is_left_alone() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.3]])
    assert torch.equal(torch.tensor(shaped(scores)), scores[0])
    assert not Shaping().changes and not Shaping(members=3).changes
    for setting in ({"deviation_penalty": 0.5}, {"slope": 0.0}, {"by_reference": True}, {"scales": (2.0,)}):
        assert Shaping(**setting).changes


def test_length_costs_from_its_mean_on() -> None:
    one = torch.tensor([[1.0, 1.0, 1.0]])
    assert shaped(one, slope=0.5) == [0.0, -1.5, -4.5]
    assert shaped(one, slope=0.5, mean_tokens=5.0) == [2.5, 1.0, -2.0]
    assert shaped(one, slope=-0.5, mean_tokens=5.0) == [-0.5, 1.0, 4.0]


def test_each_version_has_its_own_scale_before_they_are_compared() -> None:
    """(1 - 1) / 2 = 0 and (8 - 2) / 3 = 2 disagree by 1 about the first; (4 - 1) / 2 and (4 - 2) / 3 by 5/12."""
    two = MEMBERS[[0, 2]]
    found = shaped(two, centres=(1.0, 2.0), scales=(2.0, 3.0), deviation_penalty=1.0)
    assert found[:2] == pytest.approx([1.0 - 1.0, (1.5 + 2 / 3) / 2 - 5 / 12])


def test_with_one_scale_it_does_not_matter_what_comes_first() -> None:
    before = shaped(MEMBERS, centres=(1.5,) * 3, scales=(2.0,) * 3, deviation_penalty=0.7)
    after = (pessimistic(MEMBERS, 0.7) - 1.5) / 2.0
    assert before == pytest.approx(after.tolist())


def test_the_reference_takes_away_what_a_prompt_adds() -> None:
    """Members that differ by a constant for each prompt do not disagree."""
    constants = torch.tensor([[5.0, -1.0, 0.0], [0.0, 2.0, 7.0]])
    reply, theirs = torch.tensor([2.0, 3.0, 4.0]), torch.tensor([1.0, 5.0, 4.0])
    found = shaped(reply + constants, theirs + constants, by_reference=True, deviation_penalty=3.0)
    assert found == pytest.approx([1.0, -2.0, 0.0], abs=1e-6)


def test_after_the_reference_only_the_scale_is_normalised() -> None:
    found = shaped(
        torch.tensor([[6.0, 6.0, 6.0]]), torch.tensor([[2.0, 6.0, 8.0]]),
        by_reference=True, centres=(100.0,), scales=(2.0,),
    )  # fmt: skip
    assert found == [2.0, 0.0, -1.0]


def test_all_of_it_in_its_order() -> None:
    """Reply 1: members 1 and 3, 2 tokens at 0.5 a token: 0 and 2; the reference has 1 and -1, so -1 and 3; halved."""
    settings = {"slope": 0.5, "by_reference": True, "scales": (2.0, 2.0), "centres": (9.0, 9.0)}
    shaping = Shaping(members=2, deviation_penalty=0.25, **settings)  # type: ignore[arg-type]
    scores, tokens = torch.tensor([[1.0], [3.0]]), torch.tensor([2])
    reference = shaping.by_length(torch.tensor([[3.0], [1.0]]), torch.tensor([4]))
    assert reference.tolist() == [[1.0], [-1.0]]
    each = shaping.each(scores, tokens, reference)
    assert each.tolist() == [[-0.5], [1.5]]
    assert shaping.combine(each).tolist() == [0.5 - 0.25 * 1.0]


def test_what_does_not_fit_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError):
        Shaping(members=2).each(torch.zeros(3, 1), torch.ones(1), None)
    with pytest.raises(AssertionError):
        Shaping(by_reference=True).each(torch.zeros(1, 1), torch.ones(1), None)
