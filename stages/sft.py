"""Stage 2: supervised fine-tuning on dialogues, by an adapter or whole, with the loss on the assistant's turns only."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.data import load, mix, report
from baton.questions import ask, load_questions
from baton.recipe import SFTRecipe
from baton.registry import Version
from baton.run import Run, program

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from baton.packing import Packed
    from baton.sft_trainer import DialogueTrainer


def main(recipe: SFTRecipe) -> Version:
    """Train an adapter, or every weight, on dialogues with TRL's SFTTrainer; publish it with its chat template."""
    run = Run.start(recipe)
    if version := run.already_published():
        return run.finish(version, "up to date")
    from transformers import set_seed

    from baton.chat import install_template
    from baton.models import check_positions, load_tokenizer, write_stops
    from baton.sft_trainer import DialogueTrainer
    from baton.training import train_guarded
    from baton.tuned import Tuned, check_quantise

    started = time.monotonic()
    check_quantise(recipe.quantise, run.state.device)
    dialogues, questions = read_dialogues(run)
    base = base_version(run)
    with run.state.main_process_first():
        folder = run.registry.materialise(base)
    check_positions(folder, recipe.train.sequence_length, "train.sequence_length")
    tokenizer = load_tokenizer(folder)
    run.say(install_template(tokenizer, recipe.chat_template, recipe.folder).describe())
    packed = {use: pack_dialogues(run, tokenizer, rows, use).rows for use, rows in dialogues.items()}

    before: dict[str, Any] = {}

    def make_trainer(skipped: tuple[int, ...]) -> DialogueTrainer:
        set_seed(recipe.train.seed)
        tuned = Tuned.make(
            folder,
            run.dtype,
            trained=recipe.trained,
            lora=recipe.lora,
            seed=recipe.train.seed,
            quantise=recipe.quantise,
            device=run.state.device,
        )
        trainer = DialogueTrainer(run, tuned, tokenizer, packed, skipped)
        if not before:
            with tuned.base_alone():
                before.update(measure(trainer, tokenizer, questions, "_before"))
        return trainer

    trainer = train_guarded(run, make_trainer)
    trainer.tuned.round_as_saved()  # what is measured is what is published
    metrics = before | measure(trainer, tokenizer, questions, "") | trainer.summary()
    metrics["seconds"] = round(time.monotonic() - started, 1)
    run.log(recipe.train.steps, metrics)

    is_adapter = recipe.trained == "adapter"

    def write(target: Path) -> None:
        trainer.tuned.save(target)
        tokenizer.save_pretrained(target)
        if not is_adapter:
            write_stops(target, tokenizer)

    kind, on_base = ("adapter", base) if is_adapter else ("merged", None)
    return run.finish(run.publish(write, kind=kind, base=on_base, parents={"base": base}, metrics=metrics))


def base_version(run: Run[SFTRecipe]) -> Version:
    """The base from the registry; a base that is a folder, a file or a hub id is registered first."""
    if "base" in run.inputs.versions:
        return run.inputs.versions["base"]
    from baton.external import load_external

    assert run.inputs.model
    source = run.inputs.model
    team = run.recipe.publish.name.split("/")[0]

    def write(folder: Path) -> None:
        model, tokenizer = load_external(source)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    about = {"stage": "sft", "base": run.recipe.base}
    return run.publish(write, kind="base", name=f"{team}/base", alias="from-sft", parents={}, recipe=about)


def read_dialogues(run: Run[SFTRecipe]) -> tuple[dict[str, list[dict[str, Any]]], list[Any]]:
    """({"train", "eval"} -> dialogue rows, questions); prints what was kept and dropped."""
    data, folder = run.recipe.data, run.recipe.folder
    dialogues = {}
    for use, sources in (("train", data.train), ("eval", data.eval)):
        loaded = [load(source, folder, "dialogue") for source in sources]
        if loaded:
            run.say(report(loaded))
        dialogues[use] = mix(loaded, run.recipe.train.seed)
    return dialogues, load_questions(data.questions, folder)


def pack_dialogues(
    run: Run[SFTRecipe], tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], use: str
) -> Packed:
    """Rendered, masked, cut at `sequence_length`, looked over and packed; what was left out is printed."""
    from rich.console import Console

    from baton.dialogues import encode_dialogues
    from baton.packing import pack
    from baton.preflight import preflight

    train = run.recipe.train
    encoded = encode_dialogues(tokenizer, rows, train.sequence_length, use, train.on_long)
    preflight(tokenizer, encoded, use, Console() if run.is_main and use == "train" else None)
    assert tokenizer.pad_token_id is not None
    packed = pack(encoded.documents, train.sequence_length, int(tokenizer.pad_token_id))
    if rows:
        run.say(
            f"{use}: {encoded.describe()}; {len(packed.rows):,} rows of {train.sequence_length}, "
            f"{packed.padding_share:.1%} padding"
        )
    return packed


def measure(
    trainer: DialogueTrainer, tokenizer: PreTrainedTokenizerBase, questions: list[Any], suffix: str
) -> dict[str, Any]:
    """Held-out loss and, on the main process, answers, each key with `suffix`.

    On a quantised base, which nobody is handed, keys say so: the adapter is published for the base as it was.
    """
    if trainer.tuned.quantise:
        suffix = "_quantised" + suffix
    metrics: dict[str, Any] = {}
    if trainer.rows["eval"]:
        metrics["eval/loss"] = trainer.held_out_loss()
    if questions and trainer.state_of_run.is_main_process:
        with trainer.tuned.replying() as model:
            metrics |= ask(model, tokenizer, questions)[0]
    return {key + suffix: value for key, value in metrics.items()}


if __name__ == "__main__":
    program(main, SFTRecipe)
