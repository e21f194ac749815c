"""The shipped recipes are valid, and the READMEs say what there is: every key with its default, commands that work."""

import re
import shlex
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from baton.chain import Options, plan, recipe_files, route_overrides
from baton.corpus_sections import CorpusSource
from baton.data.formats import SERVES
from baton.errors import UserError
from baton.launch import PROGRAMS, config_value
from baton.ppo_sections import RewardSource
from baton.recipe import RECIPES, PPORecipe, Recipe, Source, Train, TrainedRecipe, load_recipe
from baton.registry import Registry
from baton.train_sections import GuardedTrain
from tests.conftest import run_stage

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes"
SHIPPED = sorted(FOLDER.glob("*/*.yaml"))
README = (FOLDER / "README.md").read_text(encoding="utf-8")
REGISTRY = (ROOT / "baton" / "registry" / "README.md").read_text(encoding="utf-8")
REWARD = (ROOT / "reward" / "README.md").read_text(encoding="utf-8")
BOTH = (ROOT / "README.md").read_text(encoding="utf-8") + README + REGISTRY + REWARD
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", BOTH, re.MULTILINE | re.DOTALL)
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!^## )[\s\S])*)", README, re.MULTILINE))


def documented(section: str) -> dict[str, str]:
    """key -> default, as the section's table of keys gives them."""
    own = SECTIONS[section].split("\n### Text\n")[0]  # a table of what only its sources have follows
    rows = re.findall(r"^\| `([^`]+)` \|[^|]+\| (required|`[^`]+`) \| .+ \|$", own, re.MULTILINE)
    assert rows and len(dict(rows)) == len(rows), section
    return {key: default.strip("`") for key, default in rows}


def commands() -> list[list[str]]:
    """Every command of both READMEs as words; comments and what only stands for more are left out."""
    found = []
    for text in [text for language, text in BLOCKS if language in ("", "bash")]:
        waiting = ""
        for line in text.replace("\\\n", " ").splitlines():
            waiting += re.sub(r"(^|\s+)#.*", "", line) + "\n"
            try:
                words = shlex.split(waiting)
            except ValueError:
                continue  # a quotation goes on in the next line
            found.append([word for word in words if word != "…"])
            waiting = ""
    return found


def sections_of(annotation: Any) -> type[BaseModel] | None:
    """The model of a section, optional ones included; None for a value, a list or a reward, which has its own table."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return None if annotation is RewardSource else annotation
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
    assert folders == {"micro", "ladder", "smollm2", "nplus", "lora-1gpu", "rule-reward"}
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
    if folder.name == "ladder":  # by itself: it launches a pretraining for each of its sizes
        trained.add("ladder")
    assert len(published) == len(trained) >= (1 if "ladder" in trained else 3)


def test_registries_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_REGISTRY", "/elsewhere")
    assert {load_recipe(path).registry for path in SHIPPED if path.stem != "world"} == {"/elsewhere"}


@pytest.mark.parametrize("stage", RECIPES)
def test_every_key_is_documented_with_its_default_and_no_other(stage: str) -> None:
    model: type[Recipe] = RECIPES[stage]
    said = documented("Keys of every stage")
    if issubclass(model, TrainedRecipe):
        said |= documented("Keys of every stage that publishes")
        if stage != "ladder":  # whose `train` is that of each of its sizes
            said |= documented("Keys of every training")
        if stage in ("pretrain", "sft", "reward"):
            said |= documented("Keys of pretrain, sft and reward")
    said |= documented(stage)
    keys = keys_of(model)
    assert sorted(said) == sorted(keys)
    wrong = {key: (said[key], field) for key, field in keys.items() if not defaults_agree(field, said[key])}
    assert wrong == {}


def test_shared_tables_hold_what_is_shared() -> None:
    assert set(documented("Keys of every stage")) == set(Recipe.model_fields)
    assert {key.removeprefix("train.") for key in documented("Keys of every training")} == set(Train.model_fields)
    by_trainer = {key.split(".")[1] for key in documented("Keys of pretrain, sft and reward")}
    assert by_trainer == set(GuardedTrain.model_fields) - set(Train.model_fields)


def test_the_keys_of_a_source_of_text_are_documented() -> None:
    rows = re.findall(r"^\| `(\w+)` \|[^|]+\| `([^`]+)` \|", SECTIONS["pretrain"].split("### Text")[1], re.MULTILINE)
    own = {name: field for name, field in CorpusSource.model_fields.items() if name not in Source.model_fields}
    assert {name for name, _ in rows} == set(own)
    assert all(defaults_agree(own[name], default) for name, default in rows)


@pytest.mark.parametrize(("section", "model"), [("Sources", Source), ("Rewards", RewardSource)])
def test_the_keys_of_a_source_are_documented(section: str, model: type[BaseModel]) -> None:
    said, keys = documented(section), keys_of(model)
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


def test_every_baton_run_of_the_readmes_is_read() -> None:
    """Each override reaches a key of a shipped recipe, and the recipe stays valid; `mine` is a copy of smollm2."""
    runs = [words[2:] for words in commands() if words[:2] == ["baton", "run"] and words[2].startswith("recipes/")]
    assert len(runs) >= 10
    for folder, *rest in runs:
        options = {word for word in rest if word.startswith("--")}
        assert options <= {"--from", "--only", "--processes", "--config_file"}, rest
        paths = recipe_files(ROOT / folder.replace("/mine", "/smollm2"))
        overrides = [word for word in rest if re.match(r"[\w.]+=", word)]
        for stage, routed in route_overrides(paths, overrides).items():
            load_recipe(paths[stage], routed)


def test_every_launch_of_the_readmes_names_a_program_and_a_valid_recipe() -> None:
    launches = [words for words in commands() if "launch" in words and "-m" in words]
    assert len(launches) >= 3
    for words in launches:
        program, recipe, *overrides = words[words.index("-m") + 1 :]
        stage = next(stage for stage, module in PROGRAMS.items() if module == program)
        if recipe.endswith(".yaml"):
            assert load_recipe(ROOT / recipe, overrides).stage == stage


def test_every_other_baton_command_of_the_readmes_is_read() -> None:
    """By the very parser of the command: each has its arguments, and no option that it does not know."""
    from typer.main import get_command

    from baton.cli import app

    group: Any = get_command(app)
    others = [words[1:] for words in commands() if words[:1] == ["baton"] and words[1] != "run"]
    for name, *rest in others:
        with group.commands[name].make_context(name, rest) as context:
            assert context.params.get("registry", ".baton/registry") == ".baton/registry", rest
    assert {name for name, *_ in others} >= set(group.commands) - {"run"}, "a command that no README shows"


def test_the_gate_of_the_readme_is_read(tmp_path: Path) -> None:
    from baton.registry.trust.gates import load_gate
    from tests.baton.registry.trust.made_up import make_key

    (text,) = [text for language, text in BLOCKS if language == "yaml" and text.startswith("metrics:")]
    (tmp_path / "gate.yaml").write_text(text)
    with pytest.raises(UserError, match="team.pub"):
        load_gate(tmp_path / "gate.yaml")
    make_key(tmp_path, "team")
    gate = load_gate(tmp_path / "gate.yaml")
    assert gate.lineage is not None and gate.approvals is not None and gate.signatures is not None


def test_the_python_of_the_readme_runs(
    tiny_chain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it stands, but for the names of the models and the number of tokens."""
    (code,) = [text for language, text in BLOCKS if language == "python" and "apply_chat_template" in text]
    chain = tiny_chain.copy(tmp_path)
    (tmp_path / ".baton").mkdir()
    (tmp_path / "registry").rename(tmp_path / ".baton" / "registry")
    Registry(tmp_path / ".baton" / "registry").promote("tiny/policy:1", "prod", reason="the example names it so")
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("micro/ppo", "tiny/policy").replace("=40", "=4"), "README.md", "exec"), {})
    assert chain.versions["ppo"].digest in capsys.readouterr().out


