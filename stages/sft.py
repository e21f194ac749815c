"""Stage 2: supervised fine-tuning on dialogues: a LoRA adapter, with the loss on the assistant's turns only."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.data import load, mix, report
from baton.errors import UserError
from baton.questions import ask, load_questions
from baton.recipe import SFTRecipe
from baton.registry import Version
from baton.run import Run, program

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from baton.packing import Packed


def main(recipe: SFTRecipe) -> Version:
    """Train a LoRA adapter on dialogues with TRL's SFTTrainer and publish it with its tokenizer and chat template."""
    run = Run.start(recipe)
    if version := run.already_published():
        return run.finish(version, "up to date")
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, PrinterCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    from baton.adapters import new_lora_config
    from baton.chat import install_template
    from baton.models import load_tokenizer
    from baton.packing import collate
    from baton.schedule import row_order
    from baton.training import Recorder, drop_incomplete, trainer_settings

    started = time.monotonic()
    train = recipe.train
    dialogues, questions = read_dialogues(run)
    base = base_version(run)
    with run.state.main_process_first():
        folder = run.registry.materialise(base)
    tokenizer = load_tokenizer(folder)
    install_template(tokenizer, recipe.chat_template, recipe.folder)
    packed = {use: pack_dialogues(run, tokenizer, rows, use) for use, rows in dialogues.items()}

    set_seed(train.seed)
    dtype = run.dtype
    # the frozen base stays in the compute dtype: cast once here, not at every use under autocast
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), new_lora_config(recipe.lora))
    model.config.use_cache = False  # a cache in training would let packed dialogues attend to each other
    micro = (train.tokens_per_micro_batch or train.tokens_per_batch) // train.sequence_length
    settings = trainer_settings(run, train, recipe.rows_per_batch, micro)
    order = row_order(len(packed["train"].rows), recipe.rows_per_batch, train.steps, train.seed)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings, max_length=train.sequence_length, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=Dataset.from_list(packed["train"].rows).select(order),
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[Recorder(run, "sft", train.tokens_per_batch, "tokens")],
    )
    trainer.remove_callback(PrinterCallback)
    last = drop_incomplete(run)
    metrics: dict[str, Any] = {}
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if run.is_main:
        with trained.disable_adapter():
            metrics |= measure(run, trained, tokenizer, packed["eval"], questions, micro, dtype, "_before")
    trainer.train(resume_from_checkpoint=last)
    if run.is_main:
        metrics |= measure(run, trained, tokenizer, packed["eval"], questions, micro, dtype, "")
        metrics["seconds"] = round(time.monotonic() - started, 1)
        run.log(train.steps, metrics)

    def write(target: Path) -> None:
        trained.save_pretrained(target)
        tokenizer.save_pretrained(target)

    return run.finish(run.publish(write, kind="adapter", base=base, parents={"base": base}, metrics=metrics))


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
    """Rendered, masked, cut at `sequence_length`, packed; dialogues with nothing left to train are counted."""
    from baton.chat import encode_dialogue, has_control_text
    from baton.packing import pack

    length = run.recipe.train.sequence_length
    documents = []
    num_cut = num_empty = num_control = 0
    for row in rows:
        if has_control_text(tokenizer, row["messages"]):
            num_control += 1
            continue
        ids, is_response = encode_dialogue(tokenizer, row["messages"])
        num_cut += len(ids) > length
        ids, is_response = ids[:length], is_response[:length]
        if any(is_response):
            documents.append((ids, is_response))
        else:
            num_empty += 1
    if rows and not documents:
        raise UserError(
            f"data.{use}: no dialogue has an assistant's token within train.sequence_length = {length} tokens "
            f"({len(rows):,} dialogues, {num_cut:,} longer); raise train.sequence_length"
        )
    assert tokenizer.pad_token_id is not None
    packed = pack(documents, length, int(tokenizer.pad_token_id))
    if rows:
        run.say(
            f"{use}: {len(documents):,} dialogues, {packed.num_tokens:,} tokens, {packed.num_in_loss:,} of them "
            "trained; "
            f"{len(packed.rows):,} rows of {length}, {packed.padding_share:.1%} padding; {num_cut:,} dialogues cut, "
            f"{num_empty:,} dropped because no assistant's token was left, {num_control:,} because they spell out a "
            "special token"
        )
    return packed


def measure(
    run: Run[SFTRecipe],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Packed,
    questions: list[Any],
    rows_at_once: int,
    dtype: Any,
    suffix: str,
) -> dict[str, float]:
    """Held-out loss and answers, each key with `suffix`."""
    from baton.training import mean_loss

    metrics: dict[str, float] = {}
    if held_out.rows:
        metrics["eval/loss"], _ = mean_loss(model, held_out.rows, rows_at_once, dtype)
    if questions:
        was_training = model.training
        model.eval()
        metrics |= ask(model, tokenizer, questions)[0]
        model.train(was_training)
    return {key + suffix: value for key, value in metrics.items()}


if __name__ == "__main__":
    program(main, SFTRecipe)
