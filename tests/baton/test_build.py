"""What a stage is built from: where a base lies, which inputs fit, and when a key changes."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from baton import build
from baton.build import (
    Inputs,
    ModelSource,
    build_key,
    model_source,
    resolve_inputs,
    reward_roles,
    shares_base,
    up_to_date,
)
from baton.chain import Options, plan
from baton.errors import UserError
from baton.registry import Version
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
    assert keys(chain, "reward", "sft=tiny/policy:1") != before


def test_an_sft_that_will_be_dora_is_refused_before_it_is_trained(chain: Any) -> None:
    folder = chain.root / "recipes"
    folder.mkdir()
    for stage in ("sft", "reward", "ppo"):
        shutil.copy(chain.root / f"{stage}.yaml", folder)
    (folder / "world").symlink_to(chain.root / "world")
    dora = ["sft.lora.dora=true", "sft.publish.name=tiny/dora"]
    assert len(plan(folder, dora, Options())) == 3
    for stage, *more in (("reward",), ("ppo", "reward.train.steps=2")):
        with pytest.raises(UserError, match=f"{stage}.yaml: sft: tiny/dora:candidate will be a DoRA adapter .*--merge"):
            plan(folder, [*dora, f"{stage}.sft=tiny/dora:candidate", *more], Options())
    assert len(plan(folder, [*dora, "reward.sft=tiny/dora:candidate", "reward.trained=full"], Options())) == 3


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
        ("ppo", "sft=tiny/base:1", "tiny/base:1 has no chat template: it has not learned to answer.*stages.sft"),
        ("ppo", "sft=tiny/reward:1", "tiny/reward:1 is a reward version; PPO's policy starts from SFT's model"),
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


def test_a_licence_outside_the_allow_list_stops_a_stage_before_it_trains(chain: Any) -> None:
    allowed = ["allowed_licences=[CC0-1.0, mit]", "licence=MIT", "data.eval=[]", "data.questions=[]"]
    train = "data.train=[{{path: world/dialogues.jsonl, licence: {}}}]"
    recipe = chain.recipe("sft", *allowed, train.format("CC-BY-NC-4.0"))
    with pytest.raises(UserError, match=r"sft.yaml: licences outside the allowed ones \(CC0-1.0, mit\)") as caught:
        resolve_inputs(recipe, chain.registry)
    # tiny/base states cc0-1.0 for itself and its training text, and nothing for the texts that it was measured on
    assert [line.strip() for line in str(caught.value).splitlines()[1:-1]] == [
        "data world/dialogues.jsonl (train) has CC-BY-NC-4.0",
        "data world/text_eval.jsonl (eval) of tiny/base:1 states no licence",
        "data world/questions.jsonl (questions) of tiny/base:1 states no licence",
    ]
    allowed[0] = "allowed_licences=[CC0-1.0, mit, unknown]"
    assert resolve_inputs(chain.recipe("sft", *allowed, train.format("mit")), chain.registry).versions


def test_a_base_from_outside_states_no_licence(chain: Any) -> None:
    sources = "data={train: [{path: world/dialogues.jsonl, licence: mit}]}"
    words = ["base=org/model@abc", "licence=mit", sources]
    with pytest.raises(UserError, match="base org/model@abc states no licence"):
        resolve_inputs(chain.recipe("sft", *words, "allowed_licences=[MIT]"), chain.registry)
    assert resolve_inputs(chain.recipe("sft", *words, "allowed_licences=[MIT, unknown]"), chain.registry).model


def change_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "{# another #}")


@pytest.mark.parametrize("change", [swap_two_tokens, change_template])
def test_a_reward_of_another_text_does_not_share_the_base(chain: Any, change: Any) -> None:
    """It is no error: such a reward model is loaded by itself."""
    ref = chain.republished(change)
    versions = resolve_inputs(chain.recipe("ppo", f"sft={ref}"), chain.registry).versions
    assert not shares_base(versions["sft"], versions["reward"])


def scorer(chain: Any, name: str, base: Version | None) -> Version:
    """The tiny reward model again under another name: merged into a whole classifier where `base` is None."""
    folder = chain.root / name.replace("/", "-")
    reward = chain.registry.resolve("tiny/reward:1")
    if base is None:
        chain.registry.merge(reward, folder)
    else:
        chain.registry.materialise(reward, folder)
        shutil.rmtree(folder / "base")
    return chain.registry.publish(folder, name=name, kind="reward", base=base)


def merged_sft(chain: Any) -> Version:
    folder = chain.root / "merged"
    chain.registry.merge(chain.registry.resolve("tiny/sft:1"), folder)
    return chain.registry.publish(folder, name="tiny/merged", kind="merged")


def test_which_rewards_share_the_policys_base(chain: Any) -> None:
    sft, reward = chain.registry.resolve("tiny/sft:1"), chain.registry.resolve("tiny/reward:1")
    assert shares_base(sft, reward) and shares_base(sft, chain.registry.resolve("tiny/value:1"))
    merged = merged_sft(chain)
    assert not shares_base(merged, reward), "the reward's adapter sits on the raw base"
    on_merged = scorer(chain, "tiny/on-merged", merged)
    assert shares_base(merged, on_merged) and not shares_base(sft, on_merged)
    whole = scorer(chain, "tiny/whole", None)
    assert whole.base is None and not shares_base(sft, whole) and not shares_base(merged, whole)


LORA = "lora={r: 2, alpha: 4}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sft=tiny/sft:1", LORA], "ppo.yaml: lora: tiny/sft:1 is an adapter, .*would be ignored. Leave lora out"),
        (["sft=tiny/merged:1"], "ppo.yaml: tiny/merged:1 is a merged version.*needs its settings.*lora: {r: 16"),
        (["sft=tiny/classifier:1", LORA], "tiny/classifier:1 is a classifier and writes no text"),
    ],
)
def test_what_the_policy_starts_from(chain: Any, overrides: list[str], message: str) -> None:
    merged_sft(chain)
    folder = chain.root / "classifier"
    chain.registry.merge(chain.registry.resolve("tiny/reward:1"), folder)
    chain.registry.publish(folder, name="tiny/classifier", kind="merged")
    with pytest.raises(UserError, match=message):
        resolve_inputs(chain.recipe("ppo", *overrides), chain.registry)
    for fine in (["sft=tiny/merged:1", LORA], ["sft=tiny/merged:1", "policy=full"], ["policy=full"]):
        assert set(resolve_inputs(chain.recipe("ppo", *fine), chain.registry).versions) == {"sft", "reward"}


def ppo_inputs(chain: Any, rewards: str, *overrides: str) -> Inputs:
    return resolve_inputs(chain.recipe("ppo", f"reward={rewards}", *overrides), chain.registry)


def test_the_roles_of_rewards(chain: Any) -> None:
    rule = "{function: 'reward.rules:exact_answer'}"
    one = ppo_inputs(chain, f"[{rule}, {{model: 'tiny/reward:1', weight: 0.5}}]")
    assert set(one.versions) == {"sft", "reward"}
    scorer(chain, "tiny/whole", None)
    several = "[{model: 'tiny/reward:1'}, {model: 'tiny/whole:1', name: strict}]"
    found = ppo_inputs(chain, several, "gold={model: 'tiny/whole:1'}").versions
    assert {role: version.ref for role, version in found.items()} == {
        "sft": "tiny/sft:1",
        "reward-reward": "tiny/reward:1",
        "reward-strict": "tiny/whole:1",
        "gold": "tiny/whole:1",
    }
    recipe = chain.recipe("ppo", f"reward={several}", "gold={model: 'tiny/whole:1'}")
    roles = [reward_roles(recipe, source) for source in [*recipe.rewards, recipe.gold]]
    assert roles == [["reward-reward"], ["reward-strict"], ["gold"]]
    assert set(ppo_inputs(chain, f"[{rule}]").versions) == {"sft"}
    together = ppo_inputs(
        chain, "[{models: ['tiny/whole:1', 'tiny/reward:1']}]", "gold={model: 'tiny/whole:1'}"
    ).versions
    assert {role: version.ref for role, version in together.items() if role != "sft"} == {
        "reward-1": "tiny/whole:1",
        "reward-2": "tiny/reward:1",
        "gold": "tiny/whole:1",
    }


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ("[{model: 'tiny/sft:1'}]", "tiny/sft:1 is an adapter version; PPO needs a reward model"),
        ("[{model: 'tiny/nothing:1'}]", "no model 'tiny/nothing'"),
        ("[{function: 'nowhere.rules:f'}]", "function: there is no module nowhere.rules"),
        ("[{classifier: './nowhere'}]", "classifier: there is no folder ./nowhere"),
        ("[{classifier: 'tiny/reward:1'}]", "classifier: tiny/reward:1 is a registry reference; write it as model:"),
        ("[{classifier: './model.gguf'}]", "is a GGUF file"),
    ],
)
def test_rewards_that_are_not_there(chain: Any, rewards: str, message: str) -> None:
    (chain.root / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=message):
        ppo_inputs(chain, rewards)
    with pytest.raises(UserError, match=message):
        resolve_inputs(chain.recipe("ppo", f"gold={rewards[1:-1]}"), chain.registry)


def test_the_keys_follow_the_code_of_functions(chain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without running it: importing would raise."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "our_rewards").mkdir()
    for name in ("__init__", "rules", "other"):
        (tmp_path / "our_rewards" / f"{name}.py").write_text("raise RuntimeError\n")
    rewards = "reward=[{function: 'our_rewards.rules:f'}]"
    before = keys(chain, "ppo", rewards)
    (tmp_path / "our_rewards" / "other.py").write_text("x = 1\n")
    assert keys(chain, "ppo", rewards) == before
    (tmp_path / "our_rewards" / "rules.py").write_text("x = 1\n")
    assert keys(chain, "ppo", rewards) != before


@pytest.mark.parametrize("use", ["reward=[{}]", "gold={}"])
def test_the_keys_follow_the_files_of_classifiers(chain: Any, use: str) -> None:
    folder = chain.root / "judge"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    override = use.replace("{}", "{classifier: ./judge}")
    before = keys(chain, "ppo", override)
    (folder / "config.json").write_text("{ }")
    assert keys(chain, "ppo", override) != before


def test_the_keys_follow_what_is_mixed_in(chain: Any) -> None:
    (chain.root / "mixed.jsonl").write_text('{"text": "a"}\n')
    overrides = ["data.ptx=[{path: mixed.jsonl}]", "ppo.ptx_coefficient=0.1"]
    before = keys(chain, "ppo", *overrides)
    (chain.root / "mixed.jsonl").write_text('{"text": "b"}\n')
    assert keys(chain, "ppo", *overrides) != before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward=[{model: 'tiny/reward:1'}, {model: 'tiny/none:1'}]"], "ppo.yaml: reward: .*no model 'tiny/none'"),
        (["gold={model: 'tiny/gone:2'}"], "ppo.yaml: gold: .*no model 'tiny/gone'"),
        (["reward=[{function: 'nowhere.rules:f'}]"], "ppo.yaml: reward: function: there is no module nowhere.rules"),
        (["gold={classifier: './nowhere'}"], "ppo.yaml: gold: classifier: there is no folder"),
    ],
)
def test_a_chain_asks_for_every_reward_before_its_first_stage(chain: Any, overrides: list[str], message: str) -> None:
    assert len(plan(chain.root, [], Options())) == 4
    with pytest.raises(UserError, match=message):
        plan(chain.root, [f"ppo.{override}" for override in overrides], Options())
