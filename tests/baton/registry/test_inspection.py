"""Each refusal of a folder: the message says why, and nothing is written."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.errors import UserError
from baton.registry import Registry
from tests.baton.registry.conftest import paths


@pytest.fixture
def store_kind() -> str:
    """Folders are refused before the store is asked for anything: one kind of store will do."""
    return "folder"


def contents(registry: Registry) -> set[str]:
    return set(paths(registry))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def remove_head(tensors: dict[str, Any]) -> None:
    del tensors["base_model.model.score.weight"]


def cut_rows(tensors: dict[str, Any]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:200].clone()


def damage(folder: Path, what: str) -> None:
    """One way in which a folder must not be published."""
    weights = folder / "model.safetensors"
    actions: dict[str, Callable[[], Any]] = {
        "training_args.bin": lambda: (folder / "training_args.bin").write_bytes(pickle.dumps({"lr": {1}})),
        "pickle as json": lambda: (folder / "trainer.json").write_bytes(pickle.dumps({1}, 0)),
        "symlink": lambda: os.symlink("/etc/hostname", folder / "notes.txt"),
        "hard link": lambda: os.link(folder / "config.json", folder.parent / "elsewhere.json"),
        "linked folder": lambda: os.symlink("/etc", folder / "more"),
        "fifo": lambda: os.mkfifo(folder / "pipe"),
        "remote code": lambda: edit_json(folder / "config.json", auto_map={"AutoModel": "code.Model"}),
        "remote tokenizer": lambda: edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": "x"}),
        "escaped code": lambda: (folder / "processor_config.json").write_text('{"\\u0061uto_map": {"a": "b.C"}}'),
        "nested code": lambda: edit_json(folder / "config.json", text_config={"auto_map": {"AutoModel": "c.M"}}),
        "python": lambda: (folder / "modeling.py").write_text("print('hello')"),
        "stray shard": lambda: shutil.copy(weights, folder / "model-00001-of-00002.safetensors"),
        "no config": lambda: (folder / "config.json").unlink(),
        "no weights": lambda: weights.unlink(),
        "cut off": lambda: os.truncate(weights, weights.stat().st_size - 1),
        "trailing bytes": lambda: weights.write_bytes(weights.read_bytes() + b"more"),
        "no header": lambda: weights.write_bytes(b"\x05\0\0\0\0\0\0\0hello"),
        "few rows": lambda: edit_tensors(weights, cut_rows),
        "no tokenizer": lambda: (folder / "tokenizer.json").unlink(),
        "case": lambda: (folder / "CONFIG.json").write_text("{}"),
        "name": lambda: (folder / "a\\b").write_text("x"),
        "bad config": lambda: (folder / "config.json").write_text("{"),
        "adapter": lambda: (folder / "adapter_config.json").write_text("{}"),
    }
    actions[what]()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("training_args.bin", "training_args.bin is a pickle"),
        ("pickle as json", "trainer.json is a pickle"),
        ("symlink", "notes.txt is a symbolic link"),
        ("hard link", "config.json is a hard link"),
        ("escaped code", "processor_config.json has auto_map"),
        ("nested code", "config.json has auto_map"),
        ("python", "modeling.py is code"),
        ("stray shard", "model-00001-of-00002.safetensors is no part of the model"),
        ("linked folder", "more is a symbolic link"),
        ("fifo", "neither a file nor a folder"),
        ("remote code", "auto_map"),
        ("remote tokenizer", "auto_map"),
        ("no config", "config.json is missing"),
        ("no weights", "no model.safetensors"),
        ("cut off", "cut off or damaged"),
        ("trailing bytes", "cut off or damaged"),
        ("no header", "no valid safetensors header"),
        ("few rows", "200 rows but the tokenizer has"),
        ("no tokenizer", "no tokenizer.json"),
        ("case", "one file on some systems"),
        ("name", "name that other systems cannot store"),
        ("bad config", "config.json is not JSON"),
        ("adapter", "is an adapter"),
    ],
)
def test_a_base_is_refused(registry: Registry, folders: Any, what: str, message: str) -> None:
    damage(folders.base, what)
    before = contents(registry)
    with pytest.raises(UserError, match=message):
        registry.publish(folders.base, name="team/base", kind="base")
    assert contents(registry) == before


def test_shards_must_be_complete(registry: Registry, folders: Any) -> None:
    from transformers import AutoModelForCausalLM

    (folders.base / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(folders.other_base).save_pretrained(folders.base, max_shard_size="40KB")
    shards = sorted(folders.base.glob("model-*.safetensors"))
    assert len(shards) > 1
    version = registry.publish(folders.base, name="team/sharded", kind="base")
    assert version.manifest["dtype"] == "bfloat16"
    shards[-1].unlink()
    with pytest.raises(UserError, match=f"names {shards[-1].name}, which is missing"):
        registry.publish(folders.base, name="team/sharded", kind="base")


def edit_index(folder: Path, **changes: Any) -> None:
    """Change the map of one tensor's place (None: forget it), or `total_size`."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for key, value in changes.items():
        name = key.replace("__", ".")
        if key == "total_size":
            index["metadata"]["total_size"] = value
        elif value is None:
            del index["weight_map"][name]
        else:
            index["weight_map"][name] = value
    path.write_text(json.dumps(index))


