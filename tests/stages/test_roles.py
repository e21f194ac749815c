"""The roles on one base against separate plain models in float64, and who is trained by what."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.errors import UserError
from baton.lora import families
from baton.recipe import Lora
from stages.micro_batch import MicroBatch, make_micro_batch
from stages.roles import POLICY, REFERENCE, VALUE, Cast, Roles, check_head

TIGHT = {"rtol": 0.0, "atol": 1e-8}
TEMPERATURE = 0.7
Rows = dict[str, list[torch.Tensor]]


def batch_of(episodes: list[Any], pad_id: int = 2, **options: Any) -> MicroBatch:
    return make_micro_batch(episodes, range(len(episodes)), pad_id, **options)


def outputs(roles: Roles, batch: MicroBatch) -> Rows:
    """Everything the roles say about a batch, one tensor of response length a row."""
    lengths, states = batch.is_response.sum(-1).tolist(), batch.is_state.sum(-1).tolist()
    with torch.no_grad():
        forward, reference = roles(batch), roles.logprobs(REFERENCE, batch)
        (scores,) = roles.scores("r", batch)
    for table, inside in (
        (forward.logprobs, batch.is_response),
        (forward.entropies, batch.is_response),
        (reference.logprobs, batch.is_response),
        (forward.values, batch.is_state),
    ):
        assert (table[~inside] == 0).all(), "zero where there is no response token"
    return {
        "policy": [row[:n] for row, n in zip(forward.logprobs, lengths, strict=True)],
        "entropies": [row[:n] for row, n in zip(forward.entropies, lengths, strict=True)],
        "reference": [row[:n] for row, n in zip(reference.logprobs, lengths, strict=True)],
        "values": [row[:n] for row, n in zip(forward.values, states, strict=True)],
        "scores": [score[None] for score in scores],
    }


def oracles(oracle: Any, episodes: list[Any], after: bool = False) -> Rows:
    """The oracle's word on every episode; values after the end, too, of replies that ended."""
    rows = [(episode.prompt, episode.reply.ids) for episode in episodes]
    with torch.no_grad():
        trained = [
            oracle.all_of(*row, TEMPERATURE, after and episode.reply.ended)
            for row, episode in zip(rows, episodes, strict=True)
        ]
        return {
            "policy": [logprobs for logprobs, _, _ in trained],
            "entropies": [entropies for _, entropies, _ in trained],
            "values": [values for _, _, values in trained],
            "reference": [oracle.logprobs(oracle.reference, *row, TEMPERATURE) for row in rows],
            "scores": [torch.tensor([oracle.score(*row)], dtype=torch.float64) for row in rows],
        }


@pytest.fixture
def expected(oracle: Any, episodes: list[Any]) -> Rows:
    return oracles(oracle, episodes)


def assert_same(found: Rows, expected: Rows) -> None:
    for name, rows in expected.items():
        for ours, theirs in zip(found[name], rows, strict=True):
            torch.testing.assert_close(ours, theirs, **TIGHT)


def test_equal_to_four_separate_models(roles: Roles, episodes: list[Any], expected: Rows) -> None:
    assert_same(outputs(roles, batch_of(episodes)), expected)


@pytest.mark.parametrize("members", [[[0], [1], [2], [3], [4], [5], [6], [7]], [[5, 2, 0], [7], [1, 3, 6, 4]]])
def test_micro_batches_grouping_and_order_do_not_matter(
    roles: Roles, episodes: list[Any], expected: Rows, members: list[list[int]]
) -> None:
    """One row at a time has no padding at all: right padding without an attention mask gives the same."""
    for group in members:
        found = outputs(roles, make_micro_batch(episodes, group, 2))
        assert_same(found, {name: [rows[at] for at in group] for name, rows in expected.items()})


@pytest.mark.parametrize("pad_id", [0, 1, 47])
def test_the_pad_id_does_not_matter(roles: Roles, episodes: list[Any], expected: Rows, pad_id: int) -> None:
    """1 is the stop token: pad = eos changes nothing."""
    assert_same(outputs(roles, batch_of(episodes, pad_id)), expected)


