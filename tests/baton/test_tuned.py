"""A model that is fine-tuned: loss and gradients are those of plain transformers and peft, and so is what is saved."""

from pathlib import Path
from typing import Any

import pytest
import torch

from baton.errors import UserError
from baton.recipe import Lora
from baton.tuned import Tuned, check_quantise

CASES = {
    "plain": Lora(r=4, alpha=8),
    "rank-stabilised": Lora(r=4, alpha=8, rank_stabilised=True),
    "dora": Lora(r=4, alpha=8, dora=True),
    "two layers": Lora(r=4, alpha=8, targets=["q_proj", "down_proj"]),
}
IDS = torch.randint(3, 48, (3, 7), generator=torch.Generator().manual_seed(5))
PLACES = (torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 5, 3, 1, 2]))
TOKENS = IDS[PLACES[0], PLACES[1] + 1]


def make(folder: Path, lora: Lora, **settings: Any) -> Tuned:
    return Tuned.make(folder, torch.float32, trained="adapter", lora=lora, seed=3, **settings)


def randomised(tuned: Tuned) -> dict[str, torch.Tensor]:
    """Draw what is trained at random, so that the adapter changes the model."""
    generator = torch.Generator().manual_seed(9)
    for name, parameter in tuned.parameters().items():
        if "magnitude" not in name:  # DoRA's norms begin as the weight's own
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return dict(tuned.parameters())


def nats(tuned: Tuned) -> float:
    return float(tuned.token_sums(IDS, None, PLACES, TOKENS).nats.detach())


def plain_sum(model: Any) -> torch.Tensor:
    table = model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)
    return -table[PLACES[0], PLACES[1], TOKENS].sum()


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_peft(case: str, role_folders: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    """In float64: in float32 the rounding of a rank-stabilised adapter depends on the machine."""
    tuned = make(role_folders.base, CASES[case])
    randomised(tuned)
    tuned.save(tmp_path)
    tuned.model.double()
    tuned.join()
    parameters = tuned.parameters()
    fresh = AutoModelForCausalLM.from_pretrained(role_folders.base)
    theirs = PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True).double()
    expected = plain_sum(theirs)
    expected.backward()
    found = tuned.token_sums(IDS, None, PLACES, TOKENS)
    found.nats.backward()
    torch.testing.assert_close(found.nats, expected, rtol=1e-12, atol=0)
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(wanted) == len(parameters) > 0
    for name, parameter in parameters.items():
        place = name.removeprefix("base_model.model.")
        place = place.replace("additions.tuned.down", "lora_A.default.weight")
        place = place.replace("additions.tuned.up", "lora_B.default.weight")
        gradient = wanted[f"base_model.model.{place}"]
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-12 * float(gradient.norm()))
    assert float(sum(grad.abs().sum() for grad in wanted.values())) > 1


def test_the_scale_of_a_rank_stabilised_adapter(role_folders: Any) -> None:
    """alpha / sqrt r is sqrt r times alpha / r."""
    outputs = []
    for lora in (Lora(r=4, alpha=8, rank_stabilised=True), Lora(r=4, alpha=16), Lora(r=4, alpha=8)):
        tuned = make(role_folders.base, lora)
        randomised(tuned)
        outputs.append(nats(tuned))
    assert outputs[0] == pytest.approx(outputs[1], rel=1e-6) and outputs[0] != pytest.approx(outputs[2], rel=1e-3)


@pytest.mark.parametrize("case", ["plain", "dora"])
def test_a_new_adapter_adds_nothing_and_the_base_can_be_heard_alone(case: str, role_folders: Any) -> None:
    tuned = make(role_folders.base, CASES[case])
    before = nats(tuned)
    randomised(tuned)
    assert nats(tuned) != pytest.approx(before, rel=1e-3)
    with tuned.base_alone():
        assert nats(tuned) == pytest.approx(before, rel=1e-5)
    with tuned.replying() as model, torch.no_grad():
        heard = model(input_ids=IDS, use_cache=False).logits.log_softmax(-1)[PLACES[0], PLACES[1], TOKENS]
    assert float(-heard.sum()) == pytest.approx(nats(tuned), rel=1e-5)


