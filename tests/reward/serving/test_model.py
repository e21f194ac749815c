"""The served model: what PPO computes aboard, an ensemble's mean and deviation, and rows that it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from reward.sample import Sample
from reward.serving.limits import Limits, RefusedError
from reward.serving.model import Scores, open_model
from tests.reward.conftest import ROWS


def test_a_version_of_the_chain_scores_the_very_ids_of_a_rollout(tiny_chain: Any) -> None:
    """As PPO does aboard: prompt ids and the reply's own ids with the stop token, here by plain transformers."""
    from baton.chat import encode_prompt, stop_ids
    from baton.models import load_scorer

    version = tiny_chain.versions["reward"]
    model = open_model(tiny_chain.registry, version, dtype="float32", device="cpu", batch_tokens=64, limits=Limits())
    scorer, tokenizer = load_scorer(tiny_chain.registry, version, "float32")
    expected, rows = [], []
    for row in ROWS:
        reply = tokenizer(row.response, add_special_tokens=False)["input_ids"]
        ids = encode_prompt(tokenizer, row.prompt) + reply + stop_ids(tokenizer)
        rows.append(Sample(row.prompt, [], [], tokenizer.decode(reply), {}))
        with torch.no_grad():
            expected.append(scorer(input_ids=torch.tensor([ids])).logits.item())
    found = model.score(model.encode(rows))
    assert found.rewards == pytest.approx(expected, abs=1e-5) and found.deviations is None
    assert len({round(reward, 4) for reward in expected}) == 3
    assert (model.dtype, model.device, model.num_members) == ("float32", "cpu", 1)


def test_an_ensemble_gives_the_members_mean_and_deviation(tiny_chain: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    chain, folder = tiny_chain.copy(tmp_path / "chain"), tmp_path / "ensemble"
    version = chain.registry.resolve(tiny_chain.versions["reward"].ref)
    chain.registry.materialise(version, folder)
    shutil.rmtree(folder / "base", ignore_errors=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    for number, factor in ((1, 2.0), (2, -1.0)):
        member = folder / "members" / str(number)
        member.mkdir(parents=True)
        shutil.copy(folder / "adapter_config.json", member)
        changed = {key: tensor * factor if "score" in key else tensor for key, tensor in tensors.items()}
        save_file(changed, member / "adapter_model.safetensors", metadata={"format": "pt"})
    base = chain.registry.by_digest(version.base)
    published = chain.registry.publish(folder, name="tiny/ensemble", kind="reward", base=base, details={})

    def scores(ref: str) -> tuple[int, Scores]:
        model = open_model(
            chain.registry, chain.registry.resolve(ref), dtype="float32", device="cpu", batch_tokens=64, limits=Limits()
        )
        return model.num_members, model.score(model.encode(ROWS))

    (one, single), (three, together) = scores(version.ref), scores(published.ref)
    assert (one, three) == (1, 3)
    # members score s, 2s and -s: mean 2s/3, variance (1/9 + 16/9 + 25/9) s^2 / 3
    assert together.rewards == pytest.approx([2 / 3 * s for s in single.rewards], rel=1e-4, abs=1e-6)
    assert together.deviations == pytest.approx([abs(s) * (14 / 9) ** 0.5 for s in single.rewards], rel=1e-4, abs=1e-6)
    assert together.part(1, 2) == Scores(together.rewards[1:2], together.deviations[1:2])


def test_rows_that_are_too_long_are_named(judge: Any) -> None:
    for limit, replies, message in (
        (30, ["short", "x" * 20], "samples.1: prompt and response are 45 tokens; at most 30 are read"),
        (8192, ["x" * 60], "samples.0: prompt and response are none, or more than 64 tokens"),
    ):
        limits = Limits(row_tokens=limit)
        model = open_model(
            judge, judge.resolve("other/judge:1"), dtype="float32", device="cpu", batch_tokens=64, limits=limits
        )
        rows = [Sample(ROWS[0].prompt, [], [], reply, {}) for reply in replies]
        with pytest.raises(RefusedError) as caught:
            model.encode(rows)
        assert caught.value.status == 422 and message in str(caught.value) and "xx" not in str(caught.value)


def test_turns_that_the_template_refuses(judge: Any) -> None:
    model = open_model(
        judge, judge.resolve("other/judge:1"), dtype="float32", device="cpu", batch_tokens=64, limits=Limits()
    )
    model.source._tokenizer.chat_template = "{{ raise_exception('no secret turns') }}"
    with pytest.raises(
        RefusedError, match=r"samples.0: the chat template of other/judge:1 refuses it \(TemplateError\)"
    ):
        model.encode(ROWS)


def test_scores_are_written_to_the_last_bit(judge: Any) -> None:
    model = open_model(
        judge, judge.resolve("other/judge:1"), dtype="float32", device="cpu", batch_tokens=64, limits=Limits()
    )
    scores = model.score(model.encode(ROWS))
    assert json.loads(json.dumps(scores.rewards)) == scores.rewards
    assert torch.tensor(scores.rewards).tolist() == scores.rewards
    assert model.score([]) == Scores([], None)
