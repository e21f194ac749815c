"""`baton run FOLDER`: the stages of a folder in order, each in processes of its own, less those that are up to date."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from baton.child import FORWARDED, run_child
from baton.errors import UserError, nearest
from baton.launch import PROGRAMS, processes_of, stage_command, stage_environment
from baton.preemption import EXIT_CODE
from baton.recipe import (
    RECIPES,
    PPORecipe,
    Recipe,
    RewardRecipe,
    SFTRecipe,
    TrainedRecipe,
    WorldRecipe,
    load_recipe,
)

FINISHED = ("done", "up to date")


@dataclass(frozen=True)
class Options:
    """How a chain is run: which of its stages, by how many processes, started how, into which registry."""

    start: str | None = None
    only: str | None = None
    processes: int | None = None
    config_file: Path | None = None
    registry: str | None = None


@dataclass(frozen=True)
class Link:
    """One stage of the chain: its recipe's file, the overrides it gets, and what they make of it."""

    stage: str
    path: Path
    overrides: list[str]
    recipe: Recipe
    processes: int


def run(folder: Path, overrides: list[str], options: Options, console: Console | None = None) -> int:
    """Run the stages of `folder`; returns the exit code. Prints the table of results when all went well.

    Every recipe is read and checked before anything starts. A stage whose version is up to date is not run; a failure
    stops the chain with the stage's log path: 2 where the stage refused its input, else the program's own code.
    """
    from baton.results import results_table

    console = console or Console(highlight=False, soft_wrap=True)
    links = plan(folder, overrides, options)
    for link in links:
        code = run_stage(link, options.config_file, console)
        if code != 0:
            return code
    table = results_table([link.recipe for link in links])
    if table.row_count:  # a ladder prints a table of its own
        console.print(table)
    return 0


def plan(folder: Path, overrides: list[str], options: Options) -> list[Link]:
    """The stages to run, in order, with their recipes read and checked. Raises UserError."""
    paths = recipe_files(folder)
    shared = [] if options.registry is None else [f"registry={options.registry}"]
    if options.processes is not None:
        shared.append(f"processes={options.processes}")
    routed = route_overrides(paths, [*overrides, *shared])
    if options.config_file is not None and "ladder" in routed:  # which launches its sizes itself
        routed["ladder"].append(f"config_file={options.config_file}")
    links = []
    for stage, path in paths.items():
        recipe = load_recipe(path, routed[stage], RECIPES[stage])
        processes = recipe.processes or (processes_of(options.config_file) if options.config_file else 1)
        links.append(Link(stage, path, routed[stage], recipe, processes))
    _check_run_dirs(links)
    if options.start and options.only:
        raise UserError("--from and --only exclude each other: --from runs a stage and all after it, --only just one")
    for name in (options.start, options.only):
        if name is not None and name not in paths:
            raise UserError(f"{folder} has no stage {name}; it has {', '.join(paths)}")
    first = list(paths).index(options.start) if options.start else 0
    chosen = [link for link in links if link.stage == options.only] if options.only else links[first:]
    _check_files(chosen)
    _check_references(chosen)
    return chosen


