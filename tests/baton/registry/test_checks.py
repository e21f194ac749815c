"""Model-level damage: each named check refuses what it is for, and accepts the healthy twin."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.errors import UserError
from baton.registry import Registry, Version
from baton.registry.checks import CheckFailed, require_base_in_place
from baton.registry.probe import ProbeMismatch
from baton.registry.vocabulary import tokenizer_digest
from tests.baton.registry.test_inspection import edit_json, edit_tensors


@pytest.fixture
def store_kind() -> str:
    """The checks read folders: one kind of store will do."""
    return "folder"


def refused(check: str, publish: Callable[[], Any], message: str = "") -> None:
    with pytest.raises(CheckFailed, match=f"^check {check}: .*{message}") as caught:
        publish()
    assert caught.value.check == check


def names_base(folder: Path, named: str) -> None:
    edit_json(folder / "adapter_config.json", base_model_name_or_path=named)


# --- swapped base


def test_a_swapped_base_is_refused(filled: Registry, folders: Any) -> None:
    """The two bases differ in their weights alone: without the check the adapter would load on either."""
    base, other = filled.resolve("team/base:1"), filled.resolve("team/other:1")

    def publish(on: Version) -> Version:
        return filled.publish(folders.adapter, name="team/new", kind="adapter", base=on)

    refused("swapped-base", lambda: publish(other), f"trained on .*, whose weights are not those of {other.ref}")
    assert publish(base).base == base.digest
    names_base(folders.adapter, f"baton:{base.digest}")
    refused("swapped-base", lambda: publish(other), f"trained on baton:{base.digest}")
    assert publish(base).base == base.digest


def test_the_same_base_in_other_files_is_no_swap(filled: Registry, folders: Any, tmp_path: Path) -> None:
    """In float32, in shards, without the head's second copy: the numbers are what counts."""
    import torch
    from transformers import AutoModelForCausalLM

    base = filled.resolve("team/base:1")
    model = AutoModelForCausalLM.from_pretrained(folders.base, dtype=torch.float32)
    model.save_pretrained(tmp_path / "wide", max_shard_size="60KB")
    names_base(folders.adapter, str(tmp_path / "wide"))
    assert filled.publish(folders.adapter, name="team/new", kind="adapter", base=base).base == base.digest
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] += 0.25
    model.save_pretrained(tmp_path / "changed")
    names_base(folders.adapter, str(tmp_path / "changed"))
    refused("swapped-base", lambda: filled.publish(folders.adapter, name="team/new", kind="adapter", base=base))


def test_an_adapter_of_another_shape_is_refused(filled: Registry, folders: Any) -> None:
    def widen(tensors: dict[str, Any]) -> None:
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        tensors[name] = tensors[name].repeat(1, 3)

    edit_tensors(folders.adapter / "adapter_model.safetensors", widen)
    base = filled.resolve("team/base:1")
    publish = lambda: filled.publish(folders.adapter, name="team/new", kind="adapter", base=base)  # noqa: E731
    refused("swapped-base", publish, r"does not fit its base .*q_proj.lora_A.weight has shape \(2, 96\)")


def test_a_base_swapped_after_publishing_is_found_by_the_probe(filled: Registry, folders: Any, tmp_path: Path) -> None:
    """In a folder that somebody has got, where no digest guards the base any more."""
    from baton.registry.probe import replay

    for kind in ("adapter", "reward"):
        version = filled.resolve(f"team/{kind}:1")
        folder = filled.materialise(version, tmp_path / kind)
        replay(folder, folder / "base", version.manifest)
        shutil.copy(folders.other_base / "model.safetensors", folder / "base" / "model.safetensors")
        refused("swapped-base", lambda v=version, f=folder: replay(f, f / "base", v.manifest), "not the model")


