"""Weights against weights: norms by hand, adapters against what PEFT merges, memory that does not grow."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.errors import UserError
from baton.registry import Registry
from baton.registry.history import weights_diff
from baton.registry.history.lora_delta import apart, read_lora
from baton.registry.history.weights_diff import group_of, weights_difference
from baton.registry.weights import find_model


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "layers.11"),
        ("base_model.model.model.layers.0.mlp.down_proj.weight", "layers.0"),
        ("transformer.h.3.attn.c_attn.bias", "h.3"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("model.norm.weight", "norm"),
        ("score.weight", "score"),
        ("weight", "weight"),
    ],
)
def test_groups(name: str, group: str) -> None:
    assert group_of(name) == group


def compare(tmp_path: Path, a: dict[str, Any], b: dict[str, Any]) -> weights_diff.WeightsDifference:
    """Two plain models without a registry."""
    for name, tensors in (("a", a), ("b", b)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    places = [find_model(tmp_path / name) for name in ("a", "b")]
    return weights_diff._compare("weights", *map(weights_diff._Whole, places))


def test_norms_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_diff, "_CHUNK", 4)  # several chunks a tensor, the last one shorter
    a = {
        "model.layers.0.q.weight": torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]),
        "model.layers.0.k.weight": torch.zeros(2, 2),
        "model.layers.1.q.weight": torch.full((5, 3), 2.0, dtype=torch.bfloat16),
        "model.norm.weight": torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0]),
        "lm_head.weight": torch.ones(2, 2),
        "model.embed_tokens.weight": torch.ones(4, 2),
        "model.scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 3),
    }
    b = {
        "model.layers.0.q.weight": torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 3.0]]),
        "model.layers.0.k.weight": torch.tensor([[0.0, 4.0], [0.0, 0.0]]),
        "model.layers.1.q.weight": torch.full((5, 3), 3.0, dtype=torch.float32),
        "model.norm.weight": torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0]),
        "score.weight": torch.ones(1, 2),
        "model.embed_tokens.weight": torch.ones(5, 2),
        "model.scalar": torch.tensor(1.0),
        "empty": torch.zeros(0, 3),
    }
    found = compare(tmp_path, a, b)
    tensors = {change.name: change for change in found.tensors}
    assert tensors["model.layers.0.q.weight"][1:] == (6, 3.0, 5.0, pytest.approx(math.sqrt(34)))
    assert tensors["model.layers.0.k.weight"].relative is None, "from nothing"
    assert tensors["model.layers.1.q.weight"].relative == pytest.approx(0.5)
    assert tensors["model.norm.weight"].relative == 0.0 == tensors["empty"].relative
    groups = {change.name: change for change in found.groups}
    # layer 0: sqrt(3^2 + 4^2) / sqrt(5^2 + 0)
    assert groups["layers.0"].relative == pytest.approx(1.0)
    assert [group.name for group in found.groups] == ["layers.0", "layers.1", "scalar", "empty", "norm"]
    # 9 + 16 + 15 * 1 + 1 over 25 + 15 * 4 + 5 + 4
    assert found.total.relative == pytest.approx(math.sqrt(41 / 94)) and found.total.num_parameters == 31
    assert (found.only_a, found.only_b) == (["lm_head.weight"], ["score.weight"])
    assert found.shapes == [("model.embed_tokens.weight", (4, 2), (5, 2))]


def test_what_is_not_finite_is_not_hidden(tmp_path: Path) -> None:
    whole, broken = torch.ones(2), torch.tensor([1.0, math.nan])
    found = compare(tmp_path, {"a": whole, "b": whole.clone()}, {"a": broken, "b": whole})
    assert [(change.name, change.relative) for change in found.tensors] == [("a", None), ("b", 0.0)]


def save_lora(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """An adapter's folder, by hand."""
    folder.mkdir()
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4, **config}))
    return folder


