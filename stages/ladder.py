"""The ladder: pretrain several sizes on one corpus, predict the last one's loss before it is trained, compare."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from baton.build import resolve_inputs, training_key, up_to_date
from baton.chain import Link, run_stage
from baton.child import FORWARDED
from baton.errors import UserError
from baton.ladder_plan import LEAST_STEPS, Plan, plan_rungs, too_short, write_recipe
from baton.ladder_plot import Forecast, Rung, ladder_table, plot_ladder, relative_error
from baton.launch import processes_of
from baton.preemption import EXIT_CODE, Preempted
from baton.recipe import LadderRecipe, PretrainRecipe, load_recipe
from baton.registry import Registry, Version
from baton.registry.trust import attestations, evaluations
from baton.run import program, write_status
from baton.scaling import NOISE, Law, Point, backtest, predict


class Stopped(Preempted):
    """A size was stopped by a signal or preempted; the ladder's own command goes on with it."""

    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)


@dataclass(frozen=True)
class Climbed:
    """A size that is published."""

    rung: Rung
    version: Version

    @property
    def point(self) -> Point:
        """Its compute and its held-out loss."""
        assert self.rung.loss is not None
        return Point(self.rung.flops, self.rung.loss)


def main(recipe: LadderRecipe) -> Version:
    """Pretrain each size but the last, write down what they say of the last, pretrain it, and compare."""
    _one_process()
    console = Console(highlight=False, soft_wrap=True)
    folder = Path(recipe.run_dir)
    registry = Registry(recipe.registry, create=True)
    plans = plan_rungs(recipe)
    write_status(folder, "ladder", "running", "", 0)
    console.print(plan_table(plans))
    if short := too_short(plans):
        console.print(
            f"{', '.join(short)}: fewer than {LEAST_STEPS:,} steps, where the loss follows the steps more than the "
            "compute and bends the law; lower train.tokens_per_batch, or raise tokens_per_parameter"
        )
    recipes = [load_recipe(write_recipe(recipe, plan), [], PretrainRecipe) for plan in plans]
    was_done = all(up_to_date(each) is not None for each in recipes)
    if not was_done:
        check_sizes(recipe, plans, recipes)

    climbed = [
        climb(recipe, plan, each, registry, console) for plan, each in zip(plans[:-1], recipes[:-1], strict=True)
    ]
    record = standing_prediction(recipe, climbed, plans[-1], recipes[-1], registry)
    console.print(
        f"[bold]{plans[-1].size}[/bold] is predicted to reach a loss of {record['loss']:.3f} nats a token "
        f"({record['low']:.3f} to {record['high']:.3f}), by {folder / 'prediction.json'}"
    )
    if record["misfit"] > 2 * NOISE:
        console.print(
            f"the smaller sizes are {record['misfit']:.1%} away from any law: trainings too short, or a learning rate "
            "that does not fit; the interval allows for it"
        )
    climbed.append(climb(recipe, plans[-1], recipes[-1], registry, console))

    outcome = compare(climbed, record)
    write_json(folder / "ladder.json", outcome)
    rungs = with_predictions(climbed, record)
    plot = plot_ladder(rungs, forecast_of(record), folder / "plots" / "ladder.png")
    attest(registry, climbed[-1].version, outcome)
    console.print(ladder_table(rungs))
    console.print(f"plot: {plot}", markup=False)
    version = climbed[-1].version
    write_status(folder, "ladder", "up to date" if was_done else "done", "", 0, version.ref)
    return version


def plan_table(plans: list[Plan]) -> Table:
    """What is going to be trained, before it is."""
    table = Table(title="Plan", title_justify="left", box=None, pad_edge=False)
    table.add_column("size", style="bold")
    for heading in ("params", "tokens", "FLOPs", "steps", "tokens/batch", "learning rate"):
        table.add_column(heading, justify="right", no_wrap=True)
    for plan in plans:
        train = plan.content["train"]
        table.add_row(
            plan.size,
            f"{plan.parameters:,}",
            f"{plan.tokens:,}",
            f"{plan.flops:.2e}",
            f"{train['steps']:,}",
            f"{train['tokens_per_batch']:,}",
            f"{train['learning_rate']:.2e}",
        )
    return table