def test_verifying_deeply_and_merging_name_the_check(filled: Registry, folders: Any, tmp_path: Path) -> None:
    """A publisher who lies about the base: the manifest's probe was recorded on the other one."""
    from baton.registry.publish import _commit

    wrong = filled.resolve("team/adapter:1").manifest | {"base": filled.resolve("team/other:1").digest}
    version = _commit(filled, "team/wrong", wrong)
    assert filled.verify(version) == []
    (problem,) = filled.verify(version, deep=True)
    assert "check swapped-base: " in problem
    refused("swapped-base", lambda: filled.merge(version, tmp_path / "merged"), "merged into its base")
    refused("swapped-base", lambda: filled.materialise(version, tmp_path / "got", replay_probe=True))
    assert not (tmp_path / "merged").exists() and not (tmp_path / "got").exists()


# --- lost head


@pytest.mark.parametrize("kind", ["reward", "value"])
def test_a_lost_head_is_refused(filled: Registry, folders: Any, kind: str) -> None:
    base, folder = filled.resolve("team/base:1"), getattr(folders, kind)
    assert filled.publish(folder, name="team/new", kind=kind, base=base).kind == kind
    edit_tensors(folder / "adapter_model.safetensors", lambda t: t.pop("base_model.model.score.weight"))
    refused("lost-head", lambda: filled.publish(folder, name="team/new", kind=kind, base=base), "would be random")
    assert filled.publish(folders.classifier, name="team/whole", kind=kind).kind == kind
    edit_tensors(folders.classifier / "model.safetensors", lambda tensors: tensors.pop("score.weight"))
    refused("lost-head", lambda: filled.publish(folders.classifier, name="team/whole", kind=kind))
    refused("lost-head", lambda: filled.publish(folders.classifier, name="team/whole", kind="merged"))


# --- merged


def merged(filled: Registry, tmp_path: Path) -> tuple[Path, dict[str, Version]]:
    adapter = filled.resolve("team/adapter:1")
    return filled.merge(adapter, tmp_path / "merged"), {"adapter": adapter}


@pytest.mark.parametrize("role", ["adapter", "base"])
def test_a_merge_equal_to_its_base_is_refused(filled: Registry, folders: Any, tmp_path: Path, role: str) -> None:
    import torch

    folder, _ = merged(filled, tmp_path)
    parents = {role: filled.resolve(f"team/{role}:1")}
    publish = lambda folder: filled.publish(folder, name="team/new", kind="merged", parents=parents)  # noqa: E731
    refused("unchanged-merge", lambda: publish(folders.base), "has the very weights of team/base:1")
    # in float16 its bytes are others, its numbers are not
    edit_tensors(folders.base / "model.safetensors", lambda t: t.update({n: x.to(torch.float16) for n, x in t.items()}))
    edit_json(folders.base / "config.json", dtype="float16")
    refused("unchanged-merge", lambda: publish(folders.base))
    assert publish(folder).kind == "merged"


def test_one_changed_number_is_a_change(filled: Registry, folders: Any) -> None:
    def nudge(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][-1, -1] += 1

    edit_tensors(folders.base / "model.safetensors", nudge)
    base = filled.resolve("team/base:1")
    assert filled.publish(folders.base, name="team/new", kind="merged", parents={"base": base}).kind == "merged"


def test_a_merge_in_twice_the_bytes_is_refused(filled: Registry, tmp_path: Path) -> None:
    folder, parents = merged(filled, tmp_path)
    wide = Path(shutil.copytree(folder, tmp_path / "wide"))
    edit_tensors(wide / "model.safetensors", lambda t: t.update({name: x.float() for name, x in t.items()}))
    publish = lambda folder: filled.publish(folder, name="team/new", kind="merged", parents=parents)  # noqa: E731
    refused("doubled-dtype", lambda: publish(wide), "stored as float32, the base as bfloat16")
    assert publish(folder).manifest["dtype"] == "bfloat16"


# --- tokenizer and vocabulary


def test_an_adapter_with_another_tokenizer_is_refused(filled: Registry, folders: Any) -> None:
    base = filled.resolve("team/base:1")
    publish = lambda: filled.publish(folders.adapter, name="team/new", kind="adapter", base=base)  # noqa: E731
    assert publish().number == 1
    swap(folders.adapter)
    refused("wrong-tokenizer", publish, "brings no embedding of its own")


