"""Four roles on one base against four separate models in float64, and who is trained by what."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stages.roles import POLICY, REFERENCE, REWARD, VALUE, Roles
from stages.rollout import MicroBatch, make_micro_batch

CPU = torch.device("cpu")
TIGHT = {"rtol": 0.0, "atol": 1e-8}
TEMPERATURE = 0.7


def outputs(roles: Roles, batch: MicroBatch) -> dict[str, list[torch.Tensor]]:
    """Everything the roles say about a batch, one tensor of response length a row."""
    lengths = batch.is_response.sum(-1).tolist()
    with torch.no_grad():
        forward = roles(batch)
        tables = {
            "policy": forward.logprobs,
            "reference": roles.logprobs(REFERENCE, batch),
            "values": forward.values,
            "scores": roles.scores(batch)[:, None],
        }
    for name, table in tables.items():
        outside = ~batch.is_response if name != "scores" else torch.zeros_like(table, dtype=torch.bool)
        assert (table[outside] == 0).all(), f"{name} should be zero outside the response"
    return {name: [row[:n] for row, n in zip(table, lengths, strict=True)] for name, table in tables.items()}


def assert_same(found: dict[str, list[torch.Tensor]], expected: dict[str, list[torch.Tensor]]) -> None:
    for name, rows in expected.items():
        for ours, theirs in zip(found[name], rows, strict=True):
            torch.testing.assert_close(ours, theirs, **TIGHT)


@pytest.fixture
def expected(oracle: Any, episodes: list[Any]) -> dict[str, list[torch.Tensor]]:
    """The oracle's word on every episode."""
    with torch.no_grad():
        rows = [(episode.prompt, episode.reply.ids) for episode in episodes]
        return {
            "policy": [oracle.logprobs(oracle.policy, *row, TEMPERATURE) for row in rows],
            "reference": [oracle.logprobs(oracle.reference, *row, TEMPERATURE) for row in rows],
            "values": [oracle.values(*row) for row in rows],
            "scores": [torch.tensor([oracle.score(*row)], dtype=torch.float64) for row in rows],
        }


def test_equal_to_four_separate_models(roles: Roles, episodes: list[Any], expected: Any) -> None:
    assert_same(outputs(roles, make_micro_batch(episodes, 2, CPU)), expected)


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batch_size_does_not_matter(roles: Roles, episodes: list[Any], expected: Any, size: int) -> None:
    for at in range(0, len(episodes), size):
        found = outputs(roles, make_micro_batch(episodes[at : at + size], 2, CPU))
        assert_same(found, {name: rows[at : at + size] for name, rows in expected.items()})


@pytest.mark.parametrize("pad_id", [0, 1, 47])
def test_the_pad_id_does_not_matter(roles: Roles, episodes: list[Any], expected: Any, pad_id: int) -> None:
    """1 is the stop token: pad = eos changes nothing."""
    assert_same(outputs(roles, make_micro_batch(episodes, pad_id, CPU)), expected)


def test_left_padding_gives_the_same(roles: Roles, episodes: list[Any], expected: Any) -> None:
    batch = make_micro_batch(episodes, 2, CPU)
    width = batch.input_ids.shape[1]
    shift = width - 1 - batch.last
    at = torch.arange(width) - shift[:, None]
    batch.attention_mask = (at >= 0).long()
    batch.position_ids = at.clamp(min=0)
    batch.input_ids = torch.where(at >= 0, batch.input_ids.gather(1, at.clamp(min=0)), torch.tensor(1))
    batch.before_response = torch.where(batch.is_response, batch.before_response + shift[:, None], 0)
    batch.last = batch.last + shift
    assert_same(outputs(roles, batch), expected)


def test_the_reference_is_sft_and_not_the_raw_base(roles: Roles, oracle: Any, episodes: list[Any]) -> None:
    batch = make_micro_batch(episodes[:1], 2, CPU)
    row = (episodes[0].prompt, episodes[0].reply.ids, TEMPERATURE)
    with torch.no_grad():
        found = roles.logprobs(REFERENCE, batch)[0]
        torch.testing.assert_close(found, oracle.logprobs(oracle.reference, *row), **TIGHT)
        assert float((found - oracle.logprobs(oracle.base, *row)).abs().max()) > 0.1


def test_the_reference_stays_when_the_policy_moves(roles: Roles, episodes: list[Any], expected: Any) -> None:
    with torch.no_grad():
        for parameter in roles.trained_parameters().values():
            parameter += 0.05
    found = outputs(roles, make_micro_batch(episodes, 2, CPU))
    assert_same(found, {name: expected[name] for name in ("reference", "scores")})
    for name in ("policy", "values"):
        assert float((found[name][0] - expected[name][0]).abs().max()) > 1e-3


