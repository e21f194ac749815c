"""What the Trainer's stages share: batch arithmetic, recording, complete checkpoints, the mean loss."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from baton.packing import pack
from baton.run import Run
from baton.train_sections import TokenTrain
from baton.training import Recorder, drop_incomplete, mean_loss, on_one_device, schedule_settings, trainer_settings


@pytest.fixture
def run(tiny_chain: Any, tmp_path: Path) -> Run[Any]:
    return Run.start(tiny_chain.copy(tmp_path).recipe("sft"))


def processes(run: Run[Any], count: int) -> None:
    """Make the run believe in `count` processes, of which this is the main one."""
    run.state = SimpleNamespace(  # type: ignore[assignment]
        num_processes=count, device=torch.device("cpu"), is_main_process=True, wait_for_everyone=lambda: None
    )


@pytest.mark.parametrize(
    ("world", "rows", "micro", "size", "accumulation"),
    [(1, 8, 8, 8, 1), (1, 8, 3, 2, 4), (2, 8, 8, 4, 1), (2, 8, 1, 1, 4), (4, 12, 2, 1, 3), (1, 7, 4, 1, 7)],
)
def test_the_global_batch_is_the_same_for_any_split(
    run: Run[Any], world: int, rows: int, micro: int, size: int, accumulation: int
) -> None:
    processes(run, world)
    settings = trainer_settings(run, run.recipe.train, rows, micro)
    assert settings["per_device_train_batch_size"] == size
    assert settings["gradient_accumulation_steps"] == accumulation
    assert size * accumulation * world == rows


def test_the_recipes_settings_reach_the_trainer(tiny_chain: Any, run: Run[Any]) -> None:
    from transformers import TrainingArguments

    recipe = tiny_chain.recipe(
        "sft",
        "train.schedule=constant",
        "train.warmup_steps=2",
        "train.weight_decay=0.1",
        "train.adam_beta2=0.95",
        "train.max_grad_norm=0.5",
        "train.seed=11",
        "train.log_every=3",
        "train.save_every=7",
    )
    run.recipe = recipe
    run.dtype = torch.bfloat16
    arguments = TrainingArguments(**trainer_settings(run, recipe.train, 2, 1))
    assert arguments.max_steps == 4 and arguments.learning_rate == 0.01
    assert arguments.lr_scheduler_type == "constant_with_warmup" and arguments.warmup_steps == 2
    assert (arguments.weight_decay, arguments.adam_beta2, arguments.max_grad_norm) == (0.1, 0.95, 0.5)
    assert arguments.seed == 11 and arguments.train_sampling_strategy == "sequential"
    assert (arguments.logging_steps, arguments.save_steps, arguments.bf16) == (3, 7, True)


def test_one_process_leaves_a_machine_s_other_gpus_alone(run: Run[Any]) -> None:
    from transformers import TrainingArguments

    arguments = TrainingArguments(**trainer_settings(run, run.recipe.train, 2, 1))
    for there_are, used in ((4, 1), (1, 1), (0, 0)):
        arguments._n_gpu = there_are
        assert on_one_device(arguments).n_gpu == used


def rates(steps: int, **settings: Any) -> list[float]:
    """The learning rate of each step, as the Trainer's own schedule gives it."""
    from transformers import TrainingArguments, get_scheduler

    train = TokenTrain(steps=steps, learning_rate=2.0, tokens_per_batch=8, sequence_length=8, **settings)
    arguments = TrainingArguments(use_cpu=True, report_to=[], **schedule_settings(train))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=train.learning_rate)
    schedule = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    found = []
    for _ in range(steps + 1):  # the last one is what a further step would have
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant", "warmup_steps": 2}, [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2]),
        ({"schedule": "linear"}, [2, 1.8, 1.6, 1.4, 1.2, 1, 0.8, 0.6, 0.4, 0.2, 0]),
        ({"schedule": "linear", "final_share": 0.5}, [2, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3, 1.2, 1.1, 1]),
        # half a cosine: at a third and two thirds of the way 0.75 and 0.25, in the middle 0.5
        ({"schedule": "cosine", "warmup_steps": 4}, [0, 0.5, 1, 1.5, 2, None, 1.5, 1, 0.5, None, 0]),
        (
            {"schedule": "cosine", "warmup_steps": 4, "final_share": 0.1},
            [0, 0.5, 1, 1.5, 2, None, 1.55, 1.1, 0.65, None, 0.2],
        ),
        # 4 steps of decay by 1 - sqrt: after one of them 1 - 1/2
        ({"schedule": "wsd", "warmup_steps": 2, "decay_share": 0.4}, [0, 1, 2, 2, 2, 2, 2, 1, None, None, 0]),
        ({"schedule": "wsd"}, [2, 2, 2, 2, 2, 2, 2, 2, 2, None, 0]),
        (
            {"schedule": "wsd", "decay_share": 0.4, "decay_shape": "linear", "final_share": 0.2},
            [2, 2, 2, 2, 2, 2, 2, 1.6, 1.2, 0.8, 0.4],
        ),
    ],
)
def test_schedules_by_hand(settings: dict[str, Any], expected: list[float | None]) -> None:
    found = rates(10, **settings)
    assert [rate if wanted is not None else None for rate, wanted in zip(found, expected, strict=True)] == [
        None if wanted is None else pytest.approx(wanted, abs=1e-6) for wanted in expected
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule": "cosine", "decay_share": 0.1}, "schedule: cosine would ignore decay_share"),
        ({"schedule": "linear", "decay_shape": "linear"}, "schedule: linear would ignore decay_shape"),
        ({"schedule": "constant", "final_share": 0.1}, "constant would ignore final_share"),
        ({"schedule": "wsd", "warmup_steps": 9}, "9 steps of warm-up and 2 of decay are more than 10 steps"),
    ],
)
def test_settings_of_another_schedule_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TokenTrain(steps=10, learning_rate=1.0, tokens_per_batch=8, sequence_length=8, **settings)


