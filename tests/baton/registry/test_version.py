"""A version in Python: what it knows, its folder, its model; and a registry that travels between processes."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from baton.registry import Registry


def test_a_version_reads_its_manifest_when_asked(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    version = filled.resolve("team/reward:1")
    assert version.kind == "reward" and version.metrics == {"accuracy": 0.75}
    assert version.base == filled.resolve("team/base:1").digest
    monkeypatch.setattr(Registry, "read_manifest", lambda *_: pytest.fail("read twice"))
    assert filled.resolve("team/reward:1").ref == "team/reward:1"
    assert filled.resolve("team/reward:1").manifest == version.manifest


@pytest.mark.parametrize("name", ["base", "adapter", "reward", "classifier"])
def test_load_gives_the_model_that_was_published(filled: Registry, folders: Any, name: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if name == "classifier":
        filled.publish(folders.classifier, name="team/classifier", kind="reward")
    model, tokenizer = filled.resolve(f"team/{name}:1").load(dtype="float32")
    loader: Any = AutoModelForCausalLM if name in ("base", "adapter") else AutoModelForSequenceClassification
    if name in ("adapter", "reward"):
        extra = {"num_labels": 1} if name == "reward" else {}
        expected: Any = loader.from_pretrained(folders.base, dtype=torch.float32, **extra)
        expected = PeftModel.from_pretrained(expected, getattr(folders, name))
    else:
        expected = loader.from_pretrained(getattr(folders, name), dtype=torch.float32)
    expected.config.pad_token_id = tokenizer.pad_token_id
    ids = tokenizer("the baker bakes", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, expected.eval()(input_ids=ids).logits, atol=1e-6)
    assert not model.training


def test_a_registry_travels_between_processes_without_what_it_read(filled: Registry, tmp_path: Path) -> None:
    version = filled.resolve("team/base:1")
    assert version.kind == "base"
    there = pickle.loads(pickle.dumps(version))
    assert there == version and there.registry.location and "manifest" not in vars(there.registry)
    assert there.registry._manifests == {} and there.manifest == version.manifest


def test_versions_move_between_registries(filled: Registry, registry: Registry, tmp_path: Path) -> None:
    version = filled.resolve("team/reward:1")
    assert filled.push(version, registry).blobs_sent > 0 == registry.pull(filled, "team/reward:1").blobs_sent
    assert registry.resolve("team/reward:1").digest == version.digest and registry.verify_all() == []
    without = filled.resolve("team/base:1")
    whole, rest = filled.export(version, tmp_path / "all.tar"), filled.export(version, tmp_path / "rest.tar", [without])
    assert rest.size < whole.size
    assert registry.import_bundle(tmp_path / "rest.tar")[-1].digest == version.digest