def test_lora_changes_by_hand(tmp_path: Path) -> None:
    a, b = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    lora = read_lora(save_lora(tmp_path / "a", {"m.q.lora_A.weight": a, "m.q.lora_B.weight": b}))
    assert lora is not None
    # alpha / r = 4: B @ A * 4
    assert torch.equal(lora.factors["m.q.weight"].rows(0, 2), torch.tensor([[12.0, 0.0, 24.0], [16.0, 0.0, 32.0]]))
    assert lora.factors["m.q.weight"].rows(1, 2).tolist() == [[16.0, 0.0, 32.0]]
    # another rank with the same product: each half of it twice, alpha / r = 2
    twice = {"m.q.lora_A.weight": torch.cat([a, a]), "m.q.lora_B.weight": torch.cat([b, b], dim=1)}
    other = read_lora(save_lora(tmp_path / "b", twice))
    assert other is not None
    norm = math.sqrt(12**2 + 24**2 + 16**2 + 32**2)
    assert apart(lora.factors["m.q.weight"], other.factors["m.q.weight"]) == (
        pytest.approx(0.0, abs=1e-12),
        pytest.approx(norm),
        pytest.approx(norm),
    )
    half = read_lora(save_lora(tmp_path / "c", {"m.q.lora_A.weight": a, "m.q.lora_B.weight": b}, lora_alpha=2))
    assert half is not None
    assert apart(lora.factors["m.q.weight"], half.factors["m.q.weight"])[0] == pytest.approx(norm / 2)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4 / math.sqrt(2)),
        ({"alpha_pattern": {"q": 6}}, 3.0),
        ({"alpha_pattern": {"m.q": 6}}, 3.0),
        ({"alpha_pattern": {"k": 6}}, 2.0),
    ],
)
def test_the_scale_is_pefts(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    tensors = {"m.q.lora_A.weight": torch.eye(2), "m.q.lora_B.weight": torch.eye(2)}
    lora = read_lora(save_lora(tmp_path / "a", tensors, **config))
    assert lora is not None and torch.allclose(lora.factors["m.q.weight"].rows(0, 2), scale * torch.eye(2))


def test_turned_factors_and_whole_tensors(tmp_path: Path) -> None:
    a, b = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [10.0]])
    tensors = {"e.lora_embedding_A": a, "e.lora_embedding_B": b, "score.weight": torch.ones(1, 2)}
    lora = read_lora(save_lora(tmp_path / "a", tensors, lora_alpha=1))
    assert lora is not None and set(lora.whole) == {"score.weight"}
    assert lora.factors["e.weight"].rows(0, 3).tolist() == [[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]
    tensors = {"c.lora_A.weight": a, "c.lora_B.weight": b}
    lora = read_lora(save_lora(tmp_path / "b", tensors, lora_alpha=1, fan_in_fan_out=True))
    assert lora is not None and lora.factors["c.weight"].shape == (3, 2)


def test_other_adapters_are_not_taken_for_lora(tmp_path: Path) -> None:
    pair = {"m.q.lora_A.weight": torch.eye(2), "m.q.lora_B.weight": torch.eye(2)}
    assert read_lora(save_lora(tmp_path / "a", pair, use_dora=True)) is None
    assert read_lora(save_lora(tmp_path / "b", pair, peft_type="LOHA")) is None
    assert read_lora(save_lora(tmp_path / "c", pair | {"m.q.lora_magnitude_vector": torch.ones(2)})) is None
    assert read_lora(save_lora(tmp_path / "d", {"m.q.lora_A.weight": torch.eye(2)})) is None


def test_an_adapter_beside_its_base_is_what_peft_merges(filled: Registry, tmp_path: Path) -> None:
    base, adapter = filled.resolve("team/base:1"), filled.resolve("team/adapter:1")
    found = weights_difference(filled, base, adapter)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base.folder(), dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(adapter.folder())).merge_and_unload().state_dict()
    before = {name: tensor.float() for name, tensor in load_file(base.folder() / "model.safetensors").items()}
    changed = {change.name: change for change in found.tensors if change.difference}
    assert len(changed) == 6, "q_proj, v_proj and down_proj of two layers"
    for name, change in changed.items():
        expected = (merged[name] - before[name]).norm() / before[name].norm()
        assert change.relative == pytest.approx(float(expected), rel=1e-4)
    assert (found.only_a, found.only_b, found.shapes, found.notes) == ([], [], [], [])
    assert {group.name for group in found.groups[:2]} == {"layers.0", "layers.1"}
    # the reward model is the base's body with another head
    reward = weights_difference(filled, base, filled.resolve("team/reward:1"))
    assert reward.only_b == ["score.weight"]