def recipe_files(folder: Path) -> dict[str, Path]:
    """stage -> file, in the order of the chain. Raises UserError where there is none."""
    expected = ", ".join(f"{stage}.yaml" for stage in PROGRAMS)
    if folder.is_file():
        raise UserError(f"{folder} is a file; baton run takes a folder: baton run {folder.parent} --only {folder.stem}")
    if not folder.is_dir():
        siblings = [str(path) for path in folder.parent.glob("*") if path.is_dir()] if folder.parent.is_dir() else []
        near = nearest(str(folder), siblings)
        raise UserError(f"no folder at {folder}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    found = {stage: path for stage in PROGRAMS if (path := folder / f"{stage}.yaml").is_file()}
    if not found:
        raise UserError(f"{folder} holds no recipe; expected some of {expected}")
    return found


def route_overrides(paths: dict[str, Path], overrides: list[str]) -> dict[str, list[str]]:
    """stage -> its overrides. `sft.train.steps=5` goes to stage sft; `train.steps=5` to every stage that has the key.

    `ppo` is a stage and a section of its recipe: `ppo.train.steps=5` and `ppo.epochs=2` both reach the right key.
    """
    routed: dict[str, list[str]] = {stage: [] for stage in paths}
    present = {stage: _top_keys(path) for stage, path in paths.items()}
    for override in overrides:
        key, equals, setting = override.partition("=")
        if not equals or not key or key.startswith("-"):
            raise UserError(f"{override!r} is not key=value, for example train.steps=10 or sft.train.steps=10")
        stage, dot, inner = key.partition(".")
        if dot and stage in paths and (_takes(stage, inner, present[stage]) or not _takes(stage, key, present[stage])):
            routed[stage].append(f"{inner}={setting}")
            continue
        takers = [stage for stage in paths if _takes(stage, key, present[stage])]
        if not takers:
            raise UserError(_no_taker(key, paths))
        for stage in takers:
            routed[stage].append(override)
    return routed


def _takes(stage: str, key: str, present: set[str]) -> bool:
    """Whether the stage's recipe has the top-level key; a key inside a section that is left out is not taken.

    Otherwise `train.steps=5` would give a training section to a pretrain stage that only registers a base.
    """
    top, dot, _ = key.partition(".")
    fields = RECIPES[stage].model_fields
    if top not in fields:
        return False
    return not dot or top in present or fields[top].get_default() is not None


def _top_keys(path: Path) -> set[str]:
    from yaml import YAMLError, safe_load

    try:
        content = safe_load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError, OSError):
        return set()  # reading the recipe reports it
    return {str(key) for key in content} if isinstance(content, dict) else set()


def _no_taker(key: str, paths: dict[str, Path]) -> str:
    top, _, rest = key.partition(".")
    if top in PROGRAMS and rest:
        return f"override {key}: the folder has no stage {top}; it has {', '.join(paths)}"
    keys = sorted({name for stage in paths for name in RECIPES[stage].model_fields})
    if top in keys:
        return f"override {key}: no stage of the folder has a section {top}"
    near = nearest(top, [*keys, *paths])
    hint = f"did you mean {', '.join(near)}?" if near else f"keys: {', '.join(keys)}"
    return f"override {key}: no stage of the folder has a key {top}; {hint}"


def _check_run_dirs(links: list[Link]) -> None:
    seen: dict[Path, str] = {}
    for link in links:
        run_dir = Path(link.recipe.run_dir).resolve()
        if run_dir in seen:
            raise UserError(
                f"stages {seen[run_dir]} and {link.stage} share the run_dir {link.recipe.run_dir}; give each its own, "
                f"for example {link.stage}.run_dir={link.recipe.run_dir}-{link.stage}"
            )
        seen[run_dir] = link.stage


def _check_files(links: list[Link]) -> None:
    """A later stage's missing file is told now, not after the stages before it; a world is yet to write its own."""
    from baton.data.files import locate

    if any(isinstance(link.recipe, WorldRecipe) for link in links):
        return
    for link in links:
        data = getattr(link.recipe, "data", None)
        for use in ("train", "eval", "questions", "ptx"):
            for source in getattr(data, use, []):
                try:
                    locate(source.path, link.recipe.folder)
                except UserError as error:
                    raise UserError(f"{link.path}: data.{use}: {error}") from None