def test_a_stage_may_add_figures_to_the_lines(run: Run[Any]) -> None:
    recorder = Recorder(run, "sft", 256, "tokens", lambda rate: {"mfu": rate / 2})
    recorder.on_train_begin(SimpleNamespace(), step(0), TrainerControl())  # type: ignore[arg-type]
    recorder.on_log(SimpleNamespace(), step(2), TrainerControl(), logs={"loss": 1.0})  # type: ignore[arg-type]
    row = json.loads((run.folder / "metrics.jsonl").read_text())
    assert row["tokens_per_s"] > 0 and row["mfu"] == pytest.approx(row["tokens_per_s"] / 2, rel=1e-3)


def step(number: int) -> TrainerState:
    return TrainerState(global_step=number, max_steps=4)


def test_the_recorder_marks_checkpoints_and_keeps_metrics(run: Run[Any]) -> None:
    recorder, arguments, control = Recorder(run, "sft", 256, "tokens"), SimpleNamespace(), TrainerControl()
    checkpoint = run.checkpoints / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text("x")
    run.log(1, {"loss": 9.0})
    run.log(3, {"loss": 7.0})
    recorder.on_train_begin(arguments, step(1), control)  # type: ignore[arg-type]
    recorder.on_step_end(arguments, step(2), control)  # type: ignore[arg-type]
    logs = {"loss": 8.0, "grad_norm": 0.5, "epoch": 1.0, "num_tokens": 99.0}
    recorder.on_log(arguments, step(2), control, logs=logs)  # type: ignore[arg-type]
    recorder.on_log(arguments, step(2), control, logs={"train_runtime": 3.0})  # type: ignore[arg-type]
    assert run.last_checkpoint() is None
    recorder.on_save(arguments, step(2), control)  # type: ignore[arg-type]
    recorder.on_train_end(arguments, step(2), control)  # type: ignore[arg-type]
    assert run.last_checkpoint() == checkpoint
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 9.0), (2, 8.0)]
    assert set(rows[1]) == {"step", "time_s", "loss", "grad_norm", "tokens_per_s", "time_left_s"}


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(run: Run[Any], loss: float) -> None:
    recorder = Recorder(run, "sft", 256, "tokens")
    with pytest.raises(FloatingPointError, match="at step 3; lower train.learning_rate"):
        recorder.on_log(SimpleNamespace(), step(3), TrainerControl(), logs={"loss": loss})  # type: ignore[arg-type]


def test_incomplete_checkpoints_are_dropped(run: Run[Any], capsys: pytest.CaptureFixture[str]) -> None:
    for number, complete in ((2, True), (9, True), (10, True), (11, False)):
        folder = run.checkpoints / f"checkpoint-{number}"
        folder.mkdir(parents=True)
        if complete:
            (folder / "complete").touch()
    assert drop_incomplete(run) == str(run.checkpoints / "checkpoint-10")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["checkpoint-10", "checkpoint-2", "checkpoint-9"]
    assert "continuing from" in capsys.readouterr().out


def test_no_checkpoint_nothing_to_continue(run: Run[Any]) -> None:
    assert drop_incomplete(run) is None


@pytest.mark.parametrize("rows_at_once", [1, 2, 100])
def test_mean_loss_is_that_of_separate_documents(tiny_llama: Any, rows_at_once: int) -> None:
    generator = torch.Generator().manual_seed(2)
    documents = []
    for length in (9, 5, 17, 3, 12, 1, 2):
        ids = torch.randint(0, 48, (length,), generator=generator).tolist()
        documents.append((ids, [place % 3 != 1 for place in range(length)]))
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, in_loss in documents:
            table = tiny_llama(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            chosen = [at for at in range(1, len(ids)) if in_loss[at]]
            total -= sum(float(table[at - 1, ids[at]]) for at in chosen)
            count += len(chosen)
    rows = pack(documents, 20, 0).rows
    assert len(rows) < len(documents)
    found, tokens = mean_loss(tiny_llama, rows, rows_at_once, torch.float32)
    assert tokens == count and found == pytest.approx(total / count, abs=1e-5)
    assert not tiny_llama.training


def test_mean_loss_turns_dropout_off_and_training_on_again(tiny_llama: Any) -> None:
    rows = pack([([3, 4, 5], [True] * 3)], 4, 0).rows
    tiny_llama.train()
    try:
        mean_loss(tiny_llama, rows, 1, torch.float32)
        assert tiny_llama.training
    finally:
        tiny_llama.eval()
    assert mean_loss(tiny_llama, [], 1, torch.float32) == (0.0, 0)
