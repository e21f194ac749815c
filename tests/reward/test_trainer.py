"""Steps of the pair trainer: what must not matter does not, what a setting says happens, checkpoints hold it all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reward.pairs import Pair
from reward.trainer import PairTrainer


@pytest.fixture(scope="module")
def chain(tiny_chain: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_chain.unpublished("reward", tmp_path_factory.mktemp("trainer"))


@pytest.fixture
def make(chain: Any, tmp_path: Path) -> Callable[..., PairTrainer]:
    """A trainer of the chain's reward stage, in a run folder of its own; `touched` gives its heads other weights."""
    from baton.run import Run
    from reward.members import Members
    from reward.pairs import encode_pairs, read_all_pairs

    def trainer(*overrides: str, touched: bool = True) -> PairTrainer:
        from baton.models import load_tokenizer

        run = Run.start(chain.recipe("reward", f"run_dir={tmp_path / 'run'}", *overrides))
        rows, recipe = read_all_pairs(run), run.recipe
        tokenizer = load_tokenizer(chain.folder("sft"))
        pairs = {use: encode_pairs(run, tokenizer, getattr(rows, use), use) for use in ("train", "eval")}
        members = Members.from_sft(
            chain.folder("pretrain"),
            chain.folder("sft"),
            run.dtype,
            int(tokenizer.pad_token_id),
            count=recipe.ensemble,
            trained=recipe.trained,
            seed=recipe.train.seed,
        )
        if touched:
            with torch.no_grad():
                for number in range(len(members)):
                    head = members.parameters_of(number)["score.weight"]
                    head.add_(torch.randn(head.shape, generator=torch.Generator().manual_seed(number)))
        return PairTrainer(run, members, pairs)

    return trainer