def test_an_adapter_with_its_own_embedding_may_have_another_tokenizer(filled: Registry, folders: Any) -> None:
    save_with_embedding(folders.adapter, folders.base, rows=None)
    swap(folders.adapter)
    base = filled.resolve("team/base:1")
    version = filled.publish(folders.adapter, name="team/new", kind="adapter", base=base)
    assert version.manifest["tokenizer_digest"] == tokenizer_digest(folders.adapter)
    assert version.manifest["tokenizer_digest"] != base.manifest["tokenizer_digest"]


def test_a_merge_with_another_tokenizer_is_refused(filled: Registry, tmp_path: Path) -> None:
    folder, parents = merged(filled, tmp_path)
    publish = lambda: filled.publish(folder, name="team/new", kind="merged", parents=parents)  # noqa: E731
    whole = (folder / "tokenizer.json").read_bytes()
    swap(folder)
    refused("wrong-tokenizer", publish, "but the embedding is the base's")
    (folder / "tokenizer.json").write_bytes(whole)
    assert publish().number == 1


def test_a_resized_vocabulary_is_refused(filled: Registry, folders: Any) -> None:
    def pad(tensors: dict[str, Any]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name].repeat(2, 1)

    publish = lambda: filled.publish(folders.other_base, name="team/new", kind="base")  # noqa: E731
    edit_tensors(folders.other_base / "model.safetensors", pad)
    refused("resized-vocabulary", publish, "has 608 rows but config.json says vocab_size 304")
    edit_json(folders.other_base / "config.json", vocab_size=608)
    assert publish().manifest["vocabulary"]["embedding_rows"] == 608
    head = "lm_head.weight"
    edit_tensors(folders.other_base / "model.safetensors", lambda t: t.update({head: t[head][:304].clone()}))
    refused("resized-vocabulary", publish, "lm_head.weight has 304 rows")


def test_an_adapter_whose_embedding_was_resized_is_refused(filled: Registry, folders: Any) -> None:
    base = filled.resolve("team/base:1")
    publish = lambda: filled.publish(folders.adapter, name="team/new", kind="adapter", base=base)  # noqa: E731
    save_with_embedding(folders.adapter, folders.base, rows=320)
    refused("resized-vocabulary", publish, "an embedding of 320 rows .*, its base team/base:1 has 304")
    save_with_embedding(folders.adapter, folders.base, rows=None)
    assert publish().number == 1


def swap(folder: Path) -> None:
    """Another tokenizer of the same size: two tokens exchange their ids."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = (next(t for t, i in vocabulary.items() if i == number) for number in (200, 201))
    vocabulary[first], vocabulary[second] = 201, 200
    (folder / "tokenizer.json").write_text(json.dumps(content))


def save_with_embedding(folder: Path, base: Path, rows: int | None) -> None:
    """An adapter that trained the embedding as well, of more rows where `rows` says so."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    get_peft_model(model, config).save_pretrained(folder)


# --- moved base


def test_a_moved_base_is_refused(filled: Registry, folders: Any, tmp_path: Path) -> None:
    version = filled.resolve("team/adapter:1")
    folder = filled.materialise(version, tmp_path / "got")
    require_base_in_place(folder)
    moved = folder.rename(tmp_path / "moved")
    refused("moved-base", lambda: require_base_in_place(moved), f"names the base {folder / 'base'}, which is not there")
    shutil.rmtree(moved / "base")
    refused("moved-base", lambda: filled.publish(moved, name="team/new", kind="adapter"))
    base = filled.by_digest(version.base or "")
    assert filled.publish(moved, name="team/new", kind="adapter", base=base).base == base.digest
    names_base(moved, "org/on-the-hub")
    require_base_in_place(moved)
    with pytest.raises(UserError, match="needs its base model") as caught:
        filled.publish(moved, name="team/new", kind="adapter")
    assert not isinstance(caught.value, CheckFailed)


def test_a_probe_without_its_base_says_so(filled: Registry, tmp_path: Path) -> None:
    from baton.registry.probe import replay

    version = filled.resolve("team/adapter:1")
    folder = filled.materialise(version, tmp_path / "got")
    shutil.rmtree(folder / "base")
    with pytest.raises(ProbeMismatch, match="^check moved-base: "):
        replay(folder, folder / "base", version.manifest)
