"""What a stage is built from: where a base lies, which inputs fit, and when a key changes."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from baton import build
from baton.build import ModelSource, build_key, model_source, resolve_inputs, up_to_date
from baton.errors import UserError
from tests.conftest import swap_two_tokens


@pytest.fixture
def chain(tiny_chain: Any, tmp_path: Path) -> Any:
    copied = tiny_chain.copy(tmp_path)
    (tmp_path / "world").unlink()
    shutil.copytree(tiny_chain.root / "world", tmp_path / "world")
    return copied


@pytest.mark.parametrize("reference", ["team/base:main", "team/base:3", "team/base@sha256:" + "0" * 64])
def test_a_registry_reference_is_no_source(tmp_path: Path, reference: str) -> None:
    assert model_source(reference, tmp_path) is None


def test_a_hub_id_needs_its_revision(tmp_path: Path) -> None:
    assert model_source("org/model@abc123", tmp_path) == ModelSource("hub", "org/model", "abc123")
    for incomplete in ("org/model", "org/model@", "model@main"):
        with pytest.raises(UserError, match="neither a folder nor complete"):
            model_source(incomplete, tmp_path)


def test_a_folder_is_looked_for_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(UserError, match="holds no config.json; expected a Hugging Face model folder"):
        model_source("./base", tmp_path)
    (tmp_path / "base" / "config.json").write_text("{}")
    for spelling in ("./base", "base", str(tmp_path / "base")):
        found = model_source(spelling, tmp_path)
        assert found and found.kind == "folder" and Path(found.path) == tmp_path / "base"


@pytest.mark.parametrize("base", ["./nowhere", "/no/where", "~/no-such-folder"])
def test_a_missing_folder_is_never_taken_for_a_reference(tmp_path: Path, base: str) -> None:
    with pytest.raises(UserError, match=f"there is no folder {base}"):
        model_source(base, tmp_path)


def test_a_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file model.gguf"):
        model_source("model.gguf", tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert model_source("model.gguf", tmp_path) == ModelSource("gguf", str(tmp_path / "model.gguf"))


def test_a_source_is_described_by_its_content(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    one, two = (ModelSource("folder", str(tmp_path / name)) for name in ("one", "two"))
    assert one.describe() == two.describe()
    (tmp_path / "two" / "config.json").write_text("{ }")
    assert one.describe() != two.describe()
    assert ModelSource("hub", "a/b", "r1").describe() != ModelSource("hub", "a/b", "r2").describe()


def keys(chain: Any, stage: str, *overrides: str) -> str:
    """The build key of a stage now."""
    recipe = chain.recipe(stage, *overrides)
    return build_key(recipe, resolve_inputs(recipe, chain.registry))


def test_the_keys_cover_recipe_inputs_and_code(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(chain, "sft")
    assert keys(chain, "sft") == before
    assert keys(chain, "sft", "run_dir=/elsewhere") == before
    assert keys(chain, "sft", "train.seed=77") != before
    monkeypatch.setattr(build, "code_digest", lambda: "other code")
    assert keys(chain, "sft") != before


@pytest.mark.parametrize("name", ["dialogues", "dialogues_eval", "questions"])
def test_the_keys_change_with_the_content_of_any_file(chain: Any, name: str) -> None:
    before = keys(chain, "sft")
    path = chain.root / "world" / f"{name}.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert keys(chain, "sft") != before


def test_the_keys_follow_the_version_and_not_its_name(chain: Any) -> None:
    before = keys(chain, "reward", "sft=tiny/sft:1")
    chain.registry.promote("tiny/sft:1", "stable", reason="a test")
    by_alias = chain.recipe("reward", "sft=tiny/sft:stable")
    by_number = chain.recipe("reward", "sft=tiny/sft:1")
    assert resolve_inputs(by_alias, chain.registry).identity() == resolve_inputs(by_number, chain.registry).identity()
    assert keys(chain, "reward", "sft=tiny/policy:1")[0] != before[0]


def test_up_to_date(chain: Any) -> None:
    assert up_to_date(chain.recipe("ppo")) == "tiny/policy:1"
    assert up_to_date(chain.recipe("ppo", "train.seed=99")) is None
    assert up_to_date(chain.recipe("ppo", "sft=tiny/nothing:1")) is None, "the stage itself reports it"
    assert up_to_date(chain.recipe("ppo", f"registry={chain.root / 'none'}")) is None


def test_code_digest_covers_code_and_templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    for package in ("baton", "reward", "stages"):
        (root / package).mkdir(parents=True)
        (root / package / "a.py").write_text("x = 1\n")
    (root / "baton" / "t.jinja").write_text("t")
    monkeypatch.setattr(build, "__file__", str(root / "baton" / "build.py"))
    compute = build.code_digest.__wrapped__
    seen = {compute()}
    (root / "stages" / "a.py").write_text("x = 2\n")
    seen.add(compute())
    (root / "baton" / "t.jinja").write_text("u")
    seen.add(compute())
    (root / "reward" / "a.py").rename(root / "reward" / "b.py")
    seen.add(compute())
    assert len(seen) == 4
    (root / "baton" / "notes.txt").write_text("no code")
    assert compute() in seen


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        (
            "sft",
            "base=tiny/sft:1",
            "tiny/sft:1 is an adapter version; sft trains an adapter on a base.*stages.pretrain",
        ),
        ("reward", "sft=tiny/base:1", "tiny/base:1 is a base version; the reward model goes on.*-m stages.sft"),
        ("reward", "sft=tiny/reward:1", "tiny/reward:1 is a reward version"),
        ("ppo", "sft=tiny/base:1", "tiny/base:1 is a base version; PPO's policy starts from SFT's adapter"),
        ("ppo", "reward=tiny/sft:1", "tiny/sft:1 is an adapter version; PPO needs a reward model.*-m reward.train"),
        ("ppo", "reward=tiny/value:1", "tiny/value:1 is a value version; PPO needs a reward model"),
    ],
)
def test_a_version_of_the_wrong_kind_is_refused(chain: Any, stage: str, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_inputs(chain.recipe(stage, override), chain.registry)


def test_registering_a_base_takes_no_registry_reference(chain: Any) -> None:
    empty = [f"{key}=null" for key in ("data", "tokenizer", "model", "train", "ngram_order")]
    recipe = chain.recipe("pretrain", "mode=load", "base=tiny/base:1", *empty)
    with pytest.raises(UserError, match="is a registry reference, and so registered already"):
        resolve_inputs(recipe, chain.registry)


def test_another_tokenizer_than_the_reward_models_is_refused(chain: Any) -> None:
    ref = chain.republished(swap_two_tokens)
    with pytest.raises(UserError, match=f"tiny/reward:1 has another tokenizer than {ref}.*reward.train"):
        resolve_inputs(chain.recipe("ppo", f"sft={ref}"), chain.registry)


def test_another_chat_template_than_the_reward_models_is_refused(chain: Any) -> None:
    def change_template(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text() + "{# another #}")

    ref = chain.republished(change_template)
    with pytest.raises(UserError, match=f"tiny/reward:1 has another chat template than {ref}"):
        resolve_inputs(chain.recipe("ppo", f"sft={ref}"), chain.registry)