def step(trainer: PairTrainer, number: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of the first step, and one member's gradients."""
    rows = trainer.order[:4]
    loss = trainer.training_step(trainer.members, {"pairs": torch.tensor(rows)})
    found = {name: p.grad for name, p in trainer.members.parameters_of(number).items() if p.grad is not None}
    return float(loss), found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 1
    largest = max(float(item.abs().max()) for item in expected.values())
    assert largest > 1e-3
    for name, item in expected.items():
        torch.testing.assert_close(found[name], item, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize(
    "overrides", [["train.tokens_per_micro_batch=1"], ["train.share_prompt=false"], ["trained=full"]]
)
def test_what_must_not_matter_to_a_step(make: Callable[..., PairTrainer], overrides: list[str]) -> None:
    """Micro-batches and padding; one row or two; SFT's adapter beside the base or merged into it (the head's part)."""
    expected_loss, expected = step(make("train.tokens_per_micro_batch=100000"))
    loss, found = step(make(*overrides))
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    if overrides == ["trained=full"]:
        torch.testing.assert_close(found["score.weight"], expected["score.weight"], rtol=0, atol=1e-4)
    else:
        assert_same(found, expected)


def test_the_gradient_is_that_of_the_mean_over_single_pairs(make: Callable[..., PairTrainer]) -> None:
    """By autograd on plain scores, one sequence at a time."""
    trainer = make("loss.margin_weight=0.5", "loss.label_smoothing=0.1", "loss.centring=0.2")
    pairs = trainer.pairs["train"]
    for at, (margin, is_tie) in enumerate([(1.5, False), (None, True)] * (len(pairs) // 2)):
        pairs[at] = Pair(**{**vars(pairs[at]), "margin": margin, "is_tie": is_tie})
    loss, found = step(trainer)
    members, total = trainer.members, torch.zeros(())
    for (number,) in trainer.order[:4]:
        pair = pairs[number]
        chosen, rejected = (
            members.rewards(members._hidden(torch.tensor([ids]), 0)[0, -1], 0)
            for ids in (pair.chosen_ids, pair.rejected_ids)
        )
        gap = chosen - rejected - 0.5 * (pair.margin or 0.0)
        right = 0.5 if pair.is_tie else 0.9
        log = torch.nn.functional.logsigmoid
        total = total - right * log(gap) - (1 - right) * log(-gap) + 0.2 * (chosen + rejected) ** 2
    parameters = members.parameters_of(0)
    expected = dict(zip(parameters, torch.autograd.grad(total / 4, list(parameters.values())), strict=True))
    assert loss == pytest.approx(float(total.detach()) / 4, abs=1e-5)
    assert_same(found, expected)


def test_a_member_trains_as_it_would_alone(make: Callable[..., PairTrainer]) -> None:
    """Clipped hard, so that a norm over both members would show."""
    single = make("train.max_grad_norm=0.01", touched=False)
    single.train()
    both = make("train.max_grad_norm=0.01", "ensemble=2", touched=False)
    both.train()
    alone, first, second = single.members.parameters_of(0), *map(both.members.parameters_of, (0, 1))
    for name, parameter in alone.items():
        torch.testing.assert_close(first[name], parameter, rtol=0, atol=1e-6)
    assert max(float((first[name] - second[name]).detach().abs().max()) for name in first) > 1e-3
    orders = list(zip(*both.order, strict=True))
    assert orders[0] != orders[1]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_process_gets_its_share_of_the_long_pairs(make: Callable[..., PairTrainer], processes: int) -> None:
    trainer = make()
    one = [[row[0] for row in trainer.order_for(1)[at : at + 4]] for at in range(0, 16, 4)]
    dealt = [[row[0] for row in trainer.order_for(processes)[at : at + 4]] for at in range(0, 16, 4)]
    assert [sorted(batch) for batch in dealt] == [sorted(batch) for batch in one]
    each = 4 // processes
    firsts = [batch[at] for batch in dealt for at in range(0, 4, each)]
    assert firsts == [row for batch in one for row in batch[:processes]]


def test_head_only_computes_each_pairs_states_once_and_trains_nothing_else(make: Callable[..., PairTrainer]) -> None:
    trainer = make("trained=head", "ensemble=2", "train.steps=30", touched=False)
    reads = []
    inner = trainer.members.states
    trainer.members.states = lambda rows, number: reads.append(len(rows.row[0])) or inner(rows, number)  # type: ignore[method-assign,func-returns-value]
    before = {name: p.clone() for name, p in trainer.members.model.named_parameters()}
    trainer.train()
    assert sum(reads) == 40 == len(trainer.pairs["train"])
    assert all(torch.equal(p, before[name]) for name, p in trainer.members.model.named_parameters())
    heads = [trainer.members.parameters_of(number)["score.weight"] for number in (0, 1)]
    assert all(float(head.detach().abs().max()) > 0.01 for head in heads)


def test_the_best_weights_are_kept_and_patience_ends_the_training(make: Callable[..., PairTrainer]) -> None:
    trainer = make("train.steps=30", "train.eval_every=1", "train.patience=2", "train.save_every=100", touched=False)
    losses, seen = iter([0.6, 0.5, 0.55, 0.7, 0.1]), {}
    parameters = trainer.members.parameters_of(0)

    def measured() -> list[float]:
        seen[trainer.state.global_step] = {name: p.detach().clone() for name, p in parameters.items()}
        return [next(losses)]

    trainer.held_out_losses = measured  # type: ignore[method-assign]
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.best.steps == [2]
    chosen = {"best_step": 2.0, "eval/chosen_on": 1.0}
    assert trainer.summary() == {"skipped_steps": 0, "rollbacks": 0} | chosen
    trainer.keep_best()
    assert all(torch.equal(parameters[name], item) for name, item in seen[2].items())
    assert any(not torch.equal(parameters[name], item) for name, item in seen[4].items())


def test_the_held_out_loss_is_plain_bradley_terry(make: Callable[..., PairTrainer]) -> None:
    trainer = make("loss.centring=3", "loss.label_smoothing=0.2")
    chosen, rejected = (
        trainer.members.score([getattr(pair, side) for pair in trainer.pairs["eval"]])[0]
        for side in ("chosen_ids", "rejected_ids")
    )
    expected = float(-torch.nn.functional.logsigmoid(chosen - rejected).mean())
    assert trainer.held_out_losses() == [pytest.approx(expected, abs=1e-5)]


def test_an_ensemble_goes_on_from_a_checkpoint_bit_by_bit(make: Callable[..., PairTrainer], tmp_path: Path) -> None:
    settings = ("ensemble=2", "train.eval_every=1", "train.patience=1", "train.learning_rate=0.05")
    whole = make(*settings)
    losses = [[0.5, 0.5], [0.4, 0.6], [0.6, 0.4], [0.3, 0.3]]
    whole.held_out_losses = lambda: losses[whole.state.global_step - 1]  # type: ignore[method-assign]
    whole.train()
    again = make(*settings)
    again.held_out_losses = lambda: losses[again.state.global_step - 1]  # type: ignore[method-assign]
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    assert (checkpoint / "complete").exists()
    assert sorted(path.name for path in checkpoint.glob("*.safetensors")) == [
        "best_0.safetensors",
        "best_1.safetensors",
        "trained.safetensors",
    ]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-3", ignore_errors=True)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.best.steps == whole.best.steps == [2, 1]
    for number in (0, 1):
        ours, theirs = again.members.parameters_of(number), whole.members.parameters_of(number)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert all(
            torch.equal(again.best.weights[number][name], item) for name, item in whole.best.weights[number].items()
        )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3]


def test_a_run_that_had_ended_before_it_was_killed_is_not_trained_on(
    make: Callable[..., PairTrainer], tmp_path: Path
) -> None:
    settings = ("train.steps=30", "train.eval_every=1", "train.patience=2", "train.save_every=1")
    whole = make(*settings)
    losses = [0.6, 0.5, 0.55, 0.7]
    whole.held_out_losses = lambda: [losses[whole.state.global_step - 1]]  # type: ignore[method-assign]
    whole.train_from(None)
    whole.keep_best()
    again = make(*settings)
    again.train_from(str(tmp_path / "run" / "checkpoints" / "checkpoint-4"))
    again.keep_best()
    assert again.state.global_step == whole.state.global_step == 4 and again.summary() == whole.summary()
    ours, theirs = again.members.parameters_of(0), whole.members.parameters_of(0)
    assert all(torch.equal(ours[name], item) for name, item in theirs.items())


def test_which_side_of_a_tie_comes_first_means_nothing(make: Callable[..., PairTrainer]) -> None:
    trainer = make()
    pairs = trainer.pairs["eval"]
    pairs[:] = [Pair(**{**vars(pair), "is_tie": True}) for pair in pairs]
    before = trainer.held_out_losses()
    turned = [{"chosen_ids": pair.rejected_ids, "rejected_ids": pair.chosen_ids} for pair in pairs]
    pairs[:] = [Pair(**{**vars(pair), **sides}) for pair, sides in zip(pairs, turned, strict=True)]
    assert trainer.held_out_losses() == [pytest.approx(before[0], abs=1e-5)]
    trainer.pairs["train"][:] = [Pair(**{**vars(pair), "is_tie": True}) for pair in trainer.pairs["train"]]
    step(trainer)
    assert trainer._tallies.tolist() == [0, 0, 0]  # nothing of accuracy and margin, which are of pairs that a side won