def test_index_and_shards_name_each_other_completely(registry: Registry, folders: Any) -> None:
    from transformers import AutoModelForCausalLM

    (folders.base / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(folders.other_base).save_pretrained(folders.base, max_shard_size="40KB")
    index = folders.base / "model.safetensors.index.json"
    whole = index.read_bytes()
    first, *_, last = sorted(path.name for path in folders.base.glob("model-*.safetensors"))

    def refused(message: str, **changes: Any) -> None:
        edit_index(folders.base, **changes)
        with pytest.raises(UserError, match=message):
            registry.publish(folders.base, name="team/sharded", kind="base")
        index.write_bytes(whole)

    norm = json.loads(whole)["weight_map"]["model.norm.weight"]
    elsewhere = first if norm == last else last
    refused(f"{norm} holds model.norm.weight, which .* does not name", model__norm__weight=None)
    refused("model.norm.weight, which .* places", model__norm__weight=elsewhere)
    refused("lacks model.extra, which", model__extra=first)
    refused("says total_size 12, the shards hold", total_size=12)
    refused("names files outside its folder: ../elsewhere", model__norm__weight="../elsewhere.safetensors")
    index.write_bytes(whole.replace(b'"model.norm.weight"', b'"lm_head.weight"'))
    with pytest.raises(UserError, match="a name occurs twice"):
        registry.publish(folders.base, name="team/sharded", kind="base")
    index.write_bytes(whole)
    stray = folders.base / "model-00009-of-00009.safetensors"
    shutil.copy(folders.base / first, stray)
    refused("model-00009-of-00009.safetensors is no part of the model")
    stray.rename(folders.base / "model.safetensors")
    refused("has both model.safetensors and model.safetensors.index.json")
    (folders.base / "model.safetensors").unlink()
    assert registry.publish(folders.base, name="team/sharded", kind="base").number == 1


def rewrite_header(path: Path, change: Callable[[str], str]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length].decode()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_a_header_with_a_tensor_twice_or_a_payload_is_refused(registry: Registry, folders: Any) -> None:
    path = folders.base / "model.safetensors"
    whole = path.read_bytes()
    for message, change in (
        ("a name occurs twice", lambda text: text.replace('"lm_head.weight"', '"model.norm.weight"')),
        ("its metadata is no short list", lambda text: text.replace('"format":"pt"', '"format":[1]')),
        ("its metadata is no short list", lambda text: text.replace('"pt"', '"' + "A" * 70_000 + '"')),
    ):
        rewrite_header(path, change)
        with pytest.raises(UserError, match=message):
            registry.publish(folders.base, name="team/base", kind="base")
        path.write_bytes(whole)


def test_code_travels_only_when_it_is_allowed_and_is_never_run(
    registry: Registry, folders: Any, tmp_path: Path
) -> None:
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).write_text('x')\nclass M: pass\n"
    for folder in (folders.base, folders.other_base):
        (folder / "modeling.py").write_text(code)
        edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.M", "AutoConfig": "modeling.M"})
        edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling.M", None]})
    with pytest.raises(UserError, match="publish with --allow-code"):
        registry.publish(folders.base, name="team/base", kind="base")
    version = registry.publish(folders.base, name="team/base", kind="base", allow_code=True)
    assert version.manifest["architecture"]["remote_code"] is True
    assert "modeling.py" in {entry["path"] for entry in version.manifest["files"]}
    got = registry.materialise(version, tmp_path / "got", replay_probe=True)
    assert (got / "modeling.py").read_text() == code
    model, tokenizer = version.load("float32")
    assert type(model).__name__ == "LlamaForCausalLM" and len(tokenizer) > 200
    edit_json(folders.other_base / "config.json", model_type="of-its-own")
    with pytest.raises(UserError, match="(?s)does not load.*without running the Python files that it brings"):
        registry.publish(folders.other_base, name="team/other", kind="base", allow_code=True)
    assert not (tmp_path / "ran").exists() and registry.models() == ["team/base"]


