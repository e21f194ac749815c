"""One run of one stage: its process group, registry, folder, metrics, status, and how its program begins and ends."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from baton.build import Inputs, build_key, published, resolve_inputs, training_key
from baton.errors import UserError
from baton.preemption import EXIT_CODE, Preempted, ignore_signals
from baton.recipe import TrainedRecipe, load_recipe
from baton.registry import Registry, Version
from baton.registry.care.leases import Lease
from baton.registry.reference import check_alias, check_name
from baton.registry.stores.files import storage_errors_are_user_errors

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

T = TypeVar("T", bound=TrainedRecipe)
Result = TypeVar("Result")


@dataclass
class Run(Generic[T]):
    """What a stage's main works with. Made by `Run.start`, which checks everything that can be checked cheaply."""

    recipe: T
    registry: Registry
    inputs: Inputs
    state: PartialState
    build_key: str
    dtype: torch.dtype
    started: float = field(default_factory=time.monotonic)
    training_key: str = ""
    """Under which checkpoints are continued: `build_key`, but for how often they are written."""

    @classmethod
    def start(cls, recipe: T) -> Run[T]:
        """Join the process group, check its size, resolve the inputs on rank 0, open the run's folder.

        Raises UserError when the number of processes is not the one asked for, or an input is missing or unfit.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        _quieten_libraries()
        _check_whole(recipe)
        state = _process_group(recipe)
        _use_cores(state)
        if state.device.type == "cpu":
            _keep_freed_memory()
        if recipe.rows_per_batch % state.num_processes:
            raise UserError(
                f"{recipe.path}: a batch of {recipe.rows_per_batch} rows cannot be split evenly over "
                f"{state.num_processes} processes"
            )
        registry, inputs = _on_main(state, lambda: _open_inputs(recipe))
        if state.is_main_process:
            _hold(recipe, registry, inputs)
        key = training_key(recipe, inputs)
        dtype = _on_main(state, lambda: _open_folder(recipe, key, state))
        run = cls(recipe, registry, inputs, state, build_key(recipe, inputs), dtype, training_key=key)
        if state.is_main_process:
            run.write_status("running", "")
        state.wait_for_everyone()
        return run

    @property
    def folder(self) -> Path:
        """Checkpoints, metrics.jsonl, logs: only this run's; safe to delete once published."""
        return Path(self.recipe.run_dir)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def is_main(self) -> bool:
        return bool(self.state.is_main_process)

    def already_published(self) -> Version | None:
        """The version that this very run would make, if the alias points at it already."""
        return published(self.recipe, self.registry, self.build_key)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl (main process only)."""
        if not self.is_main:
            return
        row = {"step": step, "time_s": round(time.monotonic() - self.started, 3), **metrics}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def say(self, text: str) -> None:
        """Print on the main process."""
        if self.is_main:
            print(text, flush=True)

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Run `work` on rank 0 and give its result to every process; where it fails, it fails on all of them."""
        return _on_main(self.state, work)

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint of this recipe, these inputs and this code."""
        found = [path.parent for path in self.checkpoints.glob("checkpoint-*/complete")]
        return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)

    def trim_metrics(self, step: int) -> None:
        """Forget the metrics after `step`, and the final ones: a run that resumes there writes them again."""
        path = self.folder / "metrics.jsonl"
        if not self.is_main or not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                if row["step"] <= step and "seconds" not in row:
                    kept.append(line)
            except json.JSONDecodeError:
                continue  # the line that the interrupted run was writing
        _replace(path, "".join(line + "\n" for line in kept))

    def publish(
        self,
        write: Callable[[Path], None],
        *,
        kind: str,
        base: Version | None = None,
        metrics: dict[str, Any] | None = None,
        name: str | None = None,
        alias: str | None = None,
        parents: dict[str, Version] | None = None,
        recipe: dict[str, Any] | None = None,
    ) -> Version:
        """Write the version's folder by `write`, publish it, move the alias; returns the version on every process.

        `recipe` stands for a version that this run's recipe and data did not make, such as a base from outside.
        """

        def on_main() -> Version:
            staged = self.folder / f"publish-{kind}"
            shutil.rmtree(staged, ignore_errors=True)
            try:
                with storage_errors_are_user_errors(f"writing {staged} failed, and nothing was published"):
                    staged.mkdir(parents=True)
                    write(staged)
                target, label = name or self.recipe.publish.name, alias or self.recipe.publish.alias
                data = [{"use": use, **row} for use, rows in self.inputs.sources.items() for row in rows]
                version = self.registry.publish(
                    staged,
                    name=target,
                    kind=kind,
                    base=base,
                    parents=self.inputs.versions if parents is None else parents,
                    details={
                        "data": [] if recipe else data,
                        "recipe": recipe or self.recipe.model_dump(mode="json"),
                        "metrics": metrics or {},
                        "licence": None if recipe else self.recipe.licence,
                        "build_key": None if recipe else self.build_key,
                    },
                    allowed_licences=self.recipe.allowed_licences,
                )
                if self.registry.aliases(target).get(label) != version.number:
                    self.registry.promote(version.ref, label, reason=f"published by stage {self.recipe.stage}")
                return version
            finally:
                shutil.rmtree(staged, ignore_errors=True)

        return _on_main(self.state, on_main)

    def finish(self, version: Version, word: str = "published") -> Version:
        """Record that the run is done."""
        _let_go()
        if self.is_main:
            self.write_status("up to date" if word == "up to date" else "done", word, version=version.ref)
            self.say(
                f"{word} {version.ref}  ({self.recipe.publish.name}:{self.recipe.publish.alias})  {version.digest}"
            )
        return version

    def write_status(self, state: str, message: str, exit_code: int = 0, version: str | None = None) -> None:
        """Replace status.json: what the chain, and people, read after the program has gone."""
        write_status(self.folder, self.recipe.stage, state, message, exit_code, version)


def program(main: Callable[[T], Version], kind: type[T]) -> None:
    """Run `main` as a program for `accelerate launch`: RECIPE [key=value …] from the command line.

    Exit code 2 and one message for a user's mistake, 75 when it was preempted and saved, 1 with a traceback for
    anything else; launchers make 1 of all of them, status.json tells. The process ends by os._exit after a barrier:
    gloo's threads abort some interpreters that leave the ordinary way.
    """
    arguments = sys.argv[1:]
    module = getattr(sys.modules["__main__"].__spec__, "name", "stages.…")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: accelerate launch -m {module} RECIPE [key=value …]\n\n{main.__doc__ or ''}")
        _leave(0 if arguments else 2)
    recipe: T | None = None
    code = 1
    try:
        recipe = load_recipe(arguments[0], arguments[1:], kind)
        main(recipe)
        code = 0
    except Preempted as error:
        ignore_signals()
        code = EXIT_CODE
        if _rank() == 0:
            print(error, flush=True)
        if recipe is not None:
            _last_words(recipe, "preempted", str(error), EXIT_CODE)
    except UserError as error:
        code = 2
        if _rank() == 0:
            print(f"error: {error}", file=sys.stderr)
            if recipe is not None:
                _last_words(recipe, "refused", str(error), 2)
    except KeyboardInterrupt:
        code = 130
        if recipe is not None:
            _last_words(recipe, "failed", "interrupted", 130)
    except BaseException as error:
        traceback.print_exc()
        if recipe is not None:
            _last_words(recipe, "failed", f"{type(error).__name__}: {error}", 1)
    _leave(code)


def _last_words(recipe: TrainedRecipe, state: str, message: str, code: int) -> None:
    """The status of a program that ends early; a folder that cannot be written must not hide why."""
    if _rank() != 0:
        return
    try:
        write_status(Path(recipe.run_dir), recipe.stage, state, message, code)
    except OSError as error:
        print(f"status.json cannot be written: {error}", file=sys.stderr)


def write_status(
    folder: Path, stage: str, state: str, message: str, exit_code: int, version: str | None = None
) -> None:
    """Write `folder`/status.json aside and rename it."""
    folder.mkdir(parents=True, exist_ok=True)
    status = {"stage": stage, "state": state, "message": message, "exit_code": exit_code, "version": version}
    _replace(folder / "status.json", json.dumps(status, ensure_ascii=False, indent=1) + "\n")


def _quieten_libraries() -> None:
    """Their bars and reports are about each other: a bar for every file, a head that is new because it must be."""
    import warnings

    import datasets
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _check_whole(recipe: TrainedRecipe) -> None:
    """Raises UserError where a stage that holds the whole model on every process is started to spread it over them."""
    for setting in ("FSDP", "DEEPSPEED"):
        if recipe.stage != "ppo" and os.environ.get(f"ACCELERATE_USE_{setting}", "").lower() in ("1", "true"):
            raise UserError(
                f"{recipe.path}: stage {recipe.stage} holds the whole model on every process; {setting} spreads it "
                "over them. Start it without that configuration; stage ppo can be started with it"
            )


def _process_group(recipe: TrainedRecipe) -> PartialState:
    from accelerate import PartialState

    # left to itself, PartialState looks for an accelerator and ignores the launcher's switch
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    # rank 0 measures and publishes while the others wait: that may take longer than the libraries' ten minutes
    patience = {"timeout": timedelta(hours=12)} if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {}
    state = PartialState(cpu=use_cpu, **patience)
    started = int(state.num_processes)
    asked = {"WORLD_SIZE": os.environ.get("WORLD_SIZE"), "the recipe's processes": recipe.processes}
    asked["accelerate launch --num_processes"] = _launched_processes()
    for source, count in asked.items():
        if count is not None and int(count) != started:
            raise UserError(
                f"{source} asks for {count} processes, but {started} runs as one group. On CPUs only this "
                "starts several: "
                "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_machines 1 --mixed_precision no "
                "--dynamo_backend no --num_processes N …, which is what baton run --processes N does"
            )
    return state


def _use_cores(state: PartialState) -> None:
    """accelerate launch starts programs with one thread each: on a CPU, take this process's share of the cores.

    A number of threads that somebody asked for, by OMP_NUM_THREADS or by the launcher's option, stays.
    """
    import psutil
    import torch

    from baton.launch import cpu_threads

    if state.device.type != "cpu" or torch.get_num_threads() > 1:
        return
    try:
        parent = psutil.Process().parent()
        asked = parent is None or "OMP_NUM_THREADS" in parent.environ()
        asked = asked or any(word.startswith("--num_cpu_threads_per_process") for word in _launcher_words())
    except psutil.Error:
        return
    if not asked and _launcher_words():
        os.environ.pop("OMP_NUM_THREADS", None)
        torch.set_num_threads(cpu_threads(int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))))


def _keep_freed_memory() -> None:
    """Tell glibc to keep what tensors free, as `baton.launch` does by the environment; elsewhere nothing happens.

    Given back to the kernel, memory is cleared page by page when the next step asks for it: 10-15% of a step's time.
    """
    import ctypes

    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for setting, value in ((-4, 0), (-1, 2**31 - 1), (-8, 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
            libc.mallopt(setting, value)


def _launcher_words() -> list[str]:
    """The command line of the launcher above this process; empty when there is none."""
    import psutil

    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
    except psutil.Error:
        return []
    return words if any("accelerate" in word or word == "baton.launch" for word in words[:4]) else []


def _launched_processes() -> str | None:
    """What --num_processes said on the command line of the launcher above this process, times its machines' share."""
    words = _launcher_words()
    launcher = next((at for at, word in enumerate(words) if "accelerate" in word or word == "baton.launch"), 0)
    for at, word in enumerate(words[launcher + 1 :], launcher + 1):  # `python -m accelerate…` has a -m of its own
        name, equals, attached = word.partition("=")
        if name in ("--num_processes", "--num-processes"):
            return attached if equals else (words[at + 1] if at + 1 < len(words) else None)
        if word == "-m":
            return None
    return None