def check_sizes(recipe: LadderRecipe, plans: list[Plan], recipes: list[PretrainRecipe]) -> None:
    """Raises UserError where a size, the last one included, could not be trained: before any of them is."""
    processes = processes_for(recipe)
    for plan, each in zip(plans, recipes, strict=True):
        if each.rows_per_batch % processes:
            raise UserError(
                f"{recipe.path}: size {plan.size}: a batch of {each.rows_per_batch} rows cannot be split evenly over "
                f"{processes} processes; set train.tokens_per_batch to a multiple of "
                f"{processes * int(recipe.train['sequence_length']):,}, or start fewer"
            )
    data = recipes[-1].data
    assert data is not None
    if any(source.max_epochs is None for source in data.train):
        return  # as much text as is wanted
    from baton.corpus.prepare import prepared_corpus
    from baton.corpus.rows import training_rows

    corpus = prepared_corpus(recipes[0])  # which all sizes share
    for plan, each in zip(plans, recipes, strict=True):
        assert each.data is not None and each.train is not None
        try:
            training_rows(corpus, each.data, each.train, pad_id=0)
        except UserError as error:
            raise UserError(f"{recipe.path}: size {plan.size}: {error}, or lower tokens_per_parameter") from None


def processes_for(recipe: LadderRecipe) -> int:
    """How many processes train each size."""
    return recipe.processes or (processes_of(Path(recipe.config_file)) if recipe.config_file else 1)


def climb(recipe: LadderRecipe, plan: Plan, pretrain: PretrainRecipe, registry: Registry, console: Console) -> Climbed:
    """Train and publish one size, unless it is up to date. Raises UserError where it refuses its input."""
    config = Path(recipe.config_file) if recipe.config_file else None
    processes = processes_for(recipe)
    console.print(f"[bold]{plan.size}[/bold]")
    code = run_stage(Link("pretrain", pretrain.path, [], pretrain, processes), config, console)
    if code == EXIT_CODE or code in [128 + number for number in FORWARDED]:
        raise Stopped(f"size {plan.size} was stopped; the same command goes on from its last complete checkpoint")
    if code:
        log = Path(pretrain.run_dir) / "log.txt"
        problem = f"size {plan.size} ended with exit code {code}; what it said is above and in {log}"
        raise (UserError if code == 2 else RuntimeError)(problem)
    version = registry.resolve(f"{pretrain.publish.name}:{pretrain.publish.alias}")
    metrics = version.manifest["metrics"]
    loss = metrics.get("eval/loss")
    if not isinstance(loss, float):
        raise UserError(
            f"{version.ref} has no eval/loss, which the law is fitted to; look at {pretrain.run_dir}/log.txt"
        )
    rung = plan.rung(loss=loss, bits_per_byte=metrics.get("eval/bits_per_byte"), seconds=metrics.get("seconds"))
    return Climbed(rung, version)


def standing_prediction(
    recipe: LadderRecipe, climbed: list[Climbed], last: Plan, last_recipe: PretrainRecipe, registry: Registry
) -> dict[str, Any]:
    """The prediction as it was written down before; where there is none of these very models, make it and write it.

    One that was made for other models or another last size is kept beside it, by its date.
    """
    path = Path(recipe.run_dir) / "prediction.json"
    based_on = [
        {"size": each.rung.size, "version": each.version.ref, "digest": each.version.digest, **each.point._asdict()}
        for each in climbed
    ]
    subject = {"size": last.size, "flops": last.flops, "recipe": last_recipe.digest()}
    standing = read_json(path)
    if standing is not None:
        if standing.get("based_on") == based_on and standing.get("of") == subject:
            return standing
        path.rename(path.with_name(f"prediction-{str(standing.get('made_at', 'before')).replace(':', '')}.json"))
    found = predict([each.point for each in climbed], last.flops)
    record = {
        "of": subject,
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "before_training": not has_begun(last_recipe, registry),
        "loss": found.loss,
        "low": found.low,
        "high": found.high,
        "misfit": found.misfit,
        "law": asdict(found.law),
        "without_one": list(found.left_out),
        "based_on": based_on,
    }
    write_json(path, record)
    return record


