"""A reward of several members: every one is checked, named by its base's digest, and put on its base again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from baton.adapters import member_folders
from baton.errors import UserError
from baton.registry.checks import CheckFailed, adapter_configs
from baton.registry.stores import blob_path


@pytest.fixture
def ensemble(tiny_chain: Any, tmp_path: Path) -> Path:
    """The chain's reward model three times over, as training leaves it: naming its base by a local path."""
    folder = tmp_path / "ensemble"
    shutil.copytree(tiny_chain.folder("reward"), folder)
    for number in (1, 2):
        member = folder / "members" / str(number)
        member.mkdir(parents=True)
        shutil.copy(folder / "adapter_config.json", member)
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({key: item * (1 + number) for key, item in tensors.items()}, member / "adapter_model.safetensors")
    return folder


@pytest.fixture
def chain(tiny_chain: Any, tmp_path: Path) -> Any:
    return tiny_chain.copy(tmp_path / "copy")


def publish(chain: Any, folder: Path, kind: str = "reward") -> Any:
    base = chain.registry.by_digest(chain.versions["pretrain"].digest)
    return chain.registry.publish(folder, name="tiny/ensemble", kind=kind, base=base, details={})


def test_members_are_published_without_local_paths_and_come_back_on_their_base(chain: Any, ensemble: Path) -> None:
    version = publish(chain, ensemble)
    paths = [entry["path"] for entry in version.manifest["files"]]
    assert adapter_configs(paths) == [
        "adapter_config.json",
        "members/1/adapter_config.json",
        "members/2/adapter_config.json",
    ]
    for entry in version.manifest["files"]:
        if entry["path"] in adapter_configs(paths):
            stored = json.loads(chain.registry.store.get(blob_path(entry["sha256"])))
            assert stored["base_model_name_or_path"] == f"baton:{version.base}"
    for base, folders in (
        (chain.folder("pretrain"), member_folders(chain.registry.materialise(version))),
        (
            ensemble.parent / "out" / "base",
            member_folders(chain.registry.materialise(version, ensemble.parent / "out")),
        ),
    ):
        assert len(folders) == 3
        for folder in folders:
            assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    # the second look finds the folder intact
    stamp = chain.registry.materialise(version).with_suffix(".stamp.json").read_bytes()
    assert chain.registry.materialise(version).with_suffix(".stamp.json").read_bytes() == stamp


def without(folder: Path, part: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({key: item for key, item in load_file(path).items() if part not in key}, path)


def test_a_member_without_a_head_is_refused(chain: Any, ensemble: Path) -> None:
    without(ensemble / "members" / "2", "score")
    with pytest.raises(
        CheckFailed, match=r"check lost-head: .*members/2/adapter_model.safetensors has no score.weight"
    ):
        publish(chain, ensemble)


def test_a_member_that_does_not_fit_the_base_is_refused(chain: Any, ensemble: Path) -> None:
    path = ensemble / "members" / "1" / "adapter_model.safetensors"
    save_file({key: item.repeat(1, 2) if "lora_A" in key else item for key, item in load_file(path).items()}, path)
    with pytest.raises(CheckFailed, match=r"check swapped-base: .*members/1 does not fit its base"):
        publish(chain, ensemble)


def test_a_gap_between_members_is_refused(chain: Any, ensemble: Path) -> None:
    (ensemble / "members" / "1").rename(ensemble / "members" / "3")
    with pytest.raises(UserError, match=r"members holds 2, 3; expected one folder .* 1, 2\."):
        publish(chain, ensemble)


def test_only_a_reward_is_an_ensemble(chain: Any, ensemble: Path) -> None:
    with pytest.raises(UserError, match="an ensemble's; only a reward is one"):
        publish(chain, ensemble, kind="value")


def test_an_ensemble_is_not_merged(chain: Any, ensemble: Path) -> None:
    version = publish(chain, ensemble)
    with pytest.raises(UserError, match="is an ensemble of 3 reward models, which no single model gives"):
        chain.registry.merge(version, ensemble.parent / "merged")
    assert not (ensemble.parent / "merged").exists()


def test_a_damaged_member_is_found(chain: Any, ensemble: Path) -> None:
    version = publish(chain, ensemble)
    cached = chain.registry.materialise(version) / "members" / "1" / "adapter_config.json"
    cached.write_text("{}")
    assert json.loads((chain.registry.materialise(version) / "members/1/adapter_config.json").read_text()) != {}