def _open_folder(recipe: TrainedRecipe, key: str, state: PartialState) -> torch.dtype:
    """Make the run's folder and choose the dtype to compute in; a run that is continued keeps its own.

    Checkpoints of another recipe, other inputs or other code must not be continued: they are set aside, and taken back
    when their `key` comes again.
    """
    import torch

    from baton.models import compute_dtype

    folder, checkpoints = Path(recipe.run_dir), Path(recipe.run_dir) / "checkpoints"
    marker, kept = folder / MARKER, _set_aside_at(folder, key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = _marked(marker)
        if before.get("training_key") != key:
            _set_aside(folder, before)
            before = _marked(kept / MARKER)
            if not before:
                dtype = str(compute_dtype(recipe.dtype, state.device.type)).removeprefix("torch.")
                before = {"training_key": key, "dtype": dtype}
            _replace(marker, json.dumps(before) + "\n")
        if kept.is_dir():
            _take_back(folder, kept)
        if not any(checkpoints.glob("checkpoint-*/complete")):
            (folder / "metrics.jsonl").unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"run_dir: {folder} cannot be used as the run's folder: {error}") from None
    return getattr(torch, before["dtype"])


MARKER = "build.json"
"""In a run's folder: the key of the training that its checkpoints are of, and the dtype it computes in."""

