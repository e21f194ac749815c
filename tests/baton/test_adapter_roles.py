"""PEFT folders on shared layers: what PEFT's own model gives, in both directions; what does not fit is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from baton.adapter_roles import attach, attach_new, save_adapter
from baton.adapters import lora_config_from, read_adapter
from baton.errors import UserError
from baton.lora import Acting, SharedLinear
from baton.recipe import Lora

IDS = torch.tensor([[3, 17, 1, 9, 40]])


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).double().eval().requires_grad_(False)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2, whose layers are transformers' Conv1D."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(vocab_size=48, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "all linear": {"target_modules": "all-linear"},
    "rank-stabilised": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "rank_pattern": {"q_proj": 5, r"layers\.1\.self_attn\.v_proj": 1},
        "alpha_pattern": {"v_proj": 11, r"layers\.0\.self_attn\.o_proj": 2},
    },
    "patterns, rank-stabilised": {
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {"q_proj": 3},
    },
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "regular expression": {"target_modules": r".*\.1\.mlp\.(up|gate)_proj"},
}


def made(base: Path, folder: Path, randomise: Any, **settings: Any) -> torch.Tensor:
    """Write a random adapter by PEFT; its logits."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(plain(base), LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=7, **settings))
    randomise(model, 4).save_pretrained(folder)
    return logits(model.double())


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_an_adapter_gives_what_peft_gives(case: str, role_folders: Any, randomise: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    expected = made(role_folders.base, tmp_path / "a", randomise, **CONFIGURATIONS[case])
    model, acting = plain(role_folders.base), Acting()
    untouched = logits(model)
    config, tensors = read_adapter(tmp_path / "a")
    attach(model, "x", config, tensors, acting)
    model.double()
    assert torch.equal(logits(model), untouched), "no role acts: the base alone"
    acting.role = "x"
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-8)
    assert float((expected - untouched).abs().max()) > 0.1
    # and back: the very same file, which PEFT loads
    saved = lora_config_from(config, task_type="CAUSAL_LM", modules_to_save=None)
    save_adapter(model.float(), "x", saved, {}, tmp_path / "b")
    again = read_adapter(tmp_path / "b")[1]
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)
    reloaded = PeftModel.from_pretrained(plain(role_folders.base), tmp_path / "b").double()
    torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=1e-8)


def test_conv1d(gpt2: Path, randomise: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    targets = ["c_attn", "c_proj", "c_fc"]
    expected = made(gpt2, tmp_path / "a", randomise, target_modules=targets, fan_in_fan_out=True)
    model, acting = plain(gpt2), Acting()
    config, tensors = read_adapter(tmp_path / "a")
    attach(model, "x", config, tensors, acting)
    acting.role = "x"
    torch.testing.assert_close(logits(model.double()), expected, rtol=0, atol=1e-8)
    embeddings = model.transformer.wte(IDS).requires_grad_(True)
    model(inputs_embeds=embeddings, use_cache=False).logits.square().sum().backward()
    theirs = PeftModel.from_pretrained(plain(gpt2), tmp_path / "a", is_trainable=True).double()
    given = theirs.base_model.model.transformer.wte(IDS).detach().requires_grad_(True)
    theirs(inputs_embeds=given, use_cache=False).logits.square().sum().backward()
    torch.testing.assert_close(embeddings.grad, given.grad, rtol=0, atol=1e-8)
    found = [p.grad for name, p in model.named_parameters() if "additions" in name]
    wanted = [p.grad for name, p in theirs.named_parameters() if "lora_" in name]
    assert len(found) == len(wanted) == 16
    for ours, plain_ones in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, plain_ones, rtol=0, atol=1e-8)


def test_new_adapters_add_nothing_and_are_drawn_from_their_seed(role_folders: Any, gpt2: Path) -> None:
    for folder, count in ((role_folders.base, 14), (gpt2, 8)):
        model, acting = plain(folder), Acting()
        before = logits(model)
        config = attach_new(model, "x", Lora(r=4, alpha=8), acting, 3)
        layers = {name: m for name, m in model.named_modules() if isinstance(m, SharedLinear)}
        assert len(layers) == count and not any("lm_head" in name for name in layers)
        assert set(config["target_modules"]) == {name.rpartition(".")[2] for name in layers}
        acting.role = "x"
        assert torch.equal(logits(model.double()), before)
        for layer in layers.values():
            addition: Any = layer.additions["x"]
            assert addition.scale == 2.0 and not addition.up.any()
            bound = 1 / addition.down.shape[1] ** 0.5
            assert 0.8 * bound < float(addition.down.abs().max()) <= bound
        other, role = plain(folder), Acting()
        attach_new(other, "x", Lora(r=4, alpha=8), role, 3)
        attach_new(other, "y", Lora(r=4, alpha=8), role, 4)
        drawn = [m for m in other.modules() if isinstance(m, SharedLinear)]
        for layer, mine in zip(drawn, layers.values(), strict=True):
            additions: Any = layer.additions
            assert torch.equal(additions["x"].down.double(), mine.additions["x"].down)  # type: ignore[union-attr]
            assert not torch.equal(additions["x"].down, additions["y"].down)