def has_begun(recipe: PretrainRecipe, registry: Registry) -> bool:
    """Whether a model of this very recipe was published, or its training has logged a loss."""
    if up_to_date(recipe) is not None:
        return True
    marker = read_json(Path(recipe.run_dir) / "build.json") or {}
    logged = Path(recipe.run_dir) / "metrics.jsonl"
    is_same = marker.get("training_key") == training_key(recipe, resolve_inputs(recipe, registry))
    return is_same and logged.is_file() and logged.stat().st_size > 0


def compare(climbed: list[Climbed], record: dict[str, Any]) -> dict[str, Any]:
    """Everything about the ladder: each size, the prediction, the outcome, and their distance."""
    rungs = with_predictions(climbed, record)
    return {
        "prediction": record,
        "outcome": rungs[-1].loss,
        "error": relative_error(rungs[-1]),
        "sizes": [
            {**asdict(rung), "version": each.version.ref, "digest": each.version.digest}
            for rung, each in zip(rungs, climbed, strict=True)
        ],
    }


def with_predictions(climbed: list[Climbed], record: dict[str, Any]) -> list[Rung]:
    """The sizes with what was predicted of the last, and what the sizes below each other one say of it afterwards."""
    said = backtest([each.point for each in climbed[:-1]]) | {len(climbed) - 1: float(record["loss"])}
    return [replace(each.rung, predicted=said.get(at)) for at, each in enumerate(climbed)]


def forecast_of(record: dict[str, Any]) -> Forecast:
    """The prediction for the picture."""
    return Forecast(Law(**record["law"]), record["loss"], record["low"], record["high"], record["before_training"])


def attest(registry: Registry, version: Version, outcome: dict[str, Any]) -> None:
    """Say of the last size's version what was predicted of it, once; a value known before is no prediction."""
    record = outcome["prediction"]
    if not record["before_training"]:
        return
    note = f"predicted at {record['made_at']} from {', '.join(each['version'] for each in record['based_on'])}"
    if any(said.body.get("note") == note for said in attestations.of(registry, version.digest, "evaluation")):
        return
    metrics = {f"ladder/predicted_{key}": record[key] for key in ("loss", "low", "high")}
    evaluations.record(registry, version, metrics | {"ladder/error": outcome["error"]}, note=note)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file of ours; None where there is no such file. Raises UserError for any other content."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); move it away and run the ladder again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no object; move it away and run the ladder again")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write aside, flush, rename: what is there is whole."""
    aside = path.with_name(path.name + ".new")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _one_process() -> None:
    """The ladder itself computes nothing: it starts the processes of each size, with all cores or GPUs."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1:
        raise UserError(
            f"{started} processes were launched, but the ladder is one, which launches each size's; start it by "
            f"baton run FOLDER --processes {started}, or as one process with processes={started}"
        )
    _forget_launchers_threads()


def _forget_launchers_threads() -> None:
    """accelerate launch gives its program one thread unless asked: that must not be taken for the sizes' wish."""
    import psutil

    try:
        parent = psutil.Process().parent()
        was_asked = parent is None or "OMP_NUM_THREADS" in parent.environ()
    except psutil.Error:
        return
    if not was_asked:
        os.environ.pop("OMP_NUM_THREADS", None)


if __name__ == "__main__":
    program(main, LadderRecipe)