OF_A_TRAINING = ("metrics.jsonl", "skipped.json", "samples.jsonl", "checkpoints")
"""What is set aside and taken back with a training's checkpoints, which come last."""


def _marked(marker: Path) -> dict[str, Any]:
    found = json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else {}
    return found if isinstance(found, dict) else {}


def _set_aside_at(folder: Path, key: str) -> Path:
    return folder / "set-aside" / key[:16]


def _set_aside(folder: Path, before: dict[str, Any]) -> None:
    """Move what the training that `before` marks has left out of the way; cut off, the next start goes on with it."""
    checkpoints = folder / "checkpoints"
    if not any(checkpoints.glob("checkpoint-*/complete")):
        shutil.rmtree(checkpoints, ignore_errors=True)  # nothing that could be continued
        return
    aside = _set_aside_at(folder, str(before.get("training_key", "unknown")))
    while (aside / "checkpoints").exists():  # without a mark of their own they cannot be told from those before
        aside = aside.with_name(aside.name + "-more")
    aside.mkdir(parents=True, exist_ok=True)
    _replace(aside / MARKER, json.dumps(before) + "\n")
    for name in OF_A_TRAINING:
        if (folder / name).exists():
            os.replace(folder / name, aside / name)
    print(
        f"{folder}: recipe, inputs or code have changed; starting afresh, checkpoints moved to {aside}. They are taken "
        "back where the change is undone; delete them when they are not wanted",
        flush=True,
    )


