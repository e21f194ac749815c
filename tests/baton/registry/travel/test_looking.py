"""What could not have been published does not arrive either; what arrived is proved on its first use."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.errors import UserError
from baton.registry import Registry, Version, probe
from baton.registry.checks import CheckFailed
from baton.registry.travel import bundle, transfer
from baton.registry.travel.first_use import prove_once
from tests.baton.registry.conftest import paths
from tests.baton.registry.travel.made_up import FILES, TOKENIZER, add

BASE = FILES | TOKENIZER
ADAPTER = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"\2\0\0\0\0\0\0\0{}"}
AUTO_MAP = b'{"model_type": "made-up", "vocab_size": 4, "auto_map": {"AutoModel": "evil.Evil"}}'
CODE = {"architecture": {"class": None, "model_type": "made-up", "remote_code": True}}


def arrive(how: str, source: Registry, version: Version, target: Registry, allow_code: bool = False) -> None:
    if how == "push":
        transfer.push(source, version, target, allow_code=allow_code)
        return
    stream = io.BytesIO()
    bundle.export(source, version, stream)
    bundle.import_bundle(target, io.BytesIO(stream.getvalue()), allow_code=allow_code)


@pytest.mark.parametrize("how", ["push", "bundle"])
@pytest.mark.parametrize(
    ("files", "changes", "message"),
    [
        (BASE | {"evil.py": b"print()"}, {}, r"team/x:1: evil.py is code.*Here: --allow-code on import"),
        (BASE | {"config.json": AUTO_MAP}, {}, "config.json has auto_map"),
        (BASE | ADAPTER, {}, "it is an adapter"),
        (FILES, {}, "it has no tokenizer.json"),
        (BASE | {"model-1.safetensors": b"\2\0\0\0\0\0\0\0{}"}, {}, "model-1.safetensors is no part of the model"),
        (BASE | {"config.json": b'{"vocab_size": 5}'}, {}, "check resized-vocabulary: .*team/x:1: it: embed_tokens"),
        (ADAPTER | TOKENIZER, {"kind": "reward"}, "check lost-head: "),
        (ADAPTER | TOKENIZER, {"tokenizer_digest": "sha256:" + "1" * 64}, "check wrong-tokenizer: "),
        (
            ADAPTER | {"adapter_config.json": b'{"peft_type":"LORA","base_model_name_or_path":"baton:sha256:7"}'},
            {},
            "check swapped-base: .*its adapter was trained on sha256:7, its base is sha256:",
        ),
    ],
)
def test_what_could_not_have_been_published_stays_out(
    how: str,
    files: dict[str, bytes],
    changes: dict[str, Any],
    message: str,
    registry: Registry,
    new_location: Callable[[str], str],
) -> None:
    target = Registry(new_location("folder"), create=True)
    base = add(registry, "team/base", BASE)
    kind = changes.get("kind", "adapter" if "model.safetensors" not in files else "base")
    of_adapter = {"base": base.digest, "kind": kind} if kind != "base" else {}
    version = add(registry, "team/x", files, kind, **{**changes, **of_adapter})
    with pytest.raises(UserError, match=message) as raised:
        arrive(how, registry, version, target)
    assert str(target.location) not in str(raised.value)
    assert isinstance(raised.value, CheckFailed) == message.startswith("check")
    assert target.models() == [] and not [path for path in paths(target) if path.startswith(("tmp", "manifests"))]


@pytest.mark.parametrize("how", ["push", "bundle"])
def test_code_arrives_when_it_is_allowed_and_the_manifest_says_so(
    how: str, folder_registry: Registry, registry: Registry
) -> None:
    files = BASE | {"config.json": AUTO_MAP, "evil.py": b"print()"}
    silent = add(folder_registry, "team/silent", files)
    with pytest.raises(UserError, match="brings code, and its manifest does not say so"):
        arrive(how, folder_registry, silent, registry, allow_code=True)
    arrive(how, folder_registry, add(folder_registry, "team/open", files, **CODE), registry, allow_code=True)
    assert registry.models() == ["team/open"]


def test_files_that_are_here_already_are_looked_at_too(folder_registry: Registry, registry: Registry) -> None:
    transfer.push(folder_registry, add(folder_registry, "team/base", BASE), registry)
    files = {path: data for path, data in BASE.items() if path != "tokenizer.json"}
    bad = add(folder_registry, "team/bad", files)
    with pytest.raises(UserError, match="no tokenizer.json"):
        transfer.push(folder_registry, bad, registry)
    same = add(folder_registry, "team/same", BASE, licence="apache-2.0")
    assert transfer.push(folder_registry, same, registry).blobs_sent == 0 and registry.verify_all() == []


def test_an_arrived_version_is_proved_once(
    filled: Registry, new_location: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Registry(new_location("folder"), create=True)
    transfer.push(filled, filled.resolve("team/adapter:1"), target)
    replayed: list[Path] = []
    error: list[Exception] = [IndexError("index out of range in self")]

    def replay(folder: Path, base_folder: Path | None, manifest: dict[str, Any]) -> None:
        replayed.append(folder)
        if error:
            raise error[0]

    monkeypatch.setattr(probe, "replay", replay)
    here, there = target.resolve("team/adapter:1"), filled.resolve("team/base:1")
    folder = Path("adapter")
    for _ in range(2):  # what failed is tried again
        with pytest.raises(probe.ProbeMismatch, match="team/adapter:1 does not give .*out of range"):
            prove_once(target, here, folder, Path("base"))
    error.clear()
    for _ in range(3):
        prove_once(target, here, folder, Path("base"))
    assert replayed == [folder] * 3
    prove_once(filled, there, folder, None)  # published here
    assert replayed == [folder] * 3


def test_the_proof_tells_an_adapter_whose_base_was_swapped(
    filled: Registry, new_location: Callable[[str], str]
) -> None:
    target = Registry(new_location("folder"), create=True)
    transfer.push(filled, filled.resolve("team/adapter:1"), target)
    transfer.push(filled, filled.resolve("team/other:1"), target)
    here = target.resolve("team/adapter:1")
    folder, other = here.folder(), target.resolve("team/other:1").folder()
    folder.with_name(f"{folder.name}.proven").unlink()  # as if it had never been loaded from this cache
    with pytest.raises(CheckFailed, match="check swapped-base: "):
        prove_once(target, here, folder, other)
    base = target.resolve("team/base:1").folder()
    prove_once(target, here, folder, base)
