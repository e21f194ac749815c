"""The shipped recipes are valid, and recipes/README.md says what there is: every key with its default, and no other."""

import re
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from baton.chain import Options, plan
from baton.data.formats import SERVES
from baton.recipe import RECIPES, PPORecipe, Recipe, Source, Train, TrainedRecipe, load_recipe

FOLDER = Path(__file__).parents[1] / "recipes"
SHIPPED = sorted(FOLDER.glob("*/*.yaml"))
README = (FOLDER / "README.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!^## )[\s\S])*)", README, re.MULTILINE))


def documented(section: str) -> dict[str, str]:
    """key -> default, as the section's table of keys gives them."""
    rows = re.findall(r"^\| `([^`]+)` \|[^|]+\| (required|`[^`]+`) \| .+ \|$", SECTIONS[section], re.MULTILINE)
    assert rows and len(dict(rows)) == len(rows), section
    return {key: default.strip("`") for key, default in rows}


def sections_of(annotation: Any) -> type[BaseModel] | None:
    """The model of a section, optional ones included; None for a value or a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is list:
        return None
    return next((found for part in get_args(annotation) if (found := sections_of(part))), None)


def keys_of(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every dotted key of a recipe class, sections walked into."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        section = sections_of(field.annotation)
        found |= keys_of(section, f"{prefix}{name}.") if section else {f"{prefix}{name}": field}
    return found


def defaults_agree(field: FieldInfo, said: str) -> bool:
    if field.is_required() or said == "required":
        return field.is_required() and said == "required"
    default = field.get_default(call_default_factory=True)
    return said == "none" if default is None else yaml.safe_load(said) == default


def test_something_is_shipped() -> None:
    folders = {path.parent.name for path in SHIPPED}
    assert folders == {"micro", "smollm2", "nplus", "lora-1gpu", "rule-reward"}
    for folder in folders:
        assert f"| `{folder}` |" in README


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.stage == path.stem, "a file is named after its stage"
    assert recipe.run_dir == f".baton/runs/{path.parent.name}-{path.stem}"


@pytest.mark.parametrize("folder", sorted({path.parent for path in SHIPPED}), ids=lambda folder: folder.name)
def test_every_shipped_chain_reads_what_it_publishes(folder: Path) -> None:
    published: set[str] = set()
    for link in plan(folder, [], Options()):
        recipe = link.recipe
        refs = [getattr(recipe, role, None) for role in ("base", "sft") if link.stage != "pretrain"]
        refs += [source.model for source in recipe.rewards] if isinstance(recipe, PPORecipe) else []
        for ref in filter(None, refs):
            assert ref in published, f"{link.path}: {ref}"
        if isinstance(recipe, TrainedRecipe):
            published.add(f"{recipe.publish.name}:{recipe.publish.alias}")
    trained = {"pretrain", "sft", "reward", "ppo"} & {path.stem for path in folder.glob("*.yaml")}
    assert len(published) == len(trained) >= 3


def test_registries_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_REGISTRY", "/elsewhere")
    assert {load_recipe(path).registry for path in SHIPPED if path.stem != "world"} == {"/elsewhere"}


@pytest.mark.parametrize("stage", RECIPES)
def test_every_key_is_documented_with_its_default_and_no_other(stage: str) -> None:
    model: type[Recipe] = RECIPES[stage]
    said = documented("Keys of every stage") | documented(stage)
    if issubclass(model, TrainedRecipe):
        said |= documented("Keys of every stage that publishes") | documented("Keys of every training")
    keys = keys_of(model)
    assert sorted(said) == sorted(keys)
    wrong = {key: (said[key], field) for key, field in keys.items() if not defaults_agree(field, said[key])}
    assert wrong == {}


def test_shared_tables_hold_what_is_shared() -> None:
    assert set(documented("Keys of every stage")) == set(Recipe.model_fields)
    assert {key.removeprefix("train.") for key in documented("Keys of every training")} == set(Train.model_fields)


def test_the_keys_of_a_source_are_documented() -> None:
    said, keys = documented("Sources"), keys_of(Source)
    assert sorted(said) == sorted(keys)
    assert [key for key, field in keys.items() if not defaults_agree(field, said[key])] == []


def test_the_formats_are_documented_with_what_they_give() -> None:
    words = {"text": "text", "dialogue": "dialogues", "preference": "preferences", "prompt": "prompts"}
    rows = dict(re.findall(r"^\| `(\w+)` \| .+ \| ([a-z, ]+) \|$", SECTIONS["Sources"], re.MULTILINE))
    assert rows.pop("format") == "gives"
    assert rows == {name: ", ".join(words[kind] for kind in kinds) for name, kinds in SERVES.items()}


def test_the_walk_sees_lists_sections_and_optional_sections() -> None:
    """Else the comparison above would pass on nothing."""
    assert {"data.train", "ppo.lam", "publish_value.name", "train.critic_learning_rate"} <= set(keys_of(PPORecipe))
    assert len(keys_of(PPORecipe)) > 30