def _check_references(links: list[Link]) -> None:
    """A reference must be there now, or be what an earlier stage of this run publishes; so must rewards' code."""
    from baton.build import check_source
    from baton.registry import Registry
    from baton.registry.reference import parse

    coming: set[str] = set()
    unshared: dict[str, Path] = {}  # adapters to come that share no base with others -> their recipe
    for link in links:
        recipe = link.recipe
        if not isinstance(recipe, TrainedRecipe):
            continue
        _check_adapter_to_come(link, unshared)
        made = [publish for publish in (recipe.publish, getattr(recipe, "publish_value", None)) if publish]
        for publish in made:
            parse(f"{publish.name}:{publish.alias}")
        references = [(key, getattr(recipe, key, None)) for key in ("base", "sft")]
        if isinstance(recipe, PPORecipe):
            sources = [("reward", source) for source in recipe.rewards]
            sources += [("gold", recipe.gold)] if recipe.gold else []
            references += [(key, reference) for key, source in sources for reference in source.references]
            for key, source in sources:
                try:
                    check_source(source, recipe.folder)
                except UserError as error:
                    raise UserError(f"{link.path}: {key}: {error}") from None
        for key, reference in references:
            if reference is None or reference in coming or (key == "base" and not _in_registry(reference, recipe)):
                continue
            try:
                Registry(recipe.registry).resolve(reference)
            except UserError as error:
                raise UserError(f"{link.path}: {key}: {error}") from None
        coming |= {f"{publish.name}:{publish.alias}" for publish in made}


def _check_adapter_to_come(link: Link, unshared: dict[str, Path]) -> None:
    """A DoRA adapter of this run's SFT is for a later stage only once it is merged, by hand."""
    recipe = link.recipe
    if isinstance(recipe, SFTRecipe) and recipe.trained == "adapter" and recipe.lora.dora:
        unshared[f"{recipe.publish.name}:{recipe.publish.alias}"] = link.path
    shares = isinstance(recipe, PPORecipe) or (isinstance(recipe, RewardRecipe) and recipe.trained != "full")
    sft = getattr(recipe, "sft", None)
    if shares and sft in unshared:
        raise UserError(
            f"{link.path}: sft: {sft} will be a DoRA adapter ({unshared[sft]}: lora.dora), and one base is shared "
            f"between plain LoRA adapters. Run --only sft and merge it: baton get {sft} DIR --merge, then baton "
            "publish DIR --name TEAM/NAME --kind merged; or leave lora.dora out"
        )


def _in_registry(base: str, recipe: TrainedRecipe) -> bool:
    from baton.build import model_source

    return model_source(base, recipe.folder) is None


def run_stage(link: Link, config_file: Path | None, console: Console) -> int:
    """Run one stage unless it is up to date; says how it ended; returns 0 or the chain's exit code."""
    from baton.build import up_to_date
    from baton.plots import plot_run

    ref = up_to_date(link.recipe)
    if ref is not None:
        console.print(f"[bold]{link.stage:8}[/bold]  up to date  {ref}")
        return 0
    run_dir = Path(link.recipe.run_dir)
    log, status_path = run_dir / "log.txt", run_dir / "status.json"
    console.print(f"[bold]{link.stage:8}[/bold]  running     {link.path}  [dim](log: {log})[/dim]")
    before = _written_at(status_path)
    command = stage_command(link.stage, link.path, link.overrides, link.processes, config_file)
    code = run_child(command, stage_environment(link.stage, link.processes), log)
    # a program that died before its first word leaves the status of the run before
    status = _read_status(status_path) if _written_at(status_path) != before else {}
    state, message = status.get("state"), status.get("message") or ""
    if code == 0 and state in FINISHED:
        console.print(f"[bold]{link.stage:8}[/bold]  [green]{state:10}[/green]  {status.get('version') or ''}")
        for plot in plot_run(link.stage, run_dir):
            console.print(f"{'':8}  [dim]plot        {plot}[/dim]")
        return 0
    if state == "preempted":  # whatever the launcher made of the exit code
        code, word = EXIT_CODE, "preempted"
    elif state == "refused" or code == 2:
        code, word, message = 2, "refused", message or "its input; the program's own message is above"
    elif code in [128 + number for number in FORWARDED]:
        word, message = "stopped", "the same command goes on from the last complete checkpoint"
    else:
        word = "failed"
        message = message or f"the program ended with exit code {code} and did not say that it was done"
        code = code or 1
    console.print(f"[bold]{link.stage:8}[/bold]  [red]{word:10}[/red]  ", end="")
    console.print(message, markup=False)
    console.print(f"{'':8}  log         {log}", markup=False)
    return code


def _written_at(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _read_status(path: Path) -> dict[str, Any]:
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}
