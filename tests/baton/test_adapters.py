"""LoRA adapters that change their role: the same hidden states, nothing lost, misfits refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from baton.adapters import (
    SCORE_KEY,
    lora_config_from,
    new_lora_config,
    read_adapter,
    set_adapter_tensors,
    split_head,
)
from baton.errors import UserError
from baton.recipe import Lora

IDS = torch.tensor([[5, 9, 33, 17, 41]])


@pytest.fixture(scope="module")
def base(tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "base"
    tiny_llama.save_pretrained(folder)
    return folder


def causal(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base)


def trained_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """A causal adapter with random weights."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(causal(base), LoraConfig(task_type="CAUSAL_LM", r=4, **settings))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def as_classifier(base: Path, folder: Path) -> Any:
    """The adapter copied into a sequence classifier."""
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification

    config, tensors = read_adapter(folder)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = get_peft_model(model, lora_config_from(config, task_type="SEQ_CLS", modules_to_save=["score"]))
    set_adapter_tensors(model, tensors | {SCORE_KEY: torch.zeros(1, 32)}, "default")
    return model.eval()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "lora_alpha": 8},
        {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 3},
        {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 8, "use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 64}},
        {"target_modules": ["q_proj"], "lora_dropout": 0.3},
    ],
)
def test_a_copy_in_a_classifier_has_the_hidden_states_of_sft(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    from peft import PeftModel

    folder = trained_adapter(base, tmp_path / "sft", **settings)
    sft = PeftModel.from_pretrained(causal(base), folder).eval()
    with torch.no_grad():
        raw = causal(base).eval().model(IDS).last_hidden_state
        expected = sft.base_model.model.model(IDS).last_hidden_state
        found = as_classifier(base, folder).base_model.model.model(IDS).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert float((found - raw).abs().max()) > 0.05


def test_an_adapter_of_other_layers_is_refused(base: Path, tmp_path: Path) -> None:
    folder = trained_adapter(base, tmp_path / "sft", target_modules=["q_proj", "v_proj"])
    config, tensors = read_adapter(folder)
    from peft import get_peft_model

    fewer = {key: tensor for key, tensor in tensors.items() if "layers.1." not in key}
    model = get_peft_model(causal(base), lora_config_from(config, task_type="CAUSAL_LM", modules_to_save=None))
    with pytest.raises(UserError, match="4 layers got no weights, 0 weights found no layer"):
        set_adapter_tensors(model, fewer, "default")
    other = {key.replace("q_proj", "k_proj"): tensor for key, tensor in tensors.items()}
    with pytest.raises(UserError, match="4 layers got no weights, 4 weights found no layer"):
        set_adapter_tensors(model, other, "default")


def test_the_adapter_goes_into_the_named_role_alone(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = trained_adapter(base, tmp_path / "sft", target_modules=["q_proj"])
    config, tensors = read_adapter(folder)
    role = lora_config_from(config, task_type="CAUSAL_LM", modules_to_save=None)
    model = PeftModel(causal(base), role, adapter_name="one")
    model.add_adapter("two", role)
    set_adapter_tensors(model, tensors, "two")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.lora_B["two"].weight, tensors[next(k for k in tensors if "layers.0" in k and "_B" in k)])
    assert (layer.lora_B["one"].weight == 0).all()


def test_split_head() -> None:
    lora, head = torch.ones(2, 2), torch.ones(1, 4)
    tensors = {"base_model.model.layers.0.lora_A.weight": lora}
    assert split_head(tensors) == (tensors, None)
    adapter, found = split_head({**tensors, "base_model.model.score.weight": head})
    assert adapter == tensors and found is head


def test_a_recipes_settings_reach_the_configuration() -> None:
    config = new_lora_config(Lora(r=3, alpha=7, dropout=0.25, targets=["q_proj", "o_proj"]))
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 7, 0.25)
    assert config.target_modules == {"q_proj", "o_proj"} and config.task_type == "CAUSAL_LM"
    assert new_lora_config(Lora()).target_modules == "all-linear"


def test_dropout_does_not_follow_into_another_role() -> None:
    config = new_lora_config(Lora(dropout=0.5, targets=["q_proj"])).to_dict()
    assert lora_config_from(config, task_type="SEQ_CLS", modules_to_save=["score"]).lora_dropout == 0.0