def test_trained_whole(role_folders: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tuned = Tuned.make(role_folders.base, torch.float32, trained="full", lora=Lora(), seed=3)
    theirs = AutoModelForCausalLM.from_pretrained(role_folders.base)
    expected = plain_sum(theirs)
    expected.backward()
    tuned.token_sums(IDS, None, PLACES, TOKENS).nats.backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(tuned.parameters()[name].grad, parameter.grad, rtol=1e-3, atol=3e-5)
    for parameter in tuned.parameters().values():
        parameter.data += 0.01
    tuned.save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == theirs.dtype
    torch.testing.assert_close(plain_sum(again), tuned.token_sums(IDS, None, PLACES, TOKENS).nats, rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_alone(role_folders: Any) -> None:
    tuned = make(role_folders.base, Lora(r=4, alpha=8, dropout=0.5))
    randomised(tuned)
    with torch.no_grad():
        tuned.model.train()
        drawn = {round(nats(tuned), 3) for _ in range(3)}
        tuned.model.eval()
        fixed = {round(nats(tuned), 3) for _ in range(3)}
    assert len(drawn) == 3 and len(fixed) == 1


def test_every_target_must_be_a_layer(role_folders: Any) -> None:
    for more in ({}, {"dora": True}):
        with pytest.raises(UserError, match="lora.targets: wq, self_attn name no layer of the model"):
            make(role_folders.base, Lora(targets=["q_proj", "wq", "self_attn"], **more))
        found = make(role_folders.base, Lora(targets=["1.mlp.up_proj"], **more)).parameters()
        assert found and all("layers.1.mlp.up_proj" in name for name in found)


def test_logits_that_are_no_products_are_the_models_own(
    tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    tiny_llama.save_pretrained(tmp_path)
    forward = LlamaForCausalLM.forward

    def tripled(self: Any, **given: Any) -> Any:
        found = forward(self, **given)
        found.logits = 3.0 * found.logits
        return found

    monkeypatch.setattr(LlamaForCausalLM, "forward", tripled)
    expected = plain_sum(LlamaForCausalLM.from_pretrained(tmp_path))
    assert nats(make(tmp_path, Lora(r=2))) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_written_once(tied: bool, tiny_llama: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**tiny_llama.config.to_dict(), "tie_word_embeddings": tied, "dtype": "bfloat16"})
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tuned = Tuned.make(tmp_path / "base", torch.float32, trained="full", lora=Lora(), seed=3)
    tuned.save(tmp_path / "saved")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "saved"))
    assert before.keys() == after.keys() and ("lm_head.weight" in after) == (not tied)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_head_computes_in_the_arithmetics_format(
    dtype: torch.dtype, role_folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from baton import tuned as module

    real, seen = module.token_logprobs, []

    def watched(*given: Any) -> Any:
        found = real(*given)
        seen.extend([given[0].dtype, given[1].dtype, found.logprobs.dtype])
        return found

    monkeypatch.setattr(module, "token_logprobs", watched)
    tuned = Tuned.make(role_folders.base, dtype, trained="full", lora=Lora(), seed=3)
    found = tuned.token_sums(IDS, None, PLACES, TOKENS)
    found.nats.backward()
    assert seen == [dtype, dtype, torch.float32] and found.nats.dtype is torch.float32
    assert tuned.plain.get_output_embeddings().weight.grad.dtype is torch.float32


def test_the_output_head_takes_no_adapter(role_folders: Any) -> None:
    with pytest.raises(UserError, match="lora.targets: q_proj, lm_head holds the output head"):
        make(role_folders.base, Lora(targets=["q_proj", "lm_head"]))


def test_four_bits_need_cuda() -> None:
    check_quantise(None, torch.device("cpu"))
    with pytest.raises(UserError, match="quantise: nf4 is computed by CUDA kernels, and this machine's device is cpu"):
        check_quantise("nf4", torch.device("cpu"))