def _take_back(folder: Path, aside: Path) -> None:
    """Undo `_set_aside`, also where it was cut off, or this was."""
    if not any((folder / "checkpoints").glob("checkpoint-*/complete")):
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        for name in OF_A_TRAINING:
            if (aside / name).exists():
                os.replace(aside / name, folder / name)
        print(f"{folder}: recipe, inputs and code are those of {aside} again; its checkpoints are back", flush=True)
    if not (aside / "checkpoints").exists():
        shutil.rmtree(aside)


def _open_inputs(recipe: TrainedRecipe) -> tuple[Registry, Inputs]:
    for key in ("publish", "publish_value"):  # a name that the registry refuses must not cost a training first
        target = getattr(recipe, key, None)
        if target is not None:
            try:
                check_name(target.name)
                check_alias(target.alias)
            except UserError as error:
                raise UserError(f"{recipe.path}: {key}: {error}") from None
    registry = Registry(recipe.registry, create=True)
    return registry, resolve_inputs(recipe, registry)


_leases: list[Lease] = []


def _hold(recipe: TrainedRecipe, registry: Registry, inputs: Inputs) -> None:
    """Keep what this run reads, and will name as its parents, from being collected meanwhile."""
    held = Lease(registry.store, f"stage {recipe.stage} in {recipe.run_dir}")
    _leases.append(held)
    held.add(version.digest for version in inputs.versions.values())


def _let_go() -> None:
    while _leases:
        _leases.pop().release()


def _on_main(state: PartialState, work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0 and give its result to every process; where it fails, it fails on all of them."""
    if state.num_processes == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    box: list[Any] = [None, None, False]
    mine: Exception | None = None
    if state.is_main_process:
        try:
            box[0] = work()
        except Exception as error:
            mine = error
            box[1:] = [str(error), isinstance(error, UserError)]
    broadcast_object_list(box)
    if mine is not None:
        raise mine
    if box[1] is not None:
        raise (UserError if box[2] else RuntimeError)(f"on the main process: {box[1]}")
    return box[0]


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".new")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def _leave(code: int) -> None:
    with suppress(Exception):  # the collector finds out by itself that this process is gone
        _let_go()
    # preempted ranks leave together: a launcher ends the others by a signal when the first one is gone
    if code in (0, EXIT_CODE) and "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
