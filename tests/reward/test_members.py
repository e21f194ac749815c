"""Members on one base: what plain peft computes, a pair in one row or two, files that survive, nothing shared."""

from pathlib import Path
from typing import Any

import pytest
import torch

from reward.members import Members
from reward.pairs import Pair
from reward.rows import pair_rows

PAD = 2
CPU = torch.device("cpu")


def pair(chosen: list[int], rejected: list[int], shared: int) -> Pair:
    return Pair(chosen, rejected, shared, [], [], [], "", 1)


PAIRS = [
    pair([3, 9, 4, 11, 12, 13, 1], [3, 9, 4, 20, 1], 3),
    pair([7, 1], [8, 30, 31, 1], 0),
    pair([5, 6, 7, 8, 9, 10, 1], [5, 6, 7, 8, 9, 40, 41, 42, 1], 5),
]


def made(role_folders: Any, count: int = 1, trained: Any = "adapter", dtype: torch.dtype = torch.float64) -> Members:
    members = Members.from_sft(role_folders.base, role_folders.sft, dtype, PAD, count=count, trained=trained, seed=3)
    with torch.no_grad():
        for number in range(count):
            head = members.parameters_of(number)["score.weight"]
            head.add_(torch.randn(head.shape, generator=torch.Generator().manual_seed(number)))
    if dtype is torch.float64:
        members.double()
    members.join()
    return members


def plain(folders: Any, adapter: Path) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folders.base, num_labels=1)
    model.config.pad_token_id = PAD
    return PeftModel.from_pretrained(model, adapter).double().eval()


def rewards_and_gradients(members: Members, share: bool, number: int = 0) -> tuple[torch.Tensor, dict[str, Any]]:
    """(2, N) scores, and the gradients of a sum of them that no symmetry cancels."""
    scores = members.rewards(members.states(pair_rows(PAIRS, share, PAD, CPU), number), number)
    parameters = members.parameters_of(number)
    weights = torch.tensor([[1.0, -2.0, 0.5], [-0.3, 1.7, -1.1]], dtype=torch.float64)
    found = torch.autograd.grad((weights * scores).sum(), list(parameters.values()))
    return scores.detach(), dict(zip(parameters, found, strict=True))


@pytest.mark.parametrize("implementation", ["short", "sdpa", "eager"])
@pytest.mark.parametrize("trained", ["adapter", "full"])
def test_a_pair_in_one_row_is_a_pair_in_two(
    role_folders: Any, implementation: str, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = made(role_folders, trained=trained)
    if implementation != "short":
        monkeypatch.setattr("baton.attention.SHORT", 0)
        members.model.config._attn_implementation = implementation
    assert members.can_share_prompts(32)
    apart, expected = rewards_and_gradients(members, share=False)
    joined, found = rewards_and_gradients(members, share=True)
    # transformers' norms round to float32 inside
    torch.testing.assert_close(joined, apart, rtol=0, atol=3e-5)
    assert float(apart.std()) > 0.1
    largest = max(float(item.abs().max()) for item in expected.values())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5 * largest)


def test_the_second_side_does_not_see_the_first(role_folders: Any) -> None:
    members = made(role_folders)
    other = pair([3, 9, 4, 44, 45, 46, 1], PAIRS[0].rejected_ids, 3)
    with torch.no_grad():
        one, two = (members.states(pair_rows([given], True, PAD, CPU), 0)[:, 0] for given in (PAIRS[0], other))
    torch.testing.assert_close(one[1], two[1], rtol=0, atol=1e-6)
    assert float((one[0] - two[0]).abs().max()) > 1e-2


def test_windows_and_strangers_read_their_sides_apart(role_folders: Any) -> None:
    members = made(role_folders)
    members.model.config.sliding_window = 8
    assert not members.can_share_prompts(9) and members.can_share_prompts(8)
    members.model.config.sliding_window = None
    members.model.config.model_type = "bloom"
    assert not members.can_share_prompts(8)


