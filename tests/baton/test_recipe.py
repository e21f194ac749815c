"""Recipes: what is refused and how it is said, overrides, interpolation, and what the digest covers."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from baton.errors import UserError
from baton.recipe import PPORecipe, PretrainRecipe, Recipe, SFTRecipe, load_recipe

TRAIN = {"steps": 5, "learning_rate": 0.001}
TOKENS = {**TRAIN, "tokens_per_batch": 256, "sequence_length": 64}
DATA = {"train": [{"path": "a.jsonl"}], "eval": [{"path": "b.jsonl"}]}
KEPT = {"run_dir": "runs/x", "publish": {"name": "t/x"}}
RECIPES: dict[str, dict[str, Any]] = {
    "world": {"stage": "world", "run_dir": "r", "out": "w", "people": 3, "text_only": 1, "documents": 9},
    "pretrain": {
        "stage": "pretrain",
        "mode": "scratch",
        **KEPT,
        "data": DATA,
        "tokenizer": {"vocab_size": 400},
        "model": {"hidden_size": 32, "layers": 2, "heads": 4, "intermediate_size": 64},
        "train": TOKENS,
    },
    "sft": {"stage": "sft", **KEPT, "base": "t/b:1", "data": DATA, "lora": {"r": 4}, "train": TOKENS},
    "reward": {
        "stage": "reward",
        **KEPT,
        "sft": "t/s:1",
        "data": DATA,
        "train": {**TRAIN, "pairs_per_batch": 4, "max_length": 99},
    },
    "ppo": {
        "stage": "ppo",
        **KEPT,
        "sft": "t/s:1",
        "reward": "t/r:1",
        "data": DATA,
        "rollout": {"max_new_tokens": 8},
        "ppo": {"epochs": 2},
        "train": {**TRAIN, "episodes_per_batch": 8},
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one valid file a stage."""
    for stage, content in RECIPES.items():
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def refusal(path: Path, *overrides: str, kind: type[Recipe] = Recipe) -> str:
    """What the UserError says."""
    with pytest.raises(UserError) as caught:
        load_recipe(path, list(overrides), kind)
    return str(caught.value)


@pytest.mark.parametrize("stage", RECIPES)
def test_a_valid_recipe_of_each_stage(folder: Path, stage: str) -> None:
    recipe = load_recipe(folder / f"{stage}.yaml")
    assert recipe.stage == stage and recipe.folder == folder


@pytest.mark.parametrize(
    ("stage", "key", "nearest"),
    [
        ("world", "peeple", "people"),
        ("pretrain", "tokeniser.vocab_size", "tokenizer"),
        ("pretrain", "tokenizer.vocab_sise", "vocab_size"),
        ("pretrain", "model.hiden_size", "hidden_size"),
        ("pretrain", "publish.allias", "alias"),
        ("sft", "lora.alfa", "alpha"),
        ("sft", "train.learning_rat", "learning_rate"),
        ("sft", "train.tokens_per_btch", "tokens_per_batch"),
        ("sft", "data.trian", "train"),
        ("reward", "train.pair_per_batch", "pairs_per_batch"),
        ("ppo", "rollout.temprature", "temperature"),
        ("ppo", "ppo.kl_coeficient", "kl_coefficient"),
        ("ppo", "publish_value.nam", "name"),
        ("ppo", "train.episodes_per_bach", "episodes_per_batch"),
    ],
)
def test_a_typo_names_the_file_the_key_and_the_nearest(folder: Path, stage: str, key: str, nearest: str) -> None:
    said = refusal(folder / f"{stage}.yaml", f"{key}=3")
    reported = key if "." not in key or key.split(".")[0] in RECIPES[stage] or "publish_value" in key else "tokeniser"
    assert f"{folder / stage}.yaml: unknown key {reported}; did you mean {nearest}?" in said


def test_a_typo_inside_a_list_of_sources(folder: Path) -> None:
    said = refusal(folder / "sft.yaml", "data.train=[{path: x, wieght: 2}]")
    assert "unknown key data.train.0.wieght; did you mean weight?" in said


def test_a_key_like_no_other_lists_the_valid_ones(folder: Path) -> None:
    assert "unknown key lora.qqqqq; valid here: r, alpha, dropout, targets" in refusal(
        folder / "sft.yaml", "lora.qqqqq=1"
    )