def test_two_adapters(filled: Registry) -> None:
    reward, value = filled.resolve("team/reward:1"), filled.resolve("team/value:1")
    found = weights_difference(filled, reward, value)
    assert found.compared == "the changes that the adapters make to their base" and found.notes == []
    folders = [version.folder() for version in (reward, value)]
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    name = "model.layers.0.self_attn.q_proj"
    alpha = json.loads((folders[0] / "adapter_config.json").read_bytes())["lora_alpha"]
    one, other = (
        own[f"base_model.model.{name}.lora_B.weight"] @ own[f"base_model.model.{name}.lora_A.weight"] * alpha / 2
        for own in tensors
    )
    (change,) = [change for change in found.tensors if change.name == f"{name}.weight"]
    assert change.relative == pytest.approx(float((one - other).norm() / one.norm()), rel=1e-4)
    assert "score.weight" in {change.name for change in found.tensors}
    with_other = weights_difference(filled, filled.resolve("team/adapter:1"), value)
    assert with_other.only_b == ["score.weight"]


def test_two_bases_and_the_same_files(filled: Registry) -> None:
    base, other = filled.resolve("team/base:1"), filled.resolve("team/other:1")
    found = weights_difference(filled, base, other)
    a, b = (load_file(version.folder() / "model.safetensors") for version in (base, other))
    apart_by = sum(float((a[name].float() - b[name].float()).double().square().sum()) for name in a)
    length = sum(float(a[name].double().square().sum()) for name in a)
    assert found.total.relative == pytest.approx(math.sqrt(apart_by / length), rel=1e-5)
    assert weights_difference(filled, base, base).compared == "the same files"


def test_an_adapter_of_another_kind_is_merged_first(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = filled
    monkeypatch.setattr(weights_diff, "read_lora", lambda folder: None)
    base, adapter, value = (registry.resolve(f"team/{name}:1") for name in ("base", "adapter", "value"))
    with pytest.raises(UserError, match="team/adapter:1 is not a plain LoRA adapter.*--merge"):
        weights_difference(registry, base, adapter)
    found = weights_difference(registry, adapter, value)
    assert found.compared == "the adapters' tensors" and "not plain LoRA" in found.notes[0]
    assert all("lora_" in change.name for change in found.tensors)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Two models of 32 MiB: reading them whole would take 64 MiB and more, as float32 the double."""
    script = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from baton.registry.history import weights_diff as w\n"
        "from baton.registry.weights import find_model\n"
        "w._CHUNK = 1 << 18\n"
        "places = [find_model(Path(folder)) for folder in sys.argv[1:]]\n"
        "torch.linalg.vector_norm(torch.ones(9), dtype=torch.float64)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found = w._compare('', *map(w._Whole, places))\n"
        "assert abs(found.total.relative - 0.5) < 1e-6, found.total\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    for name, value in (("a", 2.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        tensor = torch.full((4096, 4096), value, dtype=torch.bfloat16)
        save_file({"model.embed_tokens.weight": tensor}, tmp_path / name / "model.safetensors")
    words = [sys.executable, "-c", script, str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[4])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 30, f"{done.stdout} MiB"