def test_benchmarks_of_the_readme_have_the_options_that_it_gives_them() -> None:
    found = [words for words in commands() if words[:1] == ["python"] and any("bench" in word for word in words)]
    assert len(found) == 5
    for words in found:
        name = next(word for word in words if "bench" in word)
        source = (ROOT / (name if name.endswith(".py") else name.replace(".", "/") + ".py")).read_text()
        assert all(f'"{word}"' in source for word in words if word.startswith("--"))


def test_the_example_for_fsdp2_is_a_configuration(tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    (text,) = [text for language, text in BLOCKS if language == "yaml" and "distributed_type: FSDP" in text]
    (tmp_path / "fsdp2.yaml").write_text(text)
    config = load_config_from_file(str(tmp_path / "fsdp2.yaml"))
    assert config.fsdp_config["fsdp_version"] == 2 and config_value(tmp_path / "fsdp2.yaml", "num_processes") == "8"


def test_the_example_rewards_are_valid() -> None:
    (text,) = [text for language, text in BLOCKS if language == "yaml" and "reward:" in text]
    recipe = yaml.safe_load((FOLDER / "micro" / "ppo.yaml").read_text()) | yaml.safe_load(text)
    rewards = PPORecipe.model_validate(recipe | {"run_dir": "x", "registry": "x"}).rewards
    assert [reward.label for reward in rewards] == ["reward", "safety", "no_lists", "judge"]


def test_ppo_learns_from_the_rewards_of_the_readmes(
    tiny_chain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both examples as a person would use them: a file in the current folder, named in the recipe."""
    code = [text for language, text in BLOCKS if language == "python" and text.startswith("def ")]
    assert len(code) == 2
    (tmp_path / "my_rules.py").write_text("\n\n".join(code))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    chain = tiny_chain.unpublished("ppo", tmp_path)
    functions = "{function: 'my_rules:short_and_sure', weight: 0.5, arguments: {most: 2}}"
    functions += ", {function: 'my_rules:no_lists', arguments: {most: 0}}"
    rewards = f"reward=[{{model: 'tiny/reward:candidate'}}, {functions}]"
    run_stage("ppo", chain.recipe("ppo", rewards, "train.steps=1", "data.questions=[]", "samples=0"))
    row = chain.metrics("ppo")[0]
    assert row["reward"] == pytest.approx(
        row["reward/reward"] + 0.5 * row["reward/short_and_sure"] + row["reward/no_lists"]
    )
    assert 2 / 8 <= row["reward/short_and_sure"] <= 1 and row["reward/no_lists"] == 0


def test_every_metric_and_sample_of_ppo_is_documented(tiny_chain: Any) -> None:
    said = set(re.findall(r"`([\w/]+)`", SECTIONS["ppo"]))
    rows = tiny_chain.metrics("ppo")
    rows += [yaml.safe_load(line) for line in (tiny_chain.run_dir("ppo") / "samples.jsonl").read_text().splitlines()]
    written = {re.sub(r"^(answers|mentions)/\w+$", r"\1/GROUP", key.removesuffix("_before")) for r in rows for key in r}
    assert written - said == set() and len(written) > 40