def test_an_adapter_is_refused(filled: Registry, folders: Any) -> None:
    base, adapter = filled.resolve("team/base:1"), filled.resolve("team/adapter:1")
    before = contents(filled)

    def refused(message: str, folder: Path, kind: str, base: Any) -> None:
        with pytest.raises(UserError, match=message):
            filled.publish(folder, name="team/new", kind=kind, base=base)

    refused("needs its base", folders.adapter, "adapter", None)
    refused("is of kind adapter; an adapter's base", folders.adapter, "adapter", adapter)
    refused("whole model and has no base", folders.base, "base", base)
    refused("unknown kind 'lora'", folders.adapter, "lora", base)
    refused("no adapter_config.json", folders.base, "adapter", base)
    refused("is not a folder", folders.base / "absent", "adapter", base)
    refused("publish it as kind reward or value", folders.reward, "adapter", base)
    refused("has no score.weight", folders.adapter, "reward", base)
    edit_tensors(folders.value / "adapter_model.safetensors", remove_head)
    refused("value head was not saved", folders.value, "value", base)
    shutil.copytree(folders.base, folders.adapter / "base")
    refused("lies in an adapter's folder", folders.adapter, "adapter", base)
    shutil.rmtree(folders.adapter / "base")
    (folders.adapter / "Base").write_text("a file, which other systems take for base")
    refused("Base lies in an adapter's folder", folders.adapter, "adapter", base)
    (folders.base / "x").mkdir()
    for path in folders.base.iterdir():
        path.rmdir() if path.is_dir() else path.unlink()
    refused("is empty", folders.base, "base", None)
    assert contents(filled) == before


def save_other_head(folder: Path) -> None:
    """A classifier whose head is called otherwise, and whose two labels are no reward."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=304, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=2
    )
    BertForSequenceClassification(config).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["reward", "value"])
def test_a_whole_classifier_is_refused(filled: Registry, folders: Any, kind: str) -> None:
    before = contents(filled)
    base = filled.resolve("team/base:1")

    def refused(message: str, folder: Path, base: Any = None) -> None:
        with pytest.raises(UserError, match=message):
            filled.publish(folder, name="team/new", kind=kind, base=base)

    refused("no adapter_config.json", folders.classifier, base)
    refused(f"kind {kind} is an adapter and needs its base", folders.reward)
    refused(f"names LlamaForCausalLM; kind {kind} without a base is a sequence classifier", folders.base)
    config = folders.classifier / "config.json"
    whole = config.read_text()
    for pad in (None, 1):
        edit_json(config, pad_token_id=pad)
        refused(f"the tokenizer pads with id 2, config.json says pad_token_id {pad}", folders.classifier)
    config.write_text(whole)
    tokenizer = folders.classifier / "tokenizer_config.json"
    text = tokenizer.read_text()
    edit_json(tokenizer, pad_token=None)
    refused("the tokenizer pads with id None, config.json says pad_token_id 2", folders.classifier)
    tokenizer.write_text(text)
    save_other_head(folders.other_base)
    refused(f"has no score.weight: the {kind} head was not saved, or has another name", folders.other_base)
    weights = folders.classifier / "model.safetensors"
    edit_tensors(weights, lambda tensors: tensors.update({"score.weight": tensors["score.weight"].repeat(2, 1)}))
    refused(r"score.weight has shape \(2, 32\); expected one row", folders.classifier)
    edit_tensors(weights, lambda tensors: tensors.pop("score.weight"))
    refused(f"has no score.weight: the {kind} head", folders.classifier)
    assert contents(filled) == before


def test_a_bad_name_or_a_stranger_for_parent_is_refused(filled: Registry, folders: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bad name"):
        filled.publish(folders.base, name="base", kind="base")
    elsewhere = Registry(tmp_path / "elsewhere", create=True)
    parent = filled.resolve("team/base:1")
    with pytest.raises(UserError, match="is missing"):
        elsewhere.publish(folders.base, name="team/base", kind="base", parents={"init": parent})
    assert elsewhere.models() == []


def test_an_adapter_that_does_not_fit_its_base_is_refused(filled: Registry, folders: Any) -> None:
    def rename(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "layers.1" in name]:
            tensors[name.replace("layers.1", "layers.7")] = tensors.pop(name)

    edit_tensors(folders.adapter / "adapter_model.safetensors", rename)
    with pytest.raises(UserError, match="does not fit its base"):
        filled.publish(folders.adapter, name="team/new", kind="adapter", base=filled.resolve("team/base:1"))
    assert "team/new" not in filled.models() and filled.store.list("tmp") == []


def test_a_configuration_that_does_not_load_is_refused(registry: Registry, folders: Any) -> None:
    for changes in ({"hidden_size": "wide"}, {"model_type": "not-a-model"}, {"num_hidden_layers": 3}):
        folder = Path(shutil.copytree(folders.base, folders.base.with_name(next(iter(changes)))))
        edit_json(folder / "config.json", **changes)
        with pytest.raises(UserError, match="does not load|lacks the weights"):
            registry.publish(folder, name="team/base", kind="base")
    assert registry.models() == [] and registry.store.list("tmp") == []


def test_a_model_with_nan_or_without_some_weights_is_refused(registry: Registry, folders: Any) -> None:
    def poison(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"][0] = float("nan")

    def drop(tensors: dict[str, Any]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    edit_tensors(folders.base / "model.safetensors", poison)
    with pytest.raises(UserError, match="nan or infinity"):
        registry.publish(folders.base, name="team/base", kind="base")
    edit_tensors(folders.other_base / "model.safetensors", drop)
    with pytest.raises(UserError, match="lacks the weights model.layers.1.mlp.up_proj.weight"):
        registry.publish(folders.other_base, name="team/base", kind="base")
    assert registry.models() == [] and registry.store.list("blobs/sha256") == []
