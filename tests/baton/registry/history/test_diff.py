"""Differences of manifests: every section, by hand."""

from typing import Any

from baton.registry import Registry
from baton.registry.history.diff import SECTIONS, Entry, diff


def test_every_section(registry: Registry, plant: Any) -> None:
    first, second = plant("team/base", licence="mit"), plant("team/base", licence="apache-2.0")
    entry = {"path": "model.safetensors", "sha256": "1" * 64, "size": 1000}
    a = plant(
        "team/m",
        "adapter",
        first,
        {"sft": first},
        recipe={"stage": "sft", "train": {"steps": 4, "seed": 1}, "targets": ["q", "v"]},
        data=[{"path": "a.jsonl", "use": "train", "rows": 10, "licence": "mit"}],
        packages={"torch": "2.11", "peft": "0.21"},
        metrics={"loss": 2.0, "answers": {"known": 0.5}, "gone": 1},
        licence="mit",
        files=[entry, {"path": "config.json", "sha256": "2" * 64, "size": 5}],
        code={"baton": "1.0", "commit": "aaa", "dirty": False},
    )
    b = plant(
        "team/m",
        "adapter",
        second,
        {"sft": second},
        recipe={"stage": "sft", "train": {"steps": 6, "seed": 1, "eps": 1e-8}, "targets": ["q"]},
        data=[
            {"path": "a.jsonl", "use": "train", "rows": 12, "licence": "mit"},
            {"path": "a.jsonl", "use": "train", "rows": 3},
        ],
        packages={"torch": "2.12", "peft": "0.21"},
        metrics={"loss": 1.25, "answers": {"known": 0.75}},
        licence="mit",
        files=[entry | {"sha256": "3" * 64}, {"path": "config.json", "sha256": "2" * 64, "size": 5}],
        architecture={"class": "LlamaForCausalLM", "num_layers": 3},
        code={"baton": "1.0", "commit": "bbb", "dirty": False},
    )
    found = diff(registry, a, b, with_weights=False)
    assert (found.a, found.b, found.weights) == ("team/m:1", "team/m:2", None)
    assert found.sections == {
        "version": [
            Entry("base", "changed", "team/base:1", "team/base:2"),
            Entry("parent sft", "changed", "team/base:1", "team/base:2"),
        ],
        "recipe": [
            Entry("targets", "changed", ["q", "v"], ["q"]),
            Entry("train.eps", "added", None, 1e-8),
            Entry("train.steps", "changed", 4, 6),
        ],
        "data": [
            Entry("train a.jsonl.rows", "changed", 10, 12),
            Entry("train a.jsonl #2", "added", None, {"rows": 3}),
        ],
        "packages": [
            Entry("code.commit", "changed", "aaa", "bbb"),
            Entry("torch", "changed", "2.11", "2.12"),
        ],
        "metrics": [
            Entry("answers.known", "changed", 0.5, 0.75),
            Entry("gone", "removed", 1, None),
            Entry("loss", "changed", 2.0, 1.25),
        ],
        "licences": [
            Entry("of data", "changed", ["MIT"], ["MIT", "unknown"]),
            Entry("of models", "changed", ["MIT"], ["Apache-2.0", "MIT"]),
        ],
        "architecture": [Entry("num_layers", "changed", 2, 3)],
        "files": [
            Entry("model.safetensors", "changed", "111111111111… 1,000 bytes", "333333333333… 1,000 bytes"),
        ],
    }
    assert [entry.difference for entry in found.sections["metrics"]] == [0.25, None, -0.75]


def test_a_list_of_sections_is_compared_by_position(registry: Registry, plant: Any) -> None:
    one = {"reward": [{"model": "x", "weight": 1.0}, {"model": "y"}], "flag": True, "null": None, "set": None}
    a = plant("team/m", recipe=one | {"unset": 3, "list": [{"x": 1}]})
    two = {"reward": [{"model": "x", "weight": 2.0}], "flag": 1, "set": 2, "unset": None, "ppo": {"lam": 1}}
    b = plant("team/m", recipe=two | {"list": []})
    assert diff(registry, a, b, with_weights=False).sections["recipe"] == [
        Entry("flag", "changed", True, 1),
        Entry("list", "changed", [{"x": 1}], []),
        Entry("ppo", "added", None, {"lam": 1}),
        Entry("reward.0.weight", "changed", 1.0, 2.0),
        Entry("reward.1", "removed", {"model": "y"}, None),
        Entry("set", "changed", None, 2),
        Entry("unset", "changed", 3, None),
    ]


def test_a_version_does_not_differ_from_itself(registry: Registry, plant: Any) -> None:
    version = plant("team/m", metrics={"loss": 2.0})
    found = diff(registry, version, version)
    assert found.sections == {section: [] for section in SECTIONS}
    assert found.weights is not None and found.weights.compared == "the same files"
