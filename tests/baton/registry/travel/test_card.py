"""Model cards: valid metadata, code that loads, and text from outside that stays text."""

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

from baton.registry import Registry, Version
from baton.registry.travel.card import HubModel, card, flatten, loading_code
from baton.registry.travel.card_text import block, clean, inline, table
from baton.registry.trust import attestations
from baton.registry.ui.rendering import markdown
from tests.baton.registry.conftest import Folders

HOSTILE = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](https://evil.example/x.png)",
    "https://evil.example www.evil.example <https://evil.example> me@evil.example",
    "a | b\n| --- |\n---\nlicense: mit\n---\n# heading\n```\n~~~",
    "```\n````\n# out of the block",
    "&lt;b&gt; \\` $x$ {{7*7}} *b* _i_ ~~s~~",
    "{a: [b}: # %YAML\t- |\u202e\x07\x85\u2028",
]


def publish(registry: Registry, folder: Path, details: dict[str, Any]) -> Version:
    return registry.publish(folder, name="team/hostile", kind="base", details=details)


def load(text: str, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "README.md").write_text(text, "utf-8")
    found = metadata_load(tmp_path / "README.md")
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("kind", ["base", "adapter", "reward", "value"])
def test_the_metadata_is_what_the_hub_reads(filled: Registry, tmp_path: Path, kind: str) -> None:
    version = filled.resolve(f"team/{kind}:1")
    text = card(filled, version, "org/model")
    found = load(text, tmp_path)
    parsed = ModelCard(text)
    assert parsed.data.library_name == ("transformers" if kind == "base" else "peft")
    assert found["pipeline_tag"] == ("text-classification" if kind in ("reward", "value") else "text-generation")
    assert found["baton"] == {"version": version.ref, "manifest": version.digest}
    assert "base_model" not in found  # a base that the Hub does not have
    if kind == "base":
        assert parsed.data.license == "apache-2.0"
    else:
        (result,) = parsed.data.eval_results or []
        assert (result.metric_type, result.metric_value) == ("accuracy", 0.75)
        assert version.base and version.base in text
        assert "team/base:1  base  licence apache\\-2.0" in text or "base  licence apache-2.0" in text
    assert version.digest in text
    assert card(filled, version, "org/model") == text


def test_a_base_on_the_hub_is_named(filled: Registry, tmp_path: Path) -> None:
    version, base = filled.resolve("team/adapter:1"), HubModel("org/base", "0" * 40)
    found = load(card(filled, version, "org/model", base), tmp_path)
    assert (found["base_model"], found["base_model_relation"]) == ("org/base", "adapter")
    found = load(card(filled, version, "org/model", base, merged=True), tmp_path)
    assert (found["base_model_relation"], found["library_name"]) == ("merge", "transformers")


def test_data_licences_and_evaluations_are_told(registry: Registry, made: Folders, tmp_path: Path) -> None:
    data = [
        {"path": "org/dialogues", "sha256": None, "licence": "cc-by-4.0", "rows": 7, "subset": None, "split": "train"},
        {"path": "mine.jsonl", "sha256": "ab" * 32, "licence": None, "rows": 3},
    ]
    details = {"licence": "LicenseRef-Our Own 1", "data": data, "metrics": {"eval": {"loss": 1.5}, "bad": float("nan")}}
    version = publish(registry, made.base, details)
    attestations.attest(registry, version.digest, "evaluation", {"metrics": {"win_rate": 0.625}}, by="ann")
    text = card(registry, version, "org/model")
    found = load(text, tmp_path)
    assert (found["license"], found["license_name"]) == ("other", "licenseref-our-own-1")
    assert found["datasets"] == ["org/dialogues"]
    (result,) = found["model-index"][0]["results"]
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [("eval/loss", 1.5), ("win_rate", 0.625)]
    assert re.search(r"\| org/dialogues \| cc-by-4.0 \| 7 \|", text)
    assert re.search(r"\| mine.jsonl \| unknown \| 3 \|", text)
    assert re.search(r"\| win\\_rate \| 0.625 \| an evaluation of \d{4}-\d\d-\d\d \|", text)
    assert "ann" not in re.findall(r"\w+", text)  # a person's name is not for the public


def test_text_from_outside_stays_text(registry: Registry, made: Folders, tmp_path: Path) -> None:
    details = {
        "licence": HOSTILE[5],
        "data": [{"path": text, "licence": text, "split": "train"} for text in HOSTILE] + ["not a dict"],
        "metrics": {text: number for number, text in enumerate(HOSTILE)} | {"text": HOSTILE[0]},
        "recipe": {text: {"deep": [text]} for text in HOSTILE},
    }
    version = publish(registry, made.base, details)
    text = card(registry, version, "org/model")
    found = load(text, tmp_path)
    assert set(found) == {"library_name", "pipeline_tag", "tags", "license", "license_name", "model-index", "baton"}
    assert found["license"] == "other" and re.fullmatch(r"[a-z0-9.+-]+", found["license_name"])
    metrics = found["model-index"][0]["results"][0]["metrics"]
    assert sorted(m["name"] for m in metrics) == sorted(clean(each) for each in HOSTILE)
    ModelCard(text)
    html = str(markdown(text))
    assert "<script" not in html and "<img" not in html and "<a" not in html and "<h1" not in html
    # what it has of headings is ours alone, and every metric is a row of one table
    assert len(re.findall(r"<h[2-6]>", html)) == 7
    for each in HOSTILE:
        assert clean(each) in _text_of(html)
    assert len(re.findall(r"<table>", html)) == 3


def _text_of(html: str) -> str:
    from html import unescape

    return clean(unescape(re.sub(r"<[^>]*>", "", html)))


def test_escapes_by_hand() -> None:
    assert inline("a|b\n*c* <d> www.e.f") == r"a\|b \*c\* \<d\> www\.e.f"
    assert clean(" a\u202e\tb\x00\n ") == "a b"
    assert block("x\n```\ny") == "````\nx\n```\ny\n````"
    assert table(["h"], [["a|b"]]) == "| h |\n| --- |\n| a\\|b |"
    assert table(["h"], []) == ""
    assert flatten({"a": {"b": 1}, "c": 2}, "/") == {"a/b": 1, "c": 2}
    assert flatten("nothing", "/") == {}


@pytest.mark.parametrize(("kind", "merged"), [("base", 0), ("adapter", 0), ("reward", 0), ("value", 0), ("reward", 1)])
def test_the_loading_code_loads_this_model(filled: Registry, tmp_path: Path, kind: str, merged: int) -> None:
    """The code, run on what `get` gives, reproduces the version's probe."""
    from baton.registry import probe

    version = filled.resolve(f"team/{kind}:1")
    folder = tmp_path / "FOLDER"
    filled.merge(version, folder) if merged else filled.materialise(version, folder)
    names: dict[str, Any] = {}
    code = loading_code(version, "FOLDER", None, bool(merged)).replace("FOLDER", str(folder))
    exec(code, names)
    found = probe.outputs(names["model"].float().eval(), version.manifest["probe"])
    expected = version.manifest["probe"]["expected"]
    # the base is bfloat16, and what is merged, or loaded beside it, is rounded to 8 bits of mantissa
    assert found[0][-1] == pytest.approx(expected[0][-1], rel=0.03, abs=0.02)
    assert len(names["tokenizer"]) == version.manifest["vocabulary"]["size"]