@pytest.mark.parametrize(("kind", "bound"), [("sdpa", 1e-8), ("eager", 1e-5)])
def test_every_kind_of_attention_gives_the_same(
    roles: Roles, episodes: list[Any], expected: Rows, kind: str, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As short rows' own attention does; transformers' eager one takes its softmax in float32."""

    def choose(model: Any, length: int) -> None:
        model.config._attn_implementation = kind

    monkeypatch.setattr("stages.roles.choose_attention", choose)
    found = outputs(roles, batch_of(episodes))
    for name, rows in expected.items():
        for ours, theirs in zip(found[name], rows, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)


def test_sampling_finds_the_models_attention_as_it_was(roles: Roles, episodes: list[Any]) -> None:
    """Else a run that was resumed would sample by other arithmetic than one that has just trained."""
    before = roles.shared.config._attn_implementation
    outputs(roles, batch_of(episodes))
    assert roles.shared.config._attn_implementation == before


def test_the_state_after_the_end_has_a_value(roles: Roles, oracle: Any, episodes: list[Any]) -> None:
    batch = batch_of(episodes, score_after_eos=True)
    assert_same(outputs(roles, batch), oracles(oracle, episodes, after=True))
    ended = torch.tensor([episode.reply.ended for episode in episodes])
    assert torch.equal(batch.is_state.sum(-1), batch.is_response.sum(-1) + ended)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("policy", ["adapter", "full"])
def test_other_policies_and_critics(
    make_roles: Callable[..., Roles], make_oracle: Callable[..., Any], episodes: list[Any], policy: str, critic: str
) -> None:
    roles, oracle = make_roles(policy=policy, critic=critic), make_oracle(policy, critic)
    if critic == "shared":
        head = torch.linspace(-1, 1, 32, dtype=torch.float64)
        with torch.no_grad():
            assert not roles.value_head.weight.any(), "a head on other states starts from zero"
            roles.value_head.weight.copy_(head)
            oracle.shared_head.copy_(head)
    assert_same(outputs(roles, batch_of(episodes)), oracles(oracle, episodes))


def test_a_critic_without_a_reward_model_starts_from_zero(
    make_roles: Callable[..., Roles], episodes: list[Any]
) -> None:
    for critic in ("adapter", "shared", "separate"):
        roles = make_roles(critic=critic, critic_start=None, rewards={})
        with torch.no_grad():
            assert not roles.values(batch_of(episodes)).any(), critic
        roles.values(batch_of(episodes)).sum().backward()
        assert roles.value_head.weight.grad is not None and roles.value_head.weight.grad.any(), critic


def test_a_new_adapter_on_a_merged_model(make_roles: Callable[..., Roles], episodes: list[Any], oracle: Any) -> None:
    """Without SFT's adapter the base is SFT's model: policy and reference begin as it."""
    roles = make_roles(sft=None, lora=Lora(r=2, alpha=4), critic="shared", rewards={})
    batch = batch_of(episodes)
    with torch.no_grad():
        ours, reference = roles.policy(batch).logprobs, roles.logprobs(REFERENCE, batch).logprobs
        assert torch.equal(ours, reference)
        for row, episode in zip(reference, episodes, strict=True):
            plain = oracle.logprobs(oracle.base, episode.prompt, episode.reply.ids, TEMPERATURE)
            torch.testing.assert_close(row[: len(plain)], plain, **TIGHT)
        for parameter in roles.trained_parameters().values():
            parameter += 0.05
        assert torch.equal(roles.logprobs(REFERENCE, batch).logprobs, reference)
        assert float((roles.policy(batch).logprobs - reference).abs().max()) > 1e-3


def test_a_full_policy_on_a_merged_model_with_a_critic_of_its_own(
    make_roles: Callable[..., Roles], episodes: list[Any]
) -> None:
    roles = make_roles(sft=None, policy="full", critic="separate", critic_start=None, rewards={})
    assert torch.isfinite(roles(batch_of(episodes)).logprobs).all()


def test_a_full_policys_reference_and_rewards_stay(
    make_roles: Callable[..., Roles], episodes: list[Any], expected: Rows
) -> None:
    roles = make_roles(policy="full")
    with torch.no_grad():
        for parameter in roles.trained_parameters().values():
            parameter += 0.01
    found = outputs(roles, batch_of(episodes))
    assert_same(found, {name: expected[name] for name in ("reference", "scores")})
    assert float((found["policy"][0] - expected["policy"][0]).abs().max()) > 1e-3


def test_the_reference_is_sft_and_not_the_raw_base(roles: Roles, oracle: Any, episodes: list[Any]) -> None:
    row = (episodes[0].prompt, episodes[0].reply.ids, TEMPERATURE)
    with torch.no_grad():
        found = roles.logprobs(REFERENCE, batch_of(episodes[:1])).logprobs[0]
        torch.testing.assert_close(found, oracle.logprobs(oracle.reference, *row), **TIGHT)
        assert float((found - oracle.logprobs(oracle.base, *row)).abs().max()) > 0.1


def test_the_reference_stays_when_the_policy_moves(roles: Roles, episodes: list[Any], expected: Rows) -> None:
    with torch.no_grad():
        for parameter in roles.trained_parameters().values():
            parameter += 0.05
    found = outputs(roles, batch_of(episodes))
    assert_same(found, {name: expected[name] for name in ("reference", "scores")})
    for name in ("policy", "values"):
        assert float((found[name][0] - expected[name][0]).abs().max()) > 1e-3


def test_temperature_divides_the_logits_of_policy_and_reference(
    make_roles: Callable[..., Roles], episodes: list[Any]
) -> None:
    batch = batch_of(episodes)
    with torch.no_grad():
        tables = [
            make_roles(temperature).logprobs(role, batch).logprobs
            for temperature in (0.7, 1.3)
            for role in (POLICY, REFERENCE)
        ]
        assert torch.equal(make_roles(0.7).policy(batch, temperature=1.3).logprobs, tables[2])
    torch.testing.assert_close(tables[0], tables[1])
    torch.testing.assert_close(tables[2], tables[3])
    assert float((tables[0] - tables[2]).abs().max()) > 0.1


def flags(roles: Roles) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in roles.named_parameters()}


def reached(roles: Roles) -> set[str]:
    return {n for n, p in roles.named_parameters() if p.grad is not None and bool(p.grad.any())}


def test_switching_roles_keeps_requires_grad(roles: Roles, episodes: list[Any]) -> None:
    before = flags(roles)
    trained = {name for name, flag in before.items() if flag}
    assert trained == {n for n in before if ".policy." in n or ".value." in n or n == "value_head.weight"}
    assert len(trained) == 2 * 2 * 14 + 1
    for role in (VALUE, REFERENCE, POLICY, "reward_0"):
        with roles.acting_as(role):
            assert flags(roles) == before
    outputs(roles, batch_of(episodes))
    assert flags(roles) == before


@pytest.mark.parametrize("policy", ["adapter", "full"])
@pytest.mark.parametrize("critic", ["adapter", "shared", "separate"])
def test_gradients_reach_only_what_the_loss_is_about(
    make_roles: Callable[..., Roles], episodes: list[Any], policy: str, critic: str
) -> None:
    roles, batch = make_roles(policy=policy, critic=critic), batch_of(episodes)
    if critic == "shared":
        roles.value_head.weight.data.fill_(0.1)
    trained = {name for name, flag in flags(roles).items() if flag}
    critics = {name for name in trained if roles.is_critics(name)}
    assert critics and critics < trained
    forward = roles(batch)
    roles.logprobs(REFERENCE, batch)  # another role in between must not divert the gradients
    forward.logprobs.sum().backward(retain_graph=True)
    assert reached(roles) == trained - critics
    roles.zero_grad(set_to_none=True)
    forward.values.sum().backward()
    # the final states come from all of the policy but its output head
    policys = {name for name in trained - critics if "lm_head" not in name} if critic == "shared" else set()
    assert reached(roles) == critics | policys


@pytest.mark.parametrize("critic", ["adapter", "shared"])
def test_gradients_equal_those_of_plain_models(
    make_roles: Callable[..., Roles], make_oracle: Callable[..., Any], episodes: list[Any], critic: str
) -> None:
    """Log-probabilities, entropies and values each weighted by another number a token."""
    roles, oracle = make_roles(critic=critic), make_oracle(critic=critic)
    with torch.no_grad():
        if critic == "shared":
            roles.value_head.weight.fill_(0.3)
            oracle.shared_head.fill_(0.3)
    forward = roles(batch_of(episodes), entropy_gradient=True)
    steps = torch.arange(1.0, 7.0, dtype=torch.float64)
    (forward.logprobs * steps + forward.entropies * steps.sqrt() + forward.values / steps).sum().backward()
    for episode in episodes:
        logprobs, entropies, values = oracle.all_of(episode.prompt, episode.reply.ids, TEMPERATURE)
        here = steps[: len(values)]
        (logprobs * here + entropies * here.sqrt() + values / here).sum().backward()
    ours = [roles.additions(POLICY)] + ([roles.additions(VALUE)] if critic == "adapter" else [])
    for additions, model in zip(ours, (oracle.policy, oracle.value_model), strict=False):
        lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
        assert len(additions) == 14 and len(lora) == 28
        pairs = zip((a for addition in additions for a in (addition.down, addition.up)), lora.values(), strict=True)
        for mine, theirs in pairs:
            torch.testing.assert_close(mine.grad, theirs.grad, **TIGHT)


def test_one_copy_of_the_base(make_roles: Callable[..., Roles]) -> None:
    for changes, copies in (({}, 1), ({"policy": "full"}, 2), ({"critic": "separate", "policy": "full"}, 3)):
        roles = make_roles(**changes)
        assert sum("embed_tokens" in name for name, _ in roles.named_parameters()) == copies
        assert not any(module.training for module in roles.modules())


def test_several_rewards_on_one_base(
    make_roles: Callable[..., Roles],
    role_folders: Any,
    episodes: list[Any],
    expected: Rows,
    tmp_path: Path,
    randomise: Any,
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(role_folders.base, num_labels=1)
    other = get_peft_model(plain, LoraConfig(task_type="SEQ_CLS", r=1, target_modules=["q_proj"]))
    randomise(other, 9).save_pretrained(tmp_path)
    other.double().eval().config.pad_token_id = 2
    roles = make_roles(rewards={"r": [role_folders.reward], "an.other/name": [tmp_path]})
    batch = batch_of(episodes)
    (scores,) = roles.scores("an.other/name", batch)
    for score, episode in zip(scores, episodes, strict=True):
        with torch.no_grad():
            given = torch.tensor([episode.prompt + episode.reply.ids])
            theirs = other(input_ids=given, use_cache=False).logits[0, 0]
        torch.testing.assert_close(score, theirs, **TIGHT)
    assert_same(outputs(roles, batch), expected)


@pytest.mark.parametrize("policy", ["adapter", "full"])
def test_saved_policy_loads_in_plain_transformers(
    make_roles: Callable[..., Roles], role_folders: Any, episodes: list[Any], oracle: Any, tmp_path: Path, policy: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    roles = make_roles(policy=policy)
    with torch.no_grad():
        for name, parameter in roles.trained_parameters().items():
            parameter += 0.03 if name.endswith("down") else 0.02
    roles.save_policy(tmp_path / "policy")
    if policy == "full":
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").double().eval()
    else:
        base = AutoModelForCausalLM.from_pretrained(role_folders.base).double()
        plain = PeftModel.from_pretrained(base, tmp_path / "policy").double().eval()
    with torch.no_grad():
        ours = roles.logprobs(POLICY, batch_of(episodes[:1])).logprobs[0]
        theirs = oracle.logprobs(plain, episodes[0].prompt, episodes[0].reply.ids, TEMPERATURE)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("critic", ["adapter", "shared", "separate"])
def test_saved_value_loads_as_a_classifier_with_its_head(
    make_roles: Callable[..., Roles], role_folders: Any, episodes: list[Any], tmp_path: Path, critic: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    roles = make_roles(critic=critic)
    with torch.no_grad():
        for parameter in roles.trained_parameters().values():
            parameter += 0.02
    roles.save_value(tmp_path / "value")
    folder = tmp_path / "value" if critic == "separate" else role_folders.base
    plain: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    if critic != "separate":
        plain = PeftModel.from_pretrained(plain, tmp_path / "value")
    plain.double().eval()
    episode = episodes[0]
    with torch.no_grad():
        ours = roles.values(batch_of([episode]))[0]
        theirs = [
            float(plain(input_ids=torch.tensor([episode.prompt + episode.reply.ids[:at]]), use_cache=False).logits)
            for at in range(len(episode.reply.ids))
        ]
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=1e-5)
    assert len({round(value, 3) for value in theirs}) > 1


def test_decoding_holds_the_factors_only_meanwhile(roles: Roles, episodes: list[Any]) -> None:
    """What is held in another format while sampling must not outlive an update."""
    given = torch.tensor([episodes[0].prompt])
    with torch.no_grad(), roles.sampling(POLICY) as model:
        before = model(input_ids=given).logits
    with torch.no_grad():
        for parameter in roles.trained_parameters().values():
            parameter += 0.05
        with roles.sampling(POLICY) as model:
            after = model(input_ids=given).logits
        with roles.acting_as(POLICY) as model:
            assert torch.equal(model(input_ids=given).logits, after)
    assert float((after - before).abs().max()) > 1e-3


def test_a_head_that_changes_its_logits_is_refused(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    check_head(roles, [3, 4, 5])
    head = roles.shared.get_output_embeddings()
    with monkeypatch.context() as patch:
        # as Gemma caps: the model's own forward pass goes on after the head
        forward = type(roles.shared).forward

        def capped(self: Any, **given: Any) -> Any:
            found = forward(self, **given)
            found.logits = 3.0 * torch.tanh(found.logits / 3.0)
            return found

        patch.setattr(type(roles.shared), "forward", capped)
        with pytest.raises(UserError, match="changes its logits after the output head"):
            check_head(roles, [3, 4, 5])
    assert head is roles.shared.get_output_embeddings()


def test_scores_of_the_published_reward_model(tiny_chain: Any) -> None:
    """The chain's own reward version: what PPO scores is what plain peft scores."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from baton.decode import Reply
    from stages.rollout import Episode

    base, reward = tiny_chain.folder("pretrain"), tiny_chain.folder("reward")
    cast = Cast(base=base, sft=tiny_chain.folder("sft"), rewards={"r": [reward]}, critic_start=reward)
    roles = Roles(cast, torch.float32, 1.0)
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    classifier.config.pad_token_id = 1
    plain = PeftModel.from_pretrained(classifier, reward).eval()
    rows = [([5, 90, 17], [300, 2]), ([8], [41, 42, 43, 44]), ([301, 302], [9])]
    batch = batch_of([Episode(0, prompt, Reply(reply, False)) for prompt, reply in rows], 1)
    with torch.no_grad():
        expected = [float(plain(input_ids=torch.tensor([prompt + reply])).logits) for prompt, reply in rows]
        torch.testing.assert_close(roles.scores("r", batch), torch.tensor([expected]), rtol=0, atol=1e-5)
    assert len({round(score, 4) for score in expected}) == 3, "the head should tell the rows apart"


def test_what_sampling_copies(make_roles: Callable[..., Roles]) -> None:
    """As many bytes as are held beside the weights, but for the additions' own."""
    roles = make_roles()
    roles.join()
    own = roles.laid_out
    assert own == sum(p.numel() * 8 for name, p in roles.shared.named_parameters() if ".base.weight" in name) > 0
    with roles.sampling(POLICY):
        copies = [family.held[POLICY].widened.shape for family in families(roles.shared)]
        ranks = [sum(len(a.down) for a in family.additions(POLICY)[1]) for family in families(roles.shared)]
    assert own == sum(8 * out * (size - rank) for (out, size), rank in zip(copies, ranks, strict=True))
    assert not any(family.held for family in families(roles.shared))
    full = make_roles(policy="full")
    assert full.laid_out == 0
    with full.sampling(POLICY):
        assert not any(family.held for family in families(full.shared)), "the shared weights are not sampled from"
