"""Materialised folders: plain, verified, mended, and loadable by a process that never heard of Baton."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.errors import UserError
from baton.registry import Registry, Version
from baton.registry.checks import CheckFailed
from baton.registry.probe import ProbeMismatch, replay
from baton.registry.stores import blob_path
from tests.baton.registry.conftest import flip, in_processes, remove, store_kind_of
from tests.baton.registry.test_inspection import edit_json


def test_every_kind_loads_without_baton_and_merging_is_equal(
    filled: Registry, made: Any, tmp_path: Path, load_plainly: Any
) -> None:
    folders: dict[str, Path] = {}
    named = {}
    for kind in ("reward", "value"):
        whole = filled.publish(made.classifier, name=f"team/whole-{kind}", kind=kind)
        folders[f"whole {kind}"] = filled.materialise(whole, tmp_path / "got" / f"whole {kind}")
        probe = whole.manifest["probe"]
        named[f"whole {kind}"] = {"kind": "classifier", "folder": str(folders[f"whole {kind}"]), "probe": probe}
    for name in ("base", "adapter", "reward", "value", "merged adapter", "merged reward"):
        version = filled.resolve(f"team/{name.removeprefix('merged ')}:1")
        is_merged = name.startswith("merged")
        get = filled.merge if is_merged else filled.materialise
        folders[name] = get(version, tmp_path / "got" / name)
        kind = {"merged adapter": "merged", "merged reward": "classifier"}.get(name, name)
        named[name] = {"kind": kind, "folder": str(folders[name]), "probe": version.manifest["probe"]}
    for name, found in load_plainly(named).items():
        # Merged models are cast to bfloat16, which has 8 bits of mantissa; the rest is exact to float32.
        assert found["difference"] < (0.1 if name.startswith("merged") else 1e-4), (name, found)
        assert found["rendered"] == "user: hi\n"
    # No file can lead an edit back into the store.
    links = [p for folder in folders.values() for p in folder.rglob("*") if p.stat().st_nlink > 1 and p.is_file()]
    assert links == [] and not any(p.is_symlink() for p in (tmp_path / "got").rglob("*"))


def test_get_wants_a_new_or_empty_folder(filled: Registry, tmp_path: Path) -> None:
    version = filled.resolve("team/adapter:1")
    (tmp_path / "empty").mkdir()
    inode = (tmp_path / "empty").stat().st_ino
    folder = filled.materialise(version, tmp_path / "empty", replay_probe=True)
    assert folder == tmp_path / "empty" and folder.stat().st_ino == inode
    expected = {entry["path"] for entry in version.manifest["files"]} | {"base"}
    assert {path.name for path in folder.iterdir()} == expected
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "base")
    for target in (folder, folder / "config.json", folder / "tokenizer.json"):
        if target.exists():
            with pytest.raises(UserError, match="not an empty folder"):
                filled.materialise(version, target)


def test_the_second_read_hashes_nothing_and_a_changed_file_is_mended(
    filled: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from baton.registry import materialise

    read: list[str] = []
    real = materialise.file_sha256
    monkeypatch.setattr(materialise, "file_sha256", lambda path: read.append(path.name) or real(path))
    version = filled.resolve("team/base:1")
    folder = filled.materialise(version)
    assert filled.materialise(version) == folder and read == []
    path = folder / "model.safetensors"
    whole, status = path.read_bytes(), path.stat()
    damaged = bytearray(whole)
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # even with its old times set back
    assert filled.materialise(version) == folder and "model.safetensors" in read
    assert path.read_bytes() == whole
    os.utime(path)  # touched only: read again, kept, and stamped anew
    inode, read[:] = path.stat().st_ino, []
    filled.materialise(version)
    assert path.stat().st_ino == inode and "model.safetensors" in read
    read.clear()
    filled.materialise(version)
    assert read == []
    (folder / "extra.json").write_text("{}")
    (folder / "config.json").unlink()
    filled.materialise(version)
    assert {p.name for p in folder.iterdir()} == {entry["path"] for entry in version.manifest["files"]}
    assert [p.name for p in folder.parent.iterdir() if "partial" in p.name] == []


def _materialise_often(path: str, barrier: Any) -> None:
    registry = Registry(path)
    version = registry.resolve("team/adapter:1")
    barrier.wait()
    for _ in range(10):
        folder = registry.materialise(version)
        # What one process was given must not vanish while another one makes the same folder.
        for entry in version.manifest["files"]:
            assert (folder / entry["path"]).stat().st_size > 0


def test_processes_at_once_share_the_cache(filled: Registry, cache: Path) -> None:
    rounds = {"folder": 5, "s3": 1}[store_kind_of(filled)]
    with multiprocessing.Manager() as manager:
        for _ in range(rounds):
            barrier = manager.Barrier(4)
            in_processes(filled, _materialise_often, [(filled.location, barrier)] * 4)
            assert [path.name for path in cache.iterdir() if "partial" in path.name] == []
            shutil.rmtree(cache)


def test_a_get_whose_probe_fails_leaves_nothing(
    filled: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from baton.registry import probe

    monkeypatch.setattr(probe, "outputs", lambda model, p: [[x + 1 for x in row] for row in p["expected"]])
    with pytest.raises(ProbeMismatch):
        filled.materialise(filled.resolve("team/adapter:1"), tmp_path / "got", replay_probe=True)
    assert not (tmp_path / "got").exists()


def test_a_cached_adapter_follows_its_base_when_the_cache_moves(
    filled: Registry, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = filled.resolve("team/adapter:1")
    filled.materialise(version)
    moved = cache.rename(cache.with_name("moved"))
    monkeypatch.setenv("BATON_CACHE", str(moved))
    folder = filled.materialise(version, replay_probe=True)
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base) == moved / (version.base or "").removeprefix("sha256:") and Path(base).is_dir()


def _die(*arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _in_child(function: Callable[..., Any], *arguments: Any) -> None:
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_what_a_killed_materialisation_left_is_swept(
    filled_folder: Registry, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = filled_folder.resolve("team/base:1")
    with monkeypatch.context() as patch:
        patch.setattr("baton.registry.materialise._moved", _die)
        for _ in range(2):
            _in_child(filled_folder.materialise, version)
            left = [path for path in cache.iterdir() if "partial" in path.name]
            assert len(left) == 2 and (left[0] if left[0].is_dir() else left[1]).joinpath("config.json").is_file()
    folder = filled_folder.materialise(version)
    assert {path.name for path in cache.iterdir()} == {
        folder.name,
        f"{folder.name}.stamp.json",
        f"{folder.name}.proven",
    }


def test_a_killed_get_into_a_folder_that_is_there_goes_on(
    filled_folder: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, target = filled_folder.resolve("team/adapter:1"), tmp_path / "mount"
    target.mkdir()
    real = os.rename

    def rename(source: Path, place: Path) -> None:
        real(source, place)
        if place.parent == target and len(os.listdir(target)) > 3:  # the partial folder, its lock, and two files
            _die()

    for module in ("materialise", "stores.scratch"):
        monkeypatch.setattr(f"baton.registry.{module}.os.rename", rename)
    _in_child(filled_folder.materialise, version, target)
    monkeypatch.undo()
    assert len([path for path in target.iterdir() if "partial" not in path.name]) == 2
    folder = filled_folder.materialise(version, target)
    assert {path.name for path in folder.iterdir()} == {entry["path"] for entry in version.manifest["files"]} | {"base"}
    # What somebody else puts there is never swept, and still refused.
    with pytest.raises(UserError, match="not an empty folder"):
        filled_folder.materialise(version, target)


def test_a_damaged_blob_is_named_and_never_materialised(filled: Registry, cache: Path, tmp_path: Path) -> None:
    version = filled.resolve("team/base:1")
    entry = next(e for e in version.manifest["files"] if e["path"] == "model.safetensors")
    blob = blob_path(entry["sha256"])
    flip(filled, blob, at=-1)
    for folder in (None, tmp_path / "got"):
        with pytest.raises(UserError, match=f"model.safetensors is damaged.*{entry['sha256']}, found sha256:"):
            filled.materialise(version, folder)
    assert not (tmp_path / "got").exists() and list(cache.iterdir()) == []
    remove(filled, blob)
    with pytest.raises(UserError, match="is missing, the blob of model.safetensors"):
        filled.materialise(version)


def test_a_missing_adapter_configuration_is_named(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    version = filled.resolve("team/adapter:1")
    filled.materialise(version)
    monkeypatch.setattr("baton.registry.materialise._configs", {})  # as in another process
    entry = next(e for e in version.manifest["files"] if e["path"] == "adapter_config.json")
    remove(filled, blob_path(entry["sha256"]))
    with pytest.raises(UserError, match="is missing, the blob of adapter_config.json"):
        filled.materialise(version)


def test_the_probe_catches_what_checksums_cannot(filled: Registry, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = filled.materialise(filled.resolve("team/other:1"))
    for kind in ("adapter", "reward", "value"):
        version = filled.resolve(f"team/{kind}:1")
        folder = filled.materialise(version, tmp_path / kind)
        replay(folder, folder / "base", version.manifest)
        with pytest.raises(ProbeMismatch, match="not the model that was published"):
            replay(folder, other, version.manifest)  # the base was swapped
    reward, value = filled.resolve("team/reward:1"), filled.resolve("team/value:1")
    with pytest.raises(ProbeMismatch, match="not the model that was published"):
        replay(tmp_path / "value", tmp_path / "value" / "base", reward.manifest)
    weights = tmp_path / "value" / "adapter_model.safetensors"
    tensors = load_file(weights)
    head = tensors.pop("base_model.model.score.weight")
    save_file(tensors, weights)
    with pytest.raises(ProbeMismatch, match="has lost its score.weight"):
        replay(tmp_path / "value", tmp_path / "value" / "base", value.manifest)
    save_file(tensors | {"base_model.model.score.weight": -head}, weights)
    with pytest.raises(ProbeMismatch, match="by up to"):
        replay(tmp_path / "value", tmp_path / "value" / "base", value.manifest)
    with pytest.raises(ProbeMismatch):
        replay(other, None, filled.resolve("team/base:1").manifest)


def test_an_adapter_on_a_base_of_another_shape_does_not_load(filled: Registry, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=304, hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    version = filled.resolve("team/adapter:1")
    with pytest.raises(ProbeMismatch, match="does not load"):
        replay(filled.materialise(version), tmp_path / "small", version.manifest)


def test_replaying_leaves_the_random_state_alone(filled: Registry) -> None:
    import torch

    version = filled.resolve("team/reward:1")
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    filled.materialise(version, replay_probe=True)
    assert torch.equal(torch.rand(1), wanted)


def merged_by_hand(base: Path, adapter: Path, name: str) -> Any:
    """W + (alpha / r) B A in float32, then bfloat16."""
    import torch
    from safetensors.torch import load_file

    weights, lora = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    stem = "base_model.model." + name.removesuffix(".weight")
    delta = lora[f"{stem}.lora_B.weight"] @ lora[f"{stem}.lora_A.weight"]
    return (weights[name].float() + config["lora_alpha"] / config["r"] * delta).to(torch.bfloat16)


def test_merging_by_hand_and_in_the_recorded_dtype(filled: Registry, made: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    folder = filled.merge(filled.resolve("team/adapter:1"), tmp_path / "merged")
    found, base = load_file(folder / "model.safetensors"), load_file(made.base / "model.safetensors")
    assert set(found) == set(base) and {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for name, tensor in found.items():
        is_target = any(part in name for part in ("q_proj", "v_proj", "down_proj"))
        wanted = merged_by_hand(made.base, made.adapter, name) if is_target else base[name]
        # One unit in the last place: sums may be made in another order.
        assert torch.allclose(tensor.float(), wanted.float(), rtol=2**-7, atol=1e-6), name
    assert not list(folder.glob("adapter*"))
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    merged = filled.publish(folder, name="team/merged", kind="merged")
    assert merged.manifest["tokenizer_digest"] == filled.resolve("team/base:1").manifest["tokenizer_digest"]
    scorer = filled.merge(filled.resolve("team/reward:1"), tmp_path / "scorer")
    published = filled.publish(scorer, name="team/scorer", kind="merged")
    assert published.manifest["probe"]["output"] == "score"
    assert "score.weight" in load_file(scorer / "model.safetensors")


def test_a_merged_model_ends_replies_as_the_adapter_s_tokenizer_does(
    filled: Registry, made: Any, tmp_path: Path
) -> None:
    """The base names one end; fine-tuning taught another: plain generate must stop at either."""
    from transformers import AutoTokenizer, GenerationConfig

    tuned = tmp_path / "tuned"
    shutil.copytree(made.adapter, tuned)
    tokenizer = AutoTokenizer.from_pretrained(made.base)
    ends_text = tokenizer.eos_token_id
    tokenizer.eos_token = next(token for token in sorted(tokenizer.get_vocab()) if token != tokenizer.eos_token)
    tokenizer.save_pretrained(tuned)
    base = filled.resolve("team/base:1")
    version = filled.publish(tuned, name="team/tuned", kind="adapter", base=base)
    merged = filled.merge(version, tmp_path / "merged")
    wanted = [tokenizer.eos_token_id, ends_text]
    assert json.loads((merged / "config.json").read_text())["eos_token_id"] == wanted
    assert GenerationConfig.from_pretrained(merged).eos_token_id == wanted


def test_a_base_stored_under_shorter_names_merges(registry: Registry, tmp_path: Path) -> None:
    """GPT-2 lies on the Hub without `transformer.` before its tensors' names, and is saved with it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    from tests.baton.registry.conftest import ROWS, save_tokenizer

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=ROWS, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1, n_positions=32)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    assert "transformer.wte.weight" in tensors
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    short["ln_f.weight"] = short["ln_f.weight"].float()  # a dtype of its own, which merging keeps
    save_file(short, base / "model.safetensors", metadata={"format": "pt"})
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True),
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(adapter)
    for folder in (base, adapter):
        save_tokenizer(folder)
    published = registry.publish(base, name="team/gpt2", kind="base")
    version = registry.publish(adapter, name="team/adapter", kind="adapter", base=published)
    merged = registry.merge(version, tmp_path / "merged")
    found = load_file(merged / "model.safetensors")
    dtypes = {name.removeprefix("transformer."): tensor.dtype for name, tensor in found.items()}
    assert dtypes == {name: tensor.dtype for name, tensor in short.items()}
    registry.publish(merged, name="team/merged", kind="merged", parents={"adapter": version})
    with pytest.raises(CheckFailed, match="unchanged-merge"):
        GPT2LMHeadModel.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(tmp_path / "same")
        save_tokenizer(tmp_path / "same")
        registry.publish(tmp_path / "same", name="team/same", kind="merged", parents={"adapter": version})