def test_the_scores_are_those_of_plain_peft(role_folders: Any, tmp_path: Path) -> None:
    members = made(role_folders, count=2)
    with torch.no_grad():
        for number in (0, 1):
            for parameter in members.parameters_of(number).values():
                generator = torch.Generator().manual_seed(number)
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    sequences = [item.chosen_ids for item in PAIRS] + [item.rejected_ids for item in PAIRS]
    found = members.score(sequences, max_tokens=12)
    assert found.shape == (2, 6) and found.dtype is torch.float32
    for number in (0, 1):
        folder = tmp_path / str(number)
        members.save(number, folder)
        model = plain(role_folders, folder)
        with torch.no_grad():
            expected = [float(model(input_ids=torch.tensor([ids])).logits) for ids in sequences]
        torch.testing.assert_close(found[number], torch.tensor(expected), rtol=0, atol=1e-5)
    assert float((found[0] - found[1]).abs().max()) > 0.1
    again = Members.from_folders(role_folders.base, [tmp_path / "0", tmp_path / "1"], torch.float32, PAD)
    torch.testing.assert_close(again.score(sequences), found, rtol=0, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_members_start_as_sft_with_heads_of_their_own(role_folders: Any) -> None:
    members = Members.from_sft(
        role_folders.base, role_folders.sft, torch.float32, PAD, count=3, trained="adapter", seed=3
    )
    adapters = [
        torch.cat([p.flatten() for name, p in members.parameters_of(number).items() if "score" not in name])
        for number in range(3)
    ]
    assert torch.equal(adapters[0], adapters[1]) and float(adapters[0].detach().abs().max()) > 0
    heads = [members.parameters_of(number)["score.weight"].detach() for number in range(3)]
    assert not heads[0].any() and not torch.equal(heads[1], heads[2])
    # N(0, 1 / 33) of 32 numbers
    assert 0.1 < float(heads[1].std()) < 0.25
    places = [{p.data_ptr() for p in members.parameters_of(number).values()} for number in range(3)]
    assert not places[0] & places[1] and not places[1] & places[2]
    trained = {name for name, p in members.named_parameters() if p.requires_grad}
    assert len(trained) == sum(len(members.parameters_of(number)) for number in range(3)) == 3 * 29


def test_what_is_trained(role_folders: Any) -> None:
    head = made(role_folders, count=2, trained="head")
    assert [list(head.parameters_of(number)) for number in (0, 1)] == [["score.weight"]] * 2
    assert {name for name, p in head.named_parameters() if p.requires_grad} == {"heads.0.weight", "heads.1.weight"}
    full = made(role_folders, trained="full", dtype=torch.bfloat16)
    assert all(p.dtype is torch.float32 for p in full.parameters_of(0).values())
    trained = {name for name, p in full.named_parameters() if p.requires_grad}
    assert "heads.0.weight" in trained and "model.model.embed_tokens.weight" in trained
    assert "model.score.weight" not in trained and not any("lora" in name for name in trained)


def test_a_whole_model_is_saved_in_its_bases_number_format(role_folders: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    members = made(role_folders, trained="full", dtype=torch.float32)
    members.save(0, tmp_path)
    sequences = [item.chosen_ids for item in PAIRS]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert model.dtype is torch.float32 and model.config.pad_token_id == PAD
    with torch.no_grad():
        expected = [float(model(input_ids=torch.tensor([ids])).logits) for ids in sequences]
    torch.testing.assert_close(members.score(sequences)[0], torch.tensor(expected), rtol=0, atol=1e-5)


def test_what_is_measured_of_a_whole_model_is_what_is_saved(role_folders: Any, tmp_path: Path) -> None:
    """A base whose files are in bfloat16, trained and scored in float32."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(role_folders.base, dtype=torch.bfloat16).save_pretrained(base)
    members = made(role_folders._replace(base=base), trained="full", dtype=torch.float32)
    sequences = [item.chosen_ids for item in PAIRS]
    unrounded = members.score(sequences)
    members.round_as_saved()
    members.save(0, tmp_path / "saved")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.tensor([float(model(input_ids=torch.tensor([ids])).logits) for ids in sequences])
    torch.testing.assert_close(members.score(sequences)[0], expected, rtol=0, atol=1e-5)
    assert float((unrounded[0] - expected).abs().max()) > 1e-4
