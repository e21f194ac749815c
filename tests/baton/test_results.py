"""The table of results: a row a stage, from the versions' manifests."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from baton.recipe import PPORecipe, Publish, Recipe, SFTRecipe, WorldRecipe
from baton.registry import Registry, Version
from baton.results import format_duration, results_table, stage_lines


def test_each_stage_shows_its_measures_against_what_they_are_compared_with() -> None:
    assert stage_lines("pretrain", {"eval/bits_per_byte": 0.91234, "eval/ngram_bits_per_byte": 1.24}) == [
        ("bits per byte", "0.912", "1.240 n-gram")
    ]
    sft = {"eval/loss": 0.5, "eval/loss_before": 3, "answers/known": 0.93, "answers/known_before": 0.05}
    assert stage_lines("sft", {**sft, "answers/text_only": 0.04, "inventions/unknown": 0.425}) == [
        ("loss", "0.500", "3.000 before"),
        ("known answers", "93.0%", "5.0% before"),
        ("text-only answers", "4.0%", ""),
        ("inventions", "42.5%", ""),
    ]
    assert stage_lines("reward", {"eval/accuracy": 0.981, "eval/accuracy_longer": 0.619}) == [
        ("accuracy", "98.1%", "61.9% longer")
    ]
    ppo = {"eval/reward": 1.4, "eval/reward_before": -0.25, "eval/kl_nats": 3.456, "eval/kl_nats_before": 0.0}
    ppo |= {"eval/length": 21.25, "eval/length_before": 20, "inventions/unknown": 0.1, "inventions/unknown_before": 0.4}
    assert stage_lines("ppo", ppo) == [
        ("reward", "1.400", "-0.250 before"),
        ("KL from SFT, nats", "3.46", ""),
        ("tokens a reply", "21.25", "20.00 before"),
        ("inventions", "10.0%", "40.0% before"),
    ]


def test_ppo_shows_gold_and_the_win_rate_with_its_interval() -> None:
    metrics = {"eval/reward": 1.0, "eval/win_rate": 0.7125, "eval/win_rate_low": 0.6, "eval/win_rate_high": 0.8049}
    metrics |= {"eval/gold": 0.5, "eval/gold_before": 0.125, "eval/gold_se": 0.1, "eval/tie_rate": 0.1}
    assert stage_lines("ppo", metrics) == [
        ("reward", "1.000", ""),
        ("gold reward", "0.500", "0.125 before"),
        ("win rate over SFT", "71.2%", "60.0%–80.5%"),
    ]
    del metrics["eval/win_rate_low"]
    assert stage_lines("ppo", metrics)[2] == ("win rate over SFT", "71.2%", "")


def test_the_ppo_rows_fit_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(tmp_path, create=True)
    metrics = {"eval/reward": -10.123, "eval/reward_before": -12.345, "eval/gold": 0.5, "eval/gold_before": 0.1}
    metrics |= {"eval/win_rate": 1.0, "eval/win_rate_low": 0.9, "eval/win_rate_high": 1.0, "seconds": 7625}
    version = Version("a-team/a-long-name", 12, "sha256:" + "0" * 64, registry)
    monkeypatch.setattr(Registry, "manifest", lambda registry, digest: {"metrics": metrics})
    monkeypatch.setattr(Registry, "resolve", lambda registry, ref: version)
    text = shown([recipe(PPORecipe, tmp_path, Publish(name="a-team/a-long-name"))])
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "-12.345 before" in text and "90.0%–100.0%" in text and "-10.123" in text
    assert "gold reward: by a reward that was never optimised" in text and "win rate: by the" in text


def test_unknown_and_missing_metrics_are_not_shown() -> None:
    assert stage_lines("sft", {"eval/colour": 3.0, "eval/loss": None, "eval/accuracy": 1.0}) == []
    assert stage_lines("world", {"eval/loss": 1.0}) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (185, "3:05"), (7625, "2:07:05")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_the_table_reads_the_version_at_the_alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Registry(tmp_path, create=True)
    metrics = {"eval/loss": 0.5, "eval/loss_before": 1.0, "inventions/unknown": 1.0, "seconds": 95}

    def resolve(registry: Registry, ref: str) -> Version:
        assert ref == "t/sft:best"
        return Version("t/sft", 3, "sha256:" + "0" * 64, registry)

    monkeypatch.setattr(Registry, "resolve", resolve)
    monkeypatch.setattr(Registry, "manifest", lambda registry, digest: {"metrics": metrics})
    text = shown([recipe(SFTRecipe, tmp_path, Publish(name="t/sft", alias="best"))])
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "inventions: replies about unknown people" in text and "n-gram" not in text
    assert "t/sft:3" in text and "1:35" in text and "0.500" in text


def test_stages_without_a_version_have_no_row(tmp_path: Path) -> None:
    Registry(tmp_path, create=True)
    world = WorldRecipe(stage="world", run_dir="r", out="o", people=1, text_only=1, documents=1)
    assert "sft" not in shown([world, recipe(SFTRecipe, tmp_path, Publish(name="t/sft"))])
    assert "sft" not in shown([recipe(SFTRecipe, tmp_path / "nowhere", Publish(name="t/sft"))])


def recipe(kind: type[Recipe], registry: Path, publish: Publish) -> Recipe:
    stage = kind.__name__.removesuffix("Recipe").lower()
    return kind.model_construct(stage=stage, registry=str(registry), run_dir="runs/sft", publish=publish)


def shown(recipes: list[Recipe]) -> str:
    screen = io.StringIO()
    Console(file=screen, width=80).print(results_table(recipes))
    return screen.getvalue()
