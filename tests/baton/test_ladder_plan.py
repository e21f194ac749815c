"""What a ladder's recipe makes of each size, before anything is trained."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from baton.errors import UserError
from baton.ladder_plan import plan_rungs, too_short, write_recipe
from baton.recipe import LadderRecipe, PretrainRecipe, load_recipe
from baton.scaling import learning_rate, tokens_per_batch

RECIPE = """
stage: ladder
publish: {{name: tiny/ladder, alias: main}}
registry: {root}/registry
run_dir: {root}/runs/ladder
dtype: float32
data: {{train: [{{path: text.txt, weight: 2}}], eval: [{{path: held_out.txt}}]}}
tokenizer: {{vocab_size: 400}}
sizes:
  - {{name: a, model: {{hidden_size: 16, layers: 1, heads: 2, intermediate_size: 32}}}}
  - {{name: b, model: {{hidden_size: 32, layers: 1, heads: 2, intermediate_size: 64}}}}
  - {{name: c, model: {{hidden_size: 32, layers: 2, heads: 2, intermediate_size: 64}}}}
  - {{name: d, model: {{hidden_size: 32, layers: 3, heads: 2, kv_heads: 1, intermediate_size: 64}}, train: {{seed: 9}}}}
tokens_per_parameter: 2
train: {{sequence_length: 64, weight_decay: 0.1}}
"""


@pytest.fixture
def read(tmp_path: Path) -> Any:
    (tmp_path / "recipes").mkdir()
    for name in ("text", "held_out"):
        (tmp_path / "recipes" / f"{name}.txt").write_text("Some text.\n")

    def read(*overrides: str, edit: str = "", to: str = "") -> LadderRecipe:
        path = tmp_path / "recipes" / "ladder.yaml"
        text = RECIPE.format(root=tmp_path)
        assert edit in text
        path.write_text(text.replace(edit, to, 1))
        return load_recipe(path, list(overrides), LadderRecipe)

    return read


def test_tokens_compute_and_steps_by_hand(read: Any) -> None:
    plan = plan_rungs(read("train.tokens_per_batch=128", "train.learning_rate=0.01"))[0]
    assert plan.parameters == 4 * 16 * 16 + 3 * 16 * 32 + 400 * 16  # 8,960
    assert plan.content["train"]["steps"] == 140  # 2 * 8960 / 128
    assert plan.tokens == 140 * 128
    assert plan.flops == 140 * 128 * (6 * 8960 + 12 * 1 * 16 * 64)
    assert plan.content["train"]["learning_rate"] == 0.01
    assert plan.content["train"]["warmup_steps"] == 7


def test_learning_rate_and_batch_follow_from_compute(read: Any) -> None:
    plans = plan_rungs(read("tokens_per_parameter=2000"))
    for plan in plans:
        train = plan.content["train"]
        assert train["learning_rate"] == pytest.approx(learning_rate(plan.flops), rel=0.01)
        assert train["tokens_per_batch"] % 256 == 0
        assert train["tokens_per_batch"] == pytest.approx(tokens_per_batch(plan.flops), abs=140)
    assert plans[-1].content["train"]["learning_rate"] < plans[0].content["train"]["learning_rate"]


def test_a_size_overrides_the_ladder(read: Any) -> None:
    plans = plan_rungs(read())
    assert [plan.content["train"].get("seed") for plan in plans] == [None, None, None, 9]
    assert {plan.content["train"]["weight_decay"] for plan in plans} == {0.1}
    # with one head of two for keys and values a layer has 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 = 9,216
    assert plans[3].parameters == 3 * 9216 + 400 * 32


def test_more_tokens_a_parameter_are_more_steps(read: Any) -> None:
    few, many = (plan_rungs(read("train.tokens_per_batch=64", f"tokens_per_parameter={n}"))[0] for n in (2, 6))
    assert many.content["train"]["steps"] == 3 * few.content["train"]["steps"]


def test_a_constant_schedule_has_no_warm_up(read: Any) -> None:
    assert plan_rungs(read("train.schedule=constant"))[0].content["train"]["warmup_steps"] == 0
    assert plan_rungs(read("train.warmup_steps=3"))[0].content["train"]["warmup_steps"] == 3


def test_the_written_recipe_is_the_size_s(read: Any, tmp_path: Path) -> None:
    recipe = read()
    plan = plan_rungs(recipe)[1]
    path = write_recipe(recipe, plan)
    assert path == tmp_path / "runs" / "ladder" / "b" / "recipe.yaml"
    written = load_recipe(path, [], PretrainRecipe)
    assert written.publish.name == "tiny/ladder-b" and written.publish.alias == "main"
    assert written.dtype == "float32" and written.registry == str(tmp_path / "registry")
    assert written.model is not None and written.model.hidden_size == 32
    assert written.data is not None and written.data.train[0].weight == 2
    found = written.folder / written.data.train[0].path
    assert found.resolve() == tmp_path / "recipes" / "text.txt" and not Path(written.data.train[0].path).is_absolute()
    assert "subset" not in yaml.safe_load(path.read_text())["data"]["train"][0]  # for hub ids alone


def test_only_the_last_size_writes_samples(read: Any) -> None:
    assert [plan.content.get("continuations") for plan in plan_rungs(read())] == [0, 0, 0, None]


def test_a_size_by_its_preset(read: Any) -> None:
    shape = "{hidden_size: 32, layers: 3, heads: 2, kv_heads: 1, intermediate_size: 64}"
    plan = plan_rungs(read("tokens_per_parameter=20", edit=shape, to="{size: 2M}"))[3]
    assert plan.parameters == pytest.approx(2e6, rel=0.15)
    assert plan.content["model"] == {"size": "2M"}
    assert plan.content["train"]["learning_rate"] == pytest.approx(learning_rate(plan.flops), rel=0.01)


def test_short_trainings_are_named(read: Any) -> None:
    plans = plan_rungs(read("train.tokens_per_batch=64"))
    assert [plan.content["train"]["steps"] for plan in plans] == [280, 720, 1040, 1264]  # of 2 tokens a parameter / 64
    assert too_short(plans) == ["a", "b"]


def test_absolute_paths_and_hub_ids_stay(read: Any, tmp_path: Path) -> None:
    text = tmp_path / "recipes" / "text.txt"
    recipe = read(f"data.train=[{{path: {text}}}, {{path: some/dataset, subset: en}}]")
    content = yaml.safe_load(write_recipe(recipe, plan_rungs(recipe)[0]).read_text())
    assert [source["path"] for source in content["data"]["train"]] == [str(text), "some/dataset"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=5", "train.steps follows from tokens_per_parameter"),
        ("train.sequence_length=null", "train.sequence_length is missing"),
        ("train.learning_rat=1", "did you mean learning_rate"),
        ("data.eval=[]", "needs data.eval"),
        ("tokens_per_parameter=0", "tokens_per_parameter"),
        ("train.tokens_per_batch=100", "multiple of sequence_length"),
    ],
)
def test_mistakes_in_the_recipe(read: Any, override: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        read(override)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("edit", "to", "said"),
    [
        ("name: b", "name: a", "two sizes are called a"),
        ("name: b", "name: a b", "bad name"),
        (
            "layers: 1, heads: 2, intermediate_size: 64",
            "layers: 1, heads: 3, intermediate_size: 64",
            "hidden_size (32)",
        ),
        ("train: {seed: 9}", "train: {steps: 9}", "sizes.d.train.steps follows"),
        ("train: {seed: 9}", "train: {seeds: 9}", "did you mean seed"),
    ],
)
def test_mistakes_in_a_size(read: Any, edit: str, to: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        read(edit=edit, to=to)
    assert said in str(error.value)


def test_the_predicted_size_is_the_largest(read: Any) -> None:
    with pytest.raises(UserError, match="order the sizes by compute"):
        plan_rungs(read(edit="layers: 3, heads: 2, kv_heads: 1", to="layers: 1, heads: 2, kv_heads: 1"))


def test_too_few_sizes(read: Any) -> None:
    line = "  - {name: c, model: {hidden_size: 32, layers: 2, heads: 2, intermediate_size: 64}}\n"
    with pytest.raises(UserError, match="sizes"):
        read(edit=line)


def test_a_size_has_no_dotted_override(read: Any) -> None:
    with pytest.raises(UserError, match="whole list"):
        read("sizes.1.name=x")