@pytest.mark.parametrize(
    ("stage", "override", "said"),
    [
        ("sft", "train.steps=many", "train.steps is 'many': input should be a valid integer"),
        ("sft", "train.steps=0", "train.steps is 0: input should be greater than 0"),
        ("sft", "train.steps=2.5", "train.steps is 2.5"),
        ("sft", "train.learning_rate=-1", "train.learning_rate is -1"),
        (
            "sft",
            "train.schedule=sine",
            "train.schedule is 'sine': input should be 'constant', 'linear', 'cosine' or 'wsd'",
        ),
        ("sft", "data=3", "data is 3"),
        ("sft", "data.train=[]", "data.train is []: list should have at least 1 item"),
        ("sft", "data.train=[{path: x, format: mesages}]", "data.train.0.format is 'mesages'"),
        ("sft", "data.train=[{path: x, weight: 0}]", "data.train.0.weight is 0"),
        ("sft", "dtype=float16", "dtype is 'float16'"),
        ("sft", "lora.dropout=1.5", "lora.dropout is 1.5"),
        ("pretrain", "tokenizer.vocab_size=299", "tokenizer.vocab_size is 299"),
        ("pretrain", "ngram_order=1", "ngram_order is 1"),
        ("ppo", "ppo.gamma=1.1", "ppo.gamma is 1.1"),
        ("ppo", "rollout.temperature=0", "rollout.temperature is 0"),
        ("ppo", "ppo.kl_budget_nats=0", "ppo.kl_budget_nats is 0"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(folder: Path, stage: str, override: str, said: str) -> None:
    assert f"{folder / stage}.yaml: {said}" in refusal(folder / f"{stage}.yaml", override)


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ("sft", "base"),
        ("sft", "run_dir"),
        ("sft", "publish.name"),
        ("sft", "train.steps"),
        ("sft", "train.sequence_length"),
        ("pretrain", "publish.name"),
        ("pretrain", "mode"),
        ("reward", "train.max_length"),
        ("ppo", "reward"),
        ("ppo", "rollout.max_new_tokens"),
        ("world", "people"),
    ],
)
def test_a_missing_key_is_named(folder: Path, stage: str, key: str) -> None:
    path = folder / f"{stage}.yaml"
    content = yaml.safe_load(path.read_text())
    *sections, last = key.split(".")
    section = content
    for name in sections:
        section = section[name]
    del section[last]
    path.write_text(yaml.safe_dump(content))
    assert refusal(path) == f"{path}: {key} is missing"


def test_a_missing_figure_of_a_shape_is_named(folder: Path) -> None:
    said = refusal(folder / "pretrain.yaml", "model.layers=null")
    assert said == f"{folder / 'pretrain.yaml'}: model: layers missing; give all of hidden_size, layers, heads, " + (
        "intermediate_size, or a size"
    )


def test_several_mistakes_are_told_at_once(folder: Path) -> None:
    said = refusal(folder / "sft.yaml", "train.stepps=3", "dtype=float8", "lora.r=0")
    assert len(said.splitlines()) == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.tokens_per_batch=100", "tokens_per_batch (100) must be a multiple of sequence_length (64)"),
        ("train.tokens_per_micro_batch=65", "tokens_per_micro_batch (65) must be a multiple of sequence_length (64)"),
        ("base=x/y", "mode: scratch takes no base"),
        ("model=null", "mode: scratch needs model"),
    ],
)
def test_values_that_do_not_go_together(folder: Path, override: str, said: str) -> None:
    assert said in refusal(folder / "pretrain.yaml", override)


def test_a_baseline_needs_held_out_text(folder: Path) -> None:
    said = refusal(folder / "pretrain.yaml", "ngram_order=3", "data.eval=[]")
    assert "ngram_order needs data.eval" in said


def test_loading_a_base_refuses_what_it_would_ignore(folder: Path) -> None:
    path = folder / "pretrain.yaml"
    said = refusal(path, "mode=load", "base=./x")
    assert "mode: load trains nothing and would ignore data, tokenizer, model, train" in said
    assert "mode: load needs base" in refusal(path, "mode=load")
    empty = [f"{key}=null" for key in ("data", "tokenizer", "model", "train")]
    assert "would ignore ngram_order" in refusal(path, "mode=load", "base=./x", "ngram_order=3", *empty)
    assert load_recipe(path, ["mode=load", "base=./x", *empty], PretrainRecipe).base == "./x"


def test_the_wrong_program_refuses_a_file(folder: Path) -> None:
    said = refusal(folder / "sft.yaml", kind=PPORecipe)
    assert said == f"{folder / 'sft.yaml'} is a recipe for stage sft; this program runs stage ppo."


