"""A recipe's shaping with what the reward's training recorded, and what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from baton.errors import UserError
from baton.ppo_sections import RewardSource
from reward.combine import Shaping
from stages.shaping import num_members, shaping_of

RECORDS = {
    "sft/score_mean": 1.5,
    "sft/score_deviation": 0.5,
    "length/slope": -0.25,
    "length/mean": 12.0,
}
FITTED: dict[str, Any] = {"length_penalty": "fitted"}
SFT: dict[str, Any] = {"normalise": "sft"}


def version(ref: str = "t/r:1", members: int = 1, tokenizer: str = "t", **metrics: Any) -> Any:
    paths = ["adapter_model.safetensors", "a/members/9/x"]
    paths += [f"members/{at}/{name}" for at in range(1, members) for name in ("adapter_config.json", "b.safetensors")]
    manifest = {"files": [{"path": path} for path in paths], "tokenizer_digest": tokenizer}
    return SimpleNamespace(ref=ref, manifest=manifest, metrics=metrics)


def made(*versions: Any, **setting: Any) -> Shaping:
    origin = {"models": [v.ref for v in versions]} if len(versions) > 1 else {"model": "t/r:1"}
    return shaping_of("r", RewardSource.model_validate(origin | setting), list(versions), version("t/s:1"))


def test_an_ensemble_is_counted_by_its_folders() -> None:
    assert [num_members(version(members=count)) for count in (1, 2, 11)] == [1, 2, 11]


def test_without_settings_nothing_changes() -> None:
    assert made(version()) == Shaping()
    rule = shaping_of("f", RewardSource(function="m:f"), [], version("t/s:1"))
    assert rule == Shaping() and not rule.changes


def test_an_ensemble_in_one_version_and_in_several() -> None:
    assert made(version(members=4), deviation_penalty=0.5) == Shaping(members=4, deviation_penalty=0.5)
    assert made(version(members=4)) == made(version(members=4), deviation_penalty=0.0) == Shaping(members=4)
    three = made(version("t/a:1"), version("t/b:1", members=2), deviation_penalty=2.0)
    assert three == Shaping(members=3, deviation_penalty=2.0)


def test_the_scale_is_the_versions_own() -> None:
    assert made(version(members=2, **RECORDS), normalise="sft") == Shaping(
        members=2, centres=(1.5, 1.5), scales=(0.5, 0.5)
    )
    other = version("t/b:1", **RECORDS | {"sft/score_mean": -1.0, "sft/score_deviation": 2.0})
    found = made(version(members=2, **RECORDS), other, normalise="sft")
    assert (found.centres, found.scales) == ((1.5, 1.5, -1.0), (0.5, 0.5, 2.0))


def test_members_that_differ_by_a_constant_alone_do_not_disagree() -> None:
    """Each has its own mean on SFT's replies; the scale is the ensemble's."""
    own = {"sft/score_mean/0": 1.0, "sft/score_mean/1": 2.0, "sft/score_deviation/0": 9.0}
    found = made(version(members=2, **RECORDS | own), normalise="sft")
    assert (found.centres, found.scales) == ((1.0, 2.0), (0.5, 0.5))
    partly = {"sft/score_mean/0": 1.0}
    assert made(version(members=2, **RECORDS | partly), normalise="sft").centres == (1.5, 1.5)


def test_length_by_a_number_and_as_fitted() -> None:
    assert made(version(), length_penalty=0.1) == Shaping(slope=0.1)
    assert made(version(), length_penalty=0.0).slope == 0.0
    assert made(version(**RECORDS), length_penalty="fitted") == Shaping(slope=-0.25, mean_tokens=12.0)
    rule = shaping_of("f", RewardSource(function="m:f", length_penalty=0.5), [], version("t/s:1"))
    assert rule == Shaping(slope=0.5)


def test_by_reference() -> None:
    assert made(version(), shape="reference") == Shaping(by_reference=True)


@pytest.mark.parametrize(
    ("versions", "setting", "said"),
    [
        ([version()], {"deviation_penalty": 0.0}, "t/r:1 is a single model, whose members cannot disagree. Train an"),
        ([version()], SFT, "has no sft/score_mean and no sft/score_deviation among its metrics"),
        ([version(**RECORDS | {"sft/score_deviation": None})], SFT, "has no sft/score_deviation among"),
        ([version(**RECORDS | {"sft/score_deviation": 0.0})], SFT, "scores all of SFT's replies alike"),
        ([version(**RECORDS), version("t/b:2")], SFT, "t/b:2 has no sft/score_mean"),
        ([version()], FITTED, "fitted reads length/slope and length/mean; t/r:1 has no length"),
        ([version(tokenizer="u", **RECORDS)], FITTED, "tokens of another tokenizer than t/s:1"),
        ([version(**RECORDS), version("t/b:1", **RECORDS)], FITTED, "each with a slope of its"),
    ],
)
def test_what_cannot_be_done_is_refused(versions: list[Any], setting: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(*versions, **setting)


def test_where_sfts_replies_stand_follows_the_length_penalty() -> None:
    """SFT's replies of 20 tokens lose -0.25 x (20 - 12) = -2: so their mean 1.5 has become 3.5."""
    records = RECORDS | {"sft/tokens": 20.0}
    found = made(version(**records), length_penalty="fitted", normalise="sft")
    assert found.centres == (3.5,) and found.scales == (0.5,)
    tokens, scores = torch.tensor([20.0]), torch.tensor([[1.5]])
    assert found.each(scores, tokens, None).tolist() == [[0.0]]
    with pytest.raises(UserError, match="has no sft/tokens"):
        made(version(**RECORDS), length_penalty=0.1, normalise="sft")
