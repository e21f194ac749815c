"""Models out of the registry: the dtype to compute in, and the adapter on its own base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from baton import models
from baton.chat import stop_ids
from baton.errors import UserError

IDS = torch.tensor([[5, 90, 300, 17]])


@pytest.mark.parametrize(
    ("setting", "cuda", "cuda_bf16", "fast", "expected"),
    [
        ("float32", True, True, True, torch.float32),
        ("bfloat16", False, False, False, torch.bfloat16),
        ("auto", True, True, False, torch.bfloat16),
        ("auto", True, False, True, torch.float32),
        ("auto", False, False, True, torch.bfloat16),
        ("auto", False, False, False, torch.float32),
    ],
)
def test_the_dtype_to_compute_in(
    monkeypatch: pytest.MonkeyPatch, setting: str, cuda: bool, cuda_bf16: bool, fast: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: cuda_bf16)
    monkeypatch.setattr(models, "_fast_bfloat16", lambda: fast)
    assert models.compute_dtype(setting) is expected


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_policy_is_its_adapter_on_its_base(tiny_chain: Any, stage: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, tokenizer = models.load_policy(tiny_chain.registry, tiny_chain.versions[stage], "float32")
    base = AutoModelForCausalLM.from_pretrained(tiny_chain.folder("pretrain")).eval()
    with torch.no_grad():
        raw = base(IDS).logits
        expected = PeftModel.from_pretrained(base, tiny_chain.folder(stage)).eval()(IDS).logits
        found = model(IDS).logits
    assert torch.equal(found, expected)
    assert float((found - raw).abs().max()) > 1e-3
    assert not model.training and tokenizer.chat_template and tokenizer.padding_side == "right"


def test_a_base_is_loaded_as_it_is(tiny_chain: Any) -> None:
    from safetensors.torch import load_file

    version = tiny_chain.versions["pretrain"]
    model, _ = models.load_policy(tiny_chain.registry, version, "float32")
    weights = load_file(tiny_chain.folder("pretrain") / "model.safetensors")
    assert torch.equal(model.model.embed_tokens.weight, weights["model.embed_tokens.weight"])
    assert models.base_folder(tiny_chain.registry, version) == tiny_chain.folder("pretrain")


def test_the_base_of_an_adapter_is_found_by_digest(tiny_chain: Any, tmp_path: Path) -> None:
    """Another base under the same name and alias does not get under the adapter."""
    chain = tiny_chain.copy(tmp_path)
    folder = tmp_path / "other"
    model, tokenizer = models.load_policy(chain.registry, chain.versions["pretrain"], "float32")
    with torch.no_grad():
        model.model.embed_tokens.weight += 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    other = chain.registry.publish(folder, name="tiny/base", kind="base", details={})
    chain.registry.promote(other.ref, "main", reason="a test")
    for stage in ("sft", "reward", "ppo"):
        found = models.base_folder(chain.registry, chain.versions[stage])
        assert found.name == chain.versions["pretrain"].digest.removeprefix("sha256:")


def test_a_scorer_has_its_head(tiny_chain: Any) -> None:
    from safetensors.torch import load_file

    model, tokenizer = models.load_scorer(tiny_chain.registry, tiny_chain.versions["reward"], "float32")
    head = load_file(tiny_chain.folder("reward") / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(model.base_model.model.score.modules_to_save["default"].weight, head)
    assert model.config.pad_token_id == tokenizer.pad_token_id == 1 and not model.training


def test_a_value_model_scores_too(tiny_chain: Any) -> None:
    version = tiny_chain.registry.resolve("tiny/value:candidate")
    model, _ = models.load_scorer(tiny_chain.registry, version, "float32")
    with torch.no_grad():
        assert torch.isfinite(model(IDS).logits).all()


def test_a_whole_classifier_is_loaded_as_it_is(tiny_chain: Any, tmp_path: Path) -> None:
    """The merged reward model, with no base under it, scores as the adapter on its base."""
    chain = tiny_chain.copy(tmp_path)
    folder = chain.registry.merge(chain.versions["reward"], tmp_path / "merged")
    version = chain.registry.publish(folder, name="tiny/whole", kind="reward")
    whole, tokenizer = models.load_scorer(chain.registry, version, "float32")
    adapter, _ = models.load_scorer(chain.registry, chain.versions["reward"], "float32")
    with torch.no_grad():
        torch.testing.assert_close(whole(IDS).logits, adapter(IDS).logits, atol=1e-5, rtol=0)
        assert abs(float(whole(IDS).logits)) > 1e-3, "zero would be equal to anything lost"
    assert whole.config.pad_token_id == tokenizer.pad_token_id == 1 and not whole.training
    assert not hasattr(whole, "peft_config")


def test_the_wrong_kind_is_refused(tiny_chain: Any) -> None:
    registry, versions = tiny_chain.registry, tiny_chain.versions
    with pytest.raises(UserError, match="tiny/reward:1 is a reward model, which does not write text"):
        models.load_policy(registry, versions["reward"])
    with pytest.raises(UserError, match="tiny/sft:1 is a adapter model; scoring needs a reward model"):
        models.load_scorer(registry, versions["sft"])


def test_the_tokenizer_of_an_adapter_is_complete(tiny_chain: Any) -> None:
    tokenizer = models.load_tokenizer(tiny_chain.folder("ppo"))
    assert tokenizer.eos_token == "<|im_end|>"
    saved = json.loads((tiny_chain.folder("ppo") / "tokenizer_config.json").read_text())
    assert saved["pad_token"] == "<|pad|>"


def test_positions_that_a_base_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 64}))
    models.check_positions(tmp_path, 64, "train.max_length")
    with pytest.raises(UserError, match="train.max_length is 65, but the base knows 64 positions; lower it"):
        models.check_positions(tmp_path, 65, "train.max_length")


def test_where_plain_transformers_is_to_stop(tmp_path: Path) -> None:
    """A Llama 3 ends turns with one token and texts with another: both end a reply."""
    from types import SimpleNamespace

    vocabulary = {"<|end_of_text|>": 1, "<|eot_id|>": 9, "<|eom_id|>": 8}
    for token, expected in (("<|im_end|>", 9), ("<|eot_id|>", None)):
        tokenizer: Any = SimpleNamespace(
            eos_token=token, eos_token_id=9, pad_token_id=7, get_vocab=lambda: vocabulary, get_added_vocab=dict
        )
        before = {"eos_token_id": 1, "pad_token_id": None, "kept": "x"}
        (tmp_path / "config.json").write_text(json.dumps(before | {"text_config": before}))
        (tmp_path / "generation_config.json").write_text(json.dumps(before))
        models.write_stops(tmp_path, tokenizer)
        told = {"eos_token_id": stop_ids(tokenizer) if expected is None else expected, "pad_token_id": 7, "kept": "x"}
        assert json.loads((tmp_path / "generation_config.json").read_text()) == told
        assert json.loads((tmp_path / "config.json").read_text()) == told | {"text_config": told}
        assert told["eos_token_id"] != 1