@pytest.mark.parametrize("text", ["run_dir: x\n", "stage: [sft]\n", "stage: sfd\n"])
def test_an_unknown_stage(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert "expected one of world, ladder, pretrain, sft, reward, ppo" in refusal(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"stage: [", "is not valid YAML"),
        (b"stage: \xff\xfe", "is not valid YAML"),
        (b"- a\n- b\n", "holds no keys"),
        (b"a: ${nowhere}\nstage: sft\n", "nowhere"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    found = refusal(path)
    assert str(path) in found and said in found


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("")
    assert str(path) in refusal(path)


def test_a_missing_file_names_its_neighbours(folder: Path) -> None:
    assert "sft.yaml" in refusal(folder / "stf.yaml")
    assert refusal(folder / "nowhere" / "sft.yaml") == f"no recipe at {folder / 'nowhere' / 'sft.yaml'}"


def test_overrides_reach_nested_keys_and_whole_lists(folder: Path) -> None:
    recipe = load_recipe(
        folder / "sft.yaml",
        [
            "train.steps=7",
            "lora.targets=[q_proj, v_proj]",
            "data.train=[{path: c.jsonl, rows: [null, 5]}, {path: d, weight: 2}]",
            "train.learning_rate=1e-3",
            "publish={name: t/other}",
        ],
        SFTRecipe,
    )
    assert recipe.train.steps == 7 and recipe.train.learning_rate == 0.001
    assert recipe.lora.targets == ["q_proj", "v_proj"] and recipe.lora.r == 4
    assert [(s.path, s.rows, s.weight) for s in recipe.data.train] == [("c.jsonl", (None, 5), 1.0), ("d", None, 2.0)]
    assert recipe.publish.name == "t/other"


def test_an_allow_list_has_one_licence_an_entry(folder: Path) -> None:
    assert load_recipe(folder / "sft.yaml", ["allowed_licences=[mit, unknown]"]).allowed_licences == ["mit", "unknown"]  # type: ignore[attr-defined]
    assert "'MIT OR Apache-2.0' is not one licence" in refusal(
        folder / "sft.yaml", "allowed_licences=[MIT OR Apache-2.0]"
    )


@pytest.mark.parametrize("override", ["train.steps", "--train.steps=3", "=3"])
def test_an_override_that_is_no_assignment(folder: Path, override: str) -> None:
    assert "is not key=value" in refusal(folder / "sft.yaml", override)


def test_interpolation_of_keys_and_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "sft.yaml"
    content = {**RECIPES["sft"], "registry": "${oc.env:BATON_REGISTRY,.baton/registry}", "run_dir": "runs/${stage}"}
    path.write_text(yaml.safe_dump(content))
    monkeypatch.delenv("BATON_REGISTRY", raising=False)
    assert load_recipe(path).registry == ".baton/registry"
    monkeypatch.setenv("BATON_REGISTRY", "/elsewhere")
    recipe = load_recipe(path)
    assert recipe.registry == "/elsewhere" and recipe.run_dir == "runs/sft"


def test_a_recipe_is_never_written_back(folder: Path) -> None:
    recipe = load_recipe(folder / "sft.yaml", kind=SFTRecipe)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 9  # type: ignore[misc]


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("sft", "base=t/b:2"),
        ("sft", "dtype=float32"),
        ("sft", "licence=mit"),
        ("sft", "chat_template=keep"),
        ("sft", "publish.name=t/y"),
        ("sft", "lora.r=5"),
        ("sft", "lora.alpha=5"),
        ("sft", "lora.dropout=0.5"),
        ("sft", "lora.targets=[q_proj]"),
        ("sft", "train.steps=6"),
        ("sft", "train.seed=6"),
        ("sft", "train.learning_rate=0.002"),
        ("sft", "train.schedule=linear"),
        ("sft", "train.warmup_steps=1"),
        ("sft", "train.weight_decay=0.1"),
        ("sft", "train.adam_beta2=0.9"),
        ("sft", "train.max_grad_norm=2"),
        ("sft", "train.tokens_per_batch=128"),
        ("sft", "train.sequence_length=32"),
        ("sft", "data.train=[{path: c.jsonl}]"),
        ("sft", "data.train=[{path: a.jsonl, weight: 2}]"),
        ("sft", "data.train=[{path: a.jsonl, rows: [0, 3]}]"),
        ("pretrain", "tokenizer.vocab_size=500"),
        ("pretrain", "model.layers=3"),
        ("pretrain", "model.tie_embeddings=false"),
        ("pretrain", "ngram_order=3"),
        ("reward", "train.max_length=100"),
        ("reward", "train.pairs_per_batch=5"),
        ("ppo", "ppo.kl_coefficient=0.1"),
        ("ppo", "ppo.epochs=3"),
        ("ppo", "ppo.whiten_advantages=false"),
        ("ppo", "ppo.missing_eos_penalty=0"),
        ("ppo", "rollout.temperature=0.5"),
        ("ppo", "rollout.max_new_tokens=9"),
        ("ppo", "train.critic_learning_rate=0.5"),
        ("ppo", "publish_value.name=t/v"),
    ],
)
def test_the_digest_changes_with_what_changes_the_result(folder: Path, stage: str, override: str) -> None:
    path = folder / f"{stage}.yaml"
    assert load_recipe(path, [override]).digest() != load_recipe(path).digest()


def test_the_digest_leaves_out_where_it_runs(folder: Path, tmp_path: Path) -> None:
    before = load_recipe(folder / "sft.yaml").digest()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = elsewhere / "renamed.yaml"
    moved.write_text("# a comment\n" + (folder / "sft.yaml").read_text())
    changed = ["registry=/r", "run_dir=/d", "processes=4", "allowed_licences=[MIT]"]
    assert load_recipe(moved, changed).digest() == before
    assert load_recipe(moved, ["lora.alpha=32", "train.seed=0"]).digest() == before, "a default that is written out"
