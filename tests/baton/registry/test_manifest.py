"""Manifests: one spelling, a digest, and strict reading."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from baton.errors import UserError
from baton.registry import Registry
from baton.registry.manifest import canonical, digest_of, is_safe_path, parse, storable


@pytest.fixture
def store_kind() -> str:
    """A manifest is the same bytes in any store."""
    return "folder"


def test_canonical_json_by_hand() -> None:
    assert canonical({"b": [1, 2.5, None], "a": "é"}) == '{"a":"é","b":[1,2.5,null]}'.encode()
    assert digest_of(b"") == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_storable_hides_local_paths_and_spells_what_json_cannot() -> None:
    given: dict[str, Any] = {
        "run_dir": Path("/elsewhere/runs/x"),
        "rows": (1, None),
        "loss": float("nan"),
        "kl": float("inf"),
        "hub": "org/name",
        "prompt": "/ask what is / and /usr",
        1: True,
    }
    given |= {"url": "file:///home/ann/a b/x.bin", "option": "--in=/home/ann/x.bin", "web": "https://host/a/b?c=/d"}
    assert storable(given) == {
        "url": "file://…/a b/x.bin",
        "option": "--in=…/x.bin",
        "web": "https://host/a/b?c=/d",
        "run_dir": "…/x",
        "rows": [1, None],
        "loss": "nan",
        "kl": "inf",
        "hub": "org/name",
        "prompt": "/ask what is / and /usr",
        "1": True,
    }


@pytest.mark.parametrize("path", ["", "/a", "../a", "a/../b", "a//b", "./a", "a/", "a\\b", "c:x", "a\n", "a\0"])
def test_unsafe_paths(path: str) -> None:
    assert not is_safe_path(path)


def test_safe_paths() -> None:
    assert is_safe_path("config.json") and is_safe_path("sub/model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "baton.manifest/9"}, "expected format"),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"metrics": []}, "field 'metrics' has type list"),
        ({"kind": "policy"}, "unknown kind 'policy'"),
        ({"kind": "adapter"}, "kind adapter with base None"),
        ({"base": "sha256:" + "0" * 64}, "kind base with base sha256:0"),
        ({"kind": "merged", "base": "sha256:" + "0" * 64}, "kind merged with base sha256:0"),
        ({"parents": {"sft": "sha256:12"}}, "bad digest"),
        ({"files": [{"path": "../x", "sha256": "0" * 64, "size": 1}]}, "unsafe file path"),
        ({"files": [{"path": "x", "sha256": "0", "size": 1}]}, "bad sha256"),
        ({"files": [{"path": "x", "sha256": "0" * 64, "size": True}]}, "bad size"),
        ({"files": [{"path": "x", "sha256": "0" * 64}]}, "bad file entry"),
        ({"files": [{"path": p, "sha256": "0" * 64, "size": 1} for p in ("x", "X")]}, "occurs twice"),
    ],
)
def test_strict_reading(filled: Registry, change: dict[str, Any], message: str) -> None:
    manifest = filled.resolve("team/base:1").manifest | change
    data = canonical(manifest)
    with pytest.raises(UserError, match=message):
        parse(data, digest_of(data), "here")


@pytest.mark.parametrize("kind", ["reward", "value"])
@pytest.mark.parametrize("base", [None, "sha256:" + "0" * 64])
def test_a_scorer_may_have_a_base_or_none(filled: Registry, kind: str, base: str | None) -> None:
    data = canonical(filled.resolve("team/base:1").manifest | {"kind": kind, "base": base})
    assert parse(data, digest_of(data), "here")["base"] == base


def test_a_missing_field_another_spelling_and_no_json(filled: Registry) -> None:
    manifest = filled.resolve("team/base:1").manifest
    for data, message in (
        (canonical({k: v for k, v in manifest.items() if k != "probe"}), "field 'probe' is missing"),
        (json.dumps(manifest).encode(), "not canonical"),
        (b"[]", "expected an object"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
    ):
        with pytest.raises(UserError, match=message):
            parse(data, digest_of(data), "here")


def test_what_a_manifest_says(filled: Registry, made: Any) -> None:
    base = filled.resolve("team/base:1").manifest
    stored = {entry["path"]: entry for entry in base["files"]}
    weights = (made.base / "model.safetensors").read_bytes()
    assert stored["model.safetensors"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert stored["model.safetensors"]["size"] == len(weights)
    assert list(stored) == sorted(stored)
    # Embedding and head 304 × 32 each; a layer: 4 attention and 3 MLP matrices, 2 norms; a last norm.
    assert base["architecture"] == {
        "class": "LlamaForCausalLM",
        "model_type": "llama",
        "hidden_size": 32,
        "num_layers": 2,
        "num_parameters": 2 * 304 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32,
    }
    assert base["dtype"] == "bfloat16" and base["licence"] == "apache-2.0"
    assert base["vocabulary"]["embedding_rows"] == 304 and 259 <= base["vocabulary"]["size"] <= 300
    special = {"bos": 0, "eos": 1, "pad": 2, "unk": None, "stop": [1]}
    assert base["vocabulary"]["special_tokens"] == special
    template = (made.base / "chat_template.jinja").read_bytes()
    assert base["chat_template_digest"] == "sha256:" + hashlib.sha256(template).hexdigest()
    assert {"torch", "transformers", "peft"} <= set(base["packages"]) and "commit" in base["code"]
    reward = filled.resolve("team/reward:1")
    assert reward.manifest["base"] == filled.resolve("team/base:1").digest
    assert reward.manifest["architecture"]["class"] == "LlamaForSequenceClassification"
    assert reward.manifest["tokenizer_digest"] == base["tokenizer_digest"]
    assert reward.manifest["parents"] == {"init": filled.resolve("team/adapter:1").digest}


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("vocabulary", None, "no size and embedding_rows"),
        ("vocabulary", {"size": True}, "no size and embedding_rows"),
        ("vocabulary", {"special_tokens": {"pad": 1}}, "no special_tokens with bos, eos, pad, unk and stop"),
        ("vocabulary", {"special_tokens": {r: None for r in ("bos", "eos", "pad", "unk", "stop")}}, "bad id .* None"),
        ("probe", None, "the output None"),
        ("probe", {"output": "text"}, "the output 'text'"),
        ("probe", {"input_ids": [[0, 10**6]]}, "no input_ids"),
        ("probe", {"input_ids": [[0] * 40000] * 2}, "more than 65536 input_ids"),
        ("probe", {"vocabulary_ids": [-1]}, "no vocabulary_ids"),
        ("probe", {"vocabulary_size": 0}, "the vocabulary_size 0"),
        ("probe", {"atol": 1e9}, "the atol 1000000000.0"),
        ("probe", {"rtol": "0.1"}, "the rtol '0.1'"),
        ("probe", {"expected": []}, "one row of expected outputs"),
        ("probe", {"expected": [[0.5], [0.5]]}, "expected outputs other than 33 finite numbers a row"),
        ("probe", {"output": "score"}, "expected outputs other than 1 finite numbers a row"),
        ("architecture", None, "no class"),
        ("architecture", {"class": 5}, "a bad class: 5"),
        ("architecture", {"num_parameters": "many"}, "bad num_parameters"),
    ],
)
def test_inner_fields_that_baton_reads(
    filled: Registry, field: str, change: dict[str, Any] | None, message: str
) -> None:
    """change: of the field; None empties it."""
    manifest = filled.resolve("team/base:1").manifest
    data = canonical(manifest | {field: manifest[field] | change if change is not None else {}})
    with pytest.raises(UserError, match=message):
        parse(data, digest_of(data), "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": [7]}, "holds a int"),
        ({"data": [{"path": "x", "licence": ["mit"]}]}, r"the licence \['mit'\]"),
        ({"dtype": {"float32": "two"}}, "numbers of tensors"),
        ({"recipe": json.loads('{"a":' * 200 + "1" + "}" * 200)}, "nested deeper than 100"),
    ],
)
def test_other_inner_fields(filled: Registry, change: dict[str, Any], message: str) -> None:
    data = canonical(filled.resolve("team/base:1").manifest | change)
    with pytest.raises(UserError, match=message):
        parse(data, digest_of(data), "here")


@pytest.mark.parametrize("path", ["base", "Base", "base/config.json", "BASE/x"])
def test_nothing_of_an_adapter_lies_where_its_base_is_put(filled: Registry, path: str) -> None:
    entry = {"path": path, "sha256": "0" * 64, "size": 1}
    data = canonical(filled.resolve("team/adapter:1").manifest | {"files": [entry]})
    with pytest.raises(UserError, match="an adapter with a file at base or in base/"):
        parse(data, digest_of(data), "here")
    parse_again = canonical(filled.resolve("team/base:1").manifest | {"files": [entry]})
    assert parse(parse_again, digest_of(parse_again), "here")["files"] == [entry]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["a" * 256], "unsafe file path"),
        (["é" * 128], "unsafe file path"),  # of two bytes each
        (["/".join(["a" * 99] * 11)], "unsafe file path"),
        (["a/b/c", "a/b"], "'a/b' is a file and a folder"),
        (["a", "a.b", "A/b"], "'a' is a file and a folder"),
    ],
)
def test_paths_that_a_file_system_cannot_store(filled: Registry, paths: list[str], message: str) -> None:
    files = [{"path": path, "sha256": "0" * 64, "size": 1} for path in paths]
    data = canonical(filled.resolve("team/base:1").manifest | {"files": files})
    with pytest.raises(UserError, match=message):
        parse(data, digest_of(data), "here")


def test_long_paths_that_can_be_stored_and_megabytes_that_are_refused_at_once() -> None:
    assert is_safe_path("a" * 255) and is_safe_path("/".join(["a" * 255] * 4)) and is_safe_path("é" * 127)
    assert not is_safe_path("a/" * (1 << 22) + "a")