def test_targets_of_a_new_adapter(role_folders: Any) -> None:
    def layers(targets: Any) -> list[str]:
        model = plain(role_folders.base)
        attach_new(model, "x", Lora(targets=targets), Acting(), 0)
        return [name for name, m in model.named_modules() if isinstance(m, SharedLinear)]

    assert len(layers(["q_proj"])) == 2
    assert layers(["model.layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    assert layers(["1.mlp.up_proj", "q_proj"])[1:] == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    with pytest.raises(UserError, match="lora.targets: nothing names no layer of the model that takes an adapter"):
        layers(["q_proj", "nothing"])
    with pytest.raises(UserError, match="lora.targets: wq, lm_head name no layer .* end with down_proj, gate_proj"):
        layers(["wq", "q_proj", "lm_head"])


def test_peft_finds_the_layers_that_were_meant_and_no_others(role_folders: Any, tmp_path: Path) -> None:
    """One layer of two has an adapter: by its last name alone PEFT would give the other one too."""
    from peft import PeftModel

    model = plain(role_folders.base).float()
    config = attach_new(model, "x", Lora(targets=["layers.1.mlp.up_proj", "q_proj"]), Acting(), 0)
    assert config["target_modules"] == ["model.layers.1.mlp.up_proj", "q_proj"]
    save_adapter(model, "x", lora_config_from(config, task_type="CAUSAL_LM", modules_to_save=None), {}, tmp_path)
    theirs = PeftModel.from_pretrained(plain(role_folders.base), tmp_path)
    found = {name for name, _ in theirs.named_parameters() if "lora_A" in name}
    ends = ("layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.up_proj")
    assert found == {f"base_model.model.model.{end}.lora_A.default.weight" for end in ends}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "this one has use_dora. Merge it first"),
        ({"lora_bias": True}, "this one has lora_bias"),
        ({"peft_type": "IA3"}, "this one has peft_type IA3"),
    ],
)
def test_other_adapters_are_refused(change: dict[str, Any], message: str, role_folders: Any) -> None:
    config, tensors = read_adapter(role_folders.sft)
    with pytest.raises(UserError, match=message):
        attach(plain(role_folders.base), "x", config | change, tensors, Acting())


def test_peft_calls_its_settings_what_is_refused_here(role_folders: Any, tmp_path: Path, randomise: Any) -> None:
    """A real DoRA folder, as PEFT writes it today."""
    made(role_folders.base, tmp_path, randomise, target_modules=["q_proj"], use_dora=True)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    with pytest.raises(UserError, match="use_dora"):
        attach(plain(role_folders.base), "x", *read_adapter(tmp_path), Acting())


def test_what_finds_no_place_is_refused(role_folders: Any, randomise: Any, tmp_path: Path) -> None:
    config, tensors = read_adapter(role_folders.sft)
    prefix = "base_model.model.model"
    lost = {f"{prefix}.layers.7.mlp.up_proj.lora_{kind}.weight": torch.zeros(2, 2) for kind in "AB"}
    with pytest.raises(UserError, match=r"there is no layer model.layers.7.mlp.up_proj"):
        attach(plain(role_folders.base), "x", config, tensors | lost, Acting())
    with pytest.raises(UserError, match="no factors of a linear layer, such as"):
        attach(plain(role_folders.base), "x", config, tensors | {f"{prefix}.norm.weight": torch.zeros(32)}, Acting())
    made(role_folders.base, tmp_path, randomise, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(UserError, match="no factors of a linear layer, such as .*embed_tokens"):
        attach(plain(role_folders.base), "x", *read_adapter(tmp_path), Acting())


def test_roles_share_one_weight(role_folders: Any) -> None:
    model, acting = plain(role_folders.base), Acting()
    for role, folder in (("a", role_folders.sft), ("b", role_folders.sft)):
        attach(model, role, *read_adapter(folder), acting)
    layers = [m for m in model.modules() if isinstance(m, SharedLinear)]
    assert len(layers) == 14 and all(isinstance(layer.base, nn.Linear) for layer in layers)
    assert all(set(layer.additions) == {"a", "b"} for layer in layers)