def test_temperature_divides_the_logits_of_policy_and_reference(role_folders: Any, episodes: list[Any]) -> None:
    batch = make_micro_batch(episodes, 2, CPU)
    with torch.no_grad():
        tables = [
            Roles(*role_folders, torch.float32, temperature).logprobs(role, batch)
            for temperature in (0.7, 1.3)
            for role in (POLICY, REFERENCE)
        ]
    torch.testing.assert_close(tables[0], tables[1])
    torch.testing.assert_close(tables[2], tables[3])
    assert float((tables[0] - tables[2]).abs().max()) > 0.1


def flags(roles: Roles) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in roles.named_parameters()}


def test_switching_roles_keeps_requires_grad(roles: Roles, episodes: list[Any]) -> None:
    before = flags(roles)
    trained = {name for name, flag in before.items() if flag}
    assert trained == {n for n in before if ".policy." in n or ".value." in n or n == "value_head.weight"}
    for role in (REWARD, VALUE, REFERENCE, POLICY):
        with roles.acting_as(role):
            assert flags(roles) == before
    outputs(roles, make_micro_batch(episodes, 2, CPU))
    assert flags(roles) == before


def test_gradients_reach_only_the_role_that_the_loss_is_about(roles: Roles, episodes: list[Any]) -> None:
    batch = make_micro_batch(episodes, 2, CPU)
    forward = roles(batch)
    roles.logprobs(REFERENCE, batch)  # another role in between must not divert the gradients
    forward.logprobs.sum().backward(retain_graph=True)
    reached = {n for n, p in roles.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {name for name in flags(roles) if f".{POLICY}." in name}
    roles.zero_grad(set_to_none=True)
    forward.values.sum().backward()
    reached = {n for n, p in roles.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {name for name in flags(roles) if f".{VALUE}." in name} | {"value_head.weight"}


def test_one_copy_of_the_base(roles: Roles) -> None:
    embeddings = [name for name, _ in roles.named_parameters() if "embed_tokens" in name]
    assert len(embeddings) == 1
    assert not roles.training


def test_saved_policy_loads_in_plain_peft(
    roles: Roles, role_folders: Any, episodes: list[Any], oracle: Any, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        for name, parameter in roles.trained_parameters().items():
            parameter += 0.03 if "lora_A" in name else 0.02
    roles.save_policy(tmp_path / "policy")
    base = AutoModelForCausalLM.from_pretrained(role_folders.base).double()
    plain = PeftModel.from_pretrained(base, tmp_path / "policy").double().eval()
    with torch.no_grad():
        ours = roles.logprobs(POLICY, make_micro_batch(episodes[:1], 2, CPU))[0]
        theirs = oracle.logprobs(plain, episodes[0].prompt, episodes[0].reply.ids, TEMPERATURE)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_saved_value_loads_as_a_classifier_with_its_head(
    roles: Roles, role_folders: Any, episodes: list[Any], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    with torch.no_grad():
        for parameter in roles.trained_parameters().values():
            parameter += 0.02
    roles.save_value(tmp_path / "value")
    base = AutoModelForSequenceClassification.from_pretrained(role_folders.base, num_labels=1)
    plain = PeftModel.from_pretrained(base, tmp_path / "value").double().eval()
    episode = episodes[0]
    with torch.no_grad():
        ours = roles.values(make_micro_batch([episode], 2, CPU))[0]
        theirs = [
            float(plain(input_ids=torch.tensor([episode.prompt + episode.reply.ids[:at]]), use_cache=False).logits)
            for at in range(len(episode.reply.ids))
        ]
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=1e-5)


def test_scores_of_the_published_reward_model(tiny_chain: Any) -> None:
    """The chain's own reward version: what PPO scores is what plain peft scores."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from baton.decode import Reply
    from stages.rollout import Episode

    base, reward = tiny_chain.folder("pretrain"), tiny_chain.folder("reward")
    roles = Roles(base, tiny_chain.folder("sft"), reward, torch.float32, 1.0)
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    classifier.config.pad_token_id = 1
    plain = PeftModel.from_pretrained(classifier, reward).eval()
    rows = [([5, 90, 17], [300, 2]), ([8], [41, 42, 43, 44]), ([301, 302], [9])]
    batch = make_micro_batch([Episode(0, prompt, Reply(reply, False)) for prompt, reply in rows], 1, CPU)
    with torch.no_grad():
        expected = [float(plain(input_ids=torch.tensor([prompt + reply])).logits) for prompt, reply in rows]
        torch.testing.assert_close(roles.scores(batch), torch.tensor(expected), rtol=0, atol=1e-5)
    assert len({round(score, 4) for score in expected}) == 3, "the head should tell the rows apart"
