"""A run's parts together: who plays which role, held-out measurements, which weights are published."""

import shutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from baton.errors import UserError
from baton.run import Run
from stages.held_out import HeldOut
from stages.roles import POLICY, REFERENCE
from stages.session import Session, cast_of


@pytest.fixture(scope="module")
def chain(tiny_chain: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_chain.unpublished("ppo", tmp_path_factory.mktemp("session"))


@pytest.fixture
def session(chain: Any) -> Iterator[Session]:
    """The tiny chain's, at its start; a test may train it."""
    opened = Session.open(Run.start(chain.recipe("ppo", "data.questions=[]", "samples=0")))
    yield opened
    opened.engine.close()


def move(session: Session, by: float = 0.02) -> None:
    with torch.no_grad():
        for parameter in session.updater.parameters.values():
            parameter += by


def test_the_cast(chain: Any) -> None:
    cast = cast_of(Run.start(chain.recipe("ppo", "data.questions=[]")))
    assert cast.sft == chain.folder("sft") and cast.base == chain.folder("pretrain")
    assert cast.rewards == {"reward": [chain.folder("reward")]} and cast.critic_start == chain.folder("reward")
    assert (cast.policy, cast.critic, cast.lora) == ("adapter", "adapter", None)
    changes = ("data.questions=[]", "ppo.critic=shared", "policy=full", "publish_value=null")
    shared = cast_of(Run.start(chain.recipe("ppo", *changes)))
    assert shared.critic_start is None and (shared.policy, shared.critic) == ("full", "shared")
    # gold is aboard, but the critic never starts from what PPO must not see
    gold = ["reward=[{function: 'reward.rules:length_window', arguments: {at_most: 5}}]"]
    seen = cast_of(Run.start(chain.recipe("ppo", "data.questions=[]", *gold, "gold={model: 'tiny/reward:candidate'}")))
    assert set(seen.rewards) == {"gold"} and seen.critic_start is None


def test_before_the_first_update_the_policy_is_the_reference(session: Session) -> None:
    metrics, rows = session.held_out.measure()
    assert metrics["eval/kl_nats"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["eval/win_rate"] == 0.5 and metrics["eval/tie_rate"] == 1.0
    assert metrics["eval/reward"] == pytest.approx(metrics["eval/reward_before"])
    assert [row.reply for row in rows] == [row.reply for row in session.held_out.reference]
    assert len(rows) == len(session.prompts.eval) == 4


def test_held_out_numbers_against_plain_ones(session: Session) -> None:
    """The policy moved; its own replies, each alone: their score, and their KL from the reference token by token."""
    from baton.chat import stop_ids
    from stages.held_out import EPISODES_FROM
    from stages.micro_batch import make_micro_batch
    from stages.rollout import Episode, sample_with

    move(session)
    metrics, rows = session.held_out.measure()
    kl, scores = [], []
    rollout = session.run.recipe.rollout
    for at, prompt in enumerate(session.prompts.eval):
        with session.roles.acting_as(POLICY) as model:
            (reply,) = sample_with(
                model,
                [prompt.ids],
                [EPISODES_FROM + at],
                seed=6,
                temperature=rollout.temperature,
                max_new_tokens=rollout.max_new_tokens,
                stop_ids=stop_ids(session.tokenizer),
                pad_id=0,
            )
        batch = make_micro_batch([Episode(0, prompt.ids, reply)], [0], 0)
        with torch.no_grad():
            ours, theirs = (session.roles.logprobs(role, batch).logprobs for role in (POLICY, REFERENCE))
        kl.append(float((ours - theirs).sum()))
        scores.append(float(session.roles.scores("reward", batch)))
        assert rows[at].length == len(reply.ids) and rows[at].ended == reply.ended
    assert [row.kl_nats for row in rows] == pytest.approx(kl, abs=1e-4)
    assert [row.reward for row in rows] == pytest.approx(scores, abs=1e-4)
    assert metrics["eval/kl_nats"] == pytest.approx(sum(kl) / 4, abs=1e-4) and abs(sum(kl)) > 0.01
    assert metrics["eval/reward"] == pytest.approx(sum(scores) / 4, abs=1e-4)


def test_the_same_noise_every_time_and_the_reference_once(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    rows = HeldOut.rows
    monkeypatch.setattr(HeldOut, "rows", lambda self, role: (asked.append(role), rows(self, role))[1])
    first, again = session.held_out.measure(), session.held_out.measure()
    assert first == again
    assert asked == [REFERENCE, POLICY, POLICY]


@pytest.fixture(scope="module")
def ensemble(chain: Any) -> str:
    """A second reward version in the chain's registry: the first one's adapter, and as a member one with its head
    turned round. Its records are made up."""
    import json

    from safetensors.torch import load_file, save_file

    folder = chain.root / "ensemble"
    shutil.copytree(chain.folder("reward"), folder)
    (folder / "members" / "1").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / name, folder / "members" / "1" / name)
    tensors = load_file(folder / "adapter_model.safetensors")
    turned = {key: -0.5 * item if key.endswith("score.weight") else item for key, item in tensors.items()}
    save_file(turned, folder / "members" / "1" / "adapter_model.safetensors")
    base = chain.registry.resolve("tiny/base:main")
    records = {"sft/score_mean": 0.5, "sft/score_deviation": 0.25}
    version = chain.registry.publish(folder, name="tiny/pair", kind="reward", base=base, details={"metrics": records})
    assert json.loads((chain.registry.materialise(version) / "members/1/adapter_config.json").read_text())
    return str(version.ref)


def opened(chain: Any, *overrides: str) -> Session:
    return Session.open(Run.start(chain.recipe("ppo", "data.questions=[]", "samples=0", *overrides)))


def test_the_members_of_an_ensemble_are_aboard(chain: Any, ensemble: str) -> None:
    """Its second member says -0.5 times what the first says; the critic starts from the first, in the new units."""
    setting = f"reward=[{{model: '{ensemble}', deviation_penalty: 1.0, normalise: sft, weight: 2.0}}]"
    session = opened(chain, setting)
    cast = session.roles.cast
    folder = chain.registry.materialise(chain.registry.resolve(ensemble))
    assert cast.rewards == {"pair": [folder, folder / "members" / "1"]}
    assert cast.critic_start == folder and cast.critic_weight == 2.0 / 0.25
    metrics, rows = session.held_out.measure()
    for row in rows:
        first = row.details["pair/member_0"]
        assert row.details["pair/member_1"] == pytest.approx(-0.5 * first, abs=1e-5)
        assert row.rewards["pair"] == pytest.approx(0.25 * first, abs=1e-5)
        # (first + -0.5 first) / 2 and 0.75 |first|, both in units of 0.25
        shaped = (0.25 * first - 0.5) / 0.25 - 0.75 * abs(first) / 0.25
        assert row.details["pair/shaped"] == pytest.approx(shaped, abs=1e-4)
        assert row.reward == pytest.approx(2 * shaped, abs=1e-4)
    assert {"eval/reward/pair", "eval/reward/pair/deviation", "eval/reward/pair/member_1_before"} <= set(metrics)
    assert metrics["eval/win_rate"] == 0.5
    session.engine.close()


def test_members_that_are_not_aboard_are_combined_alike(chain: Any, ensemble: str) -> None:
    """Without its template in common with the policy's, each member reads the same text on a base of its own."""
    from reward.sources import checked_members, open_sources
    from tests.reward.conftest import ROWS

    version = chain.registry.resolve(ensemble)
    setting = chain.recipe("ppo", f"reward=[{{model: '{ensemble}'}}]").rewards[0]
    (source,) = open_sources(
        setting,
        registry=chain.registry,
        versions=[version],
        folder=chain.root,
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_tokens=64,
    )
    first, second = checked_members(source, ROWS)
    assert second == pytest.approx([-0.5 * score for score in first], abs=1e-6) and len(set(first)) == 3
    assert source.score(ROWS) == pytest.approx([0.25 * score for score in first], abs=1e-6)


def test_the_reference_replies_are_sfts_likeliest(chain: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Scored once, less what length costs; what PPO optimises is the difference."""
    from baton.decode import decode
    from stages.micro_batch import make_micro_batch
    from stages.references import prompts_of_run
    from stages.rollout import Episode

    session = opened(chain, "reward=[{model: 'tiny/reward:candidate', shape: reference, length_penalty: 0.5}]")
    out = capsys.readouterr().out
    used = prompts_of_run(session.run.recipe, session.prompts.train)
    count = len({str((row.ids, row.columns)) for row in [*used, *session.prompts.eval]})
    assert f"SFT's model answered {count} prompts with" in out and "scored by reward:" in out
    assert len(session.scorer.references.scores) == count
    row = session.prompts.eval[1]
    with session.roles.acting_as(REFERENCE) as model:
        (reply,) = decode(model, [row.ids], max_new_tokens=8, stop_ids=[session.tokenizer.eos_token_id], pad_id=0)
    batch = make_micro_batch([Episode(0, row.ids, reply)], [0], 0)
    expected = float(session.roles.scores("reward", batch)) - 0.5 * len(reply.ids)
    assert session.scorer.references.of("reward", [row]) == [[pytest.approx(expected, abs=1e-5)]]
    _, rows = session.held_out.measure()
    found = rows[1]
    assert found.reward == pytest.approx(found.rewards["reward"] - 0.5 * found.length - expected, abs=1e-5)
    session.engine.close()


@pytest.mark.parametrize(("steps", "known"), [(1, 8), (5, 20)])
def test_only_prompts_that_a_step_takes_are_answered(steps: int, known: int, make_recipe: Any) -> None:
    from stages.prompts import PromptRow
    from stages.references import prompts_of_run
    from stages.rollout import episode_prompts

    rows = [PromptRow([], [at], {}) for at in range(20)]
    recipe = make_recipe(train={"steps": steps, "warmup_steps": 0})
    found = prompts_of_run(recipe, rows)
    assert len(found) == known
    assert {row.ids[0] for row in found} == set(episode_prompts(recipe.train.seed, 20, 0, steps * 8))


def test_what_cannot_be_shaped_is_refused_before_weights_are_loaded(chain: Any) -> None:
    for setting, said in (("deviation_penalty: 0", "is a single model"), ("normalise: sft", "has no sft/score_mean")):
        recipe = chain.recipe("ppo", "data.questions=[]", f"reward=[{{model: 'tiny/bare:1', {setting}}}]")
        base = chain.registry.resolve("tiny/base:main")
        if "tiny/bare" not in chain.registry.models():
            chain.registry.publish(chain.folder("reward"), name="tiny/bare", kind="reward", base=base, details={})
        with pytest.raises(UserError, match=said):
            cast_of(Run.start(recipe))


def test_a_snapshot_is_a_copy(session: Session) -> None:
    before = session.snapshot()
    move(session)
    assert not any(torch.equal(p, before[name]) for name, p in session.updater.parameters.items())
    session.restore(before)
    assert all(torch.equal(p, before[name]) for name, p in session.updater.parameters.items())
    move(session)
    assert not any(torch.equal(p, before[name]) for name, p in session.updater.parameters.items())


def measured(*pairs: tuple[float, float]) -> Any:
    """Held-out prompts that give these (reward, KL) one after another."""
    left = [({"eval/reward": reward, "eval/kl_nats": kl}, []) for reward, kl in pairs]
    return SimpleNamespace(measure=lambda: left.pop(0), reference=[])


def concluded(session: Session, *pairs: tuple[float, float], budget: float | None = None, **options: bool) -> int:
    """Which weights `conclude` leaves: those that were moved so many times; previous is one less."""
    start = session.snapshot()
    move(session, 1.0)
    move(session, 1.0)
    session.state.previous = session.snapshot()
    if not options:
        move(session, 1.0)
    session.state.step = 3
    session.state.best.kl_budget_nats = budget
    recipe = session.run.recipe
    settings = recipe.ppo.model_copy(update={"kl_budget_nats": budget})
    session.run.recipe = recipe.model_copy(update={"ppo": settings})
    session.held_out = measured(*pairs)
    metrics = session.conclude(**options)
    name = next(iter(start))
    found = round(float((session.snapshot()[name] - start[name]).mean()))
    assert metrics["published_step"] == found and metrics["eval/reward"] == pairs[-1][0]
    return found


def test_the_last_weights_are_published_where_they_are_the_best(session: Session) -> None:
    assert concluded(session, (1.0, 9.0)) == 3


def test_the_best_of_earlier_ones_is_published(session: Session) -> None:
    state = session.state
    before = session.snapshot()
    move(session, 1.0)
    state.best.offer(1, {"eval/reward": 2.0, "eval/kl_nats": 1.0})
    state.best_weights = session.snapshot()
    session.restore(before)
    assert concluded(session, (1.0, 9.0), (2.0, 1.0)) == 1


def test_over_the_budget_it_goes_one_update_back(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert concluded(session, (5.0, 9.0), (1.0, 2.0), budget=4.0) == 2
    out = capsys.readouterr().out
    assert "9.00 nats a reply, over ppo.kl_budget_nats: one update back" in out and "warning" not in out


def test_what_went_back_already_does_not_go_back_again(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert concluded(session, (1.0, 5.0), budget=4.0, went_back=True) == 2
    out = capsys.readouterr().out
    assert "one update back" not in out and "warning: held-out KL is still 5.00" in out


def test_an_evaluation_keeps_the_best_weights(session: Session) -> None:
    session.held_out = measured((1.0, 0.1), (3.0, 0.1), (2.0, 0.1))
    kept = []
    for step in (1, 2, 3):
        move(session, 1.0)
        session.state.step = step
        session.evaluate()
        kept.append((session.state.best.step, next(iter(session.state.best_weights.values())).clone()))
    assert [step for step, _ in kept] == [1, 2, 2]
    assert not torch.equal(kept[0][1], kept[1][1]) and torch.equal(kept[1][1], kept[2][1])


def test_what_is_saved_comes_back(session: Session, chain: Any) -> None:
    state = session.state
    state.previous, state.best_weights = session.snapshot(), {}
    move(session)
    state.step, state.kl.value = 2, 0.123456789
    state.raw_scale.add([1.0, 2.0, 5.0])
    state.scale.add([2.0, 2.0, 9.0])
    state.best.offer(1, {"eval/reward": 2.0, "eval/kl_nats": 1.0})
    state.best_weights = {name: tensor + 1 for name, tensor in session.snapshot().items()}
    session.scorer.references.scores = {"a prompt": {"reward": [0.1, 1 / 3]}}
    session.save()
    torch.rand(3)
    expected = torch.get_rng_state().clone()
    session.save()
    torch.rand(5)
    other = Session.open(Run.start(chain.recipe("ppo", "data.questions=[]", "samples=0")))
    assert torch.equal(torch.get_rng_state(), expected)
    assert other.state.step == 2 and other.state.plain() == state.plain()
    for ours, theirs in (
        (other.snapshot(), session.snapshot()),
        (other.state.previous, state.previous),
        (other.state.best_weights, state.best_weights),
    ):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert other.scorer.references.scores == {"a prompt": {"reward": [0.1, 1 / 3]}}
    shutil.rmtree(chain.run_dir("ppo"))


def test_the_introduction_says_the_arithmetic(session: Session) -> None:
    text = session.introduction()
    assert "4 steps of 8 episodes" in text and "2 epochs × 2 minibatches" in text


def test_a_tracker_without_its_package_is_refused() -> None:
    from stages.session import check_trackers

    check_trackers([])
    with pytest.raises(UserError, match="trackers: no_such_tracker cannot be loaded; pip install no_such_tracker"):
        check_trackers(["no_such_tracker"])