def test_tied_weights_stay_tied(registry: Registry, folders: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    config, weights = folders.base / "config.json", folders.base / "model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    tensors = load_file(weights)
    del tensors["lm_head.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    base = registry.publish(folders.base, name="team/tied", kind="base")
    for kind in ("adapter", "reward"):
        edit_json(getattr(folders, kind) / "adapter_config.json", base_model_name_or_path=str(folders.base))
        version = registry.publish(getattr(folders, kind), name=f"team/{kind}", kind=kind, base=base)
        registry.materialise(version, replay_probe=True)
        merged = load_file(registry.merge(version, tmp_path / kind) / "model.safetensors")
        assert "lm_head.weight" not in merged and merged["model.norm.weight"].dtype == torch.bfloat16


def untrained(version: Version, filled: Registry, folders: Any) -> Version:
    from safetensors.torch import load_file, save_file

    weights = folders.adapter / "adapter_model.safetensors"
    tensors = {name: t * 0 if "lora_B" in name else t for name, t in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    return filled.publish(folders.adapter, name="team/untrained", kind="adapter", base=version)


def test_a_merge_that_changes_nothing_or_has_nothing_to_merge_is_refused(
    filled: Registry, folders: Any, tmp_path: Path
) -> None:
    base = filled.resolve("team/base:1")
    with pytest.raises(UserError, match="nothing to merge"):
        filled.merge(base, tmp_path / "merged")
    with pytest.raises(CheckFailed, match="check unchanged-merge: .* unchanged: it was not trained"):
        filled.merge(untrained(base, filled, folders), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ["reward", "value"])
def test_a_whole_classifier_travels_by_itself(filled: Registry, folders: Any, tmp_path: Path, kind: str) -> None:
    """Published, listed, verified deeply, and never merged: there is no base under it."""
    parent = filled.resolve("team/reward:1")
    version = filled.publish(folders.classifier, name="team/whole", kind=kind, parents={"init": parent})
    manifest = version.manifest
    assert version.base is None and manifest["probe"]["output"] == "score" and manifest["dtype"] == "float32"
    assert manifest["architecture"]["class"] == "LlamaForSequenceClassification"
    assert filled.publish(folders.classifier, name="team/whole", kind=kind, parents={"init": parent}) == version
    assert filled.verify_all(deep=True) == []
    folder = filled.materialise(version, tmp_path / "got", replay_probe=True)
    assert {path.name for path in folder.iterdir()} == {entry["path"] for entry in manifest["files"]}
    with pytest.raises(UserError, match=f"is of kind {kind}: nothing to merge"):
        filled.merge(version, tmp_path / "merged")
    with pytest.raises(UserError, match=f"is of kind {kind}; an adapter's base is of kind"):
        filled.publish(folders.reward, name="team/new", kind="reward", base=version)


def test_the_probe_of_a_whole_classifier_sees_its_head(filled: Registry, folders: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    version = filled.publish(folders.classifier, name="team/whole", kind="reward")
    folder = filled.materialise(version, tmp_path / "got")
    replay(folder, None, version.manifest)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    head = tensors.pop("score.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ProbeMismatch, match="has lost its score.weight"):
        replay(folder, None, version.manifest)
    save_file(tensors | {"score.weight": -head}, weights, metadata={"format": "pt"})
    with pytest.raises(ProbeMismatch, match="by up to"):
        replay(folder, None, version.manifest)
    with pytest.raises(ProbeMismatch):
        replay(filled.materialise(filled.resolve("team/base:1")), None, version.manifest)


def test_a_merged_reward_model_may_be_published_as_one(filled: Registry, tmp_path: Path) -> None:
    reward = filled.resolve("team/reward:1")
    folder = filled.merge(reward, tmp_path / "merged")
    version = filled.publish(folder, name="team/reward", kind="reward", parents={"adapter": reward})
    assert version.number == 2 and version.base is None and filled.verify(version, deep=True) == []
    tokenizer = ("tokenizer_digest", "chat_template_digest")
    assert all(version.manifest[key] == reward.manifest[key] for key in tokenizer)
