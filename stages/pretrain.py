"""Stage 1: next-token pretraining of a small decoder from scratch, or registering an existing base model."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.data import Loaded, load, mix, report
from baton.questions import ask, load_questions
from baton.recipe import Decoder, PretrainRecipe, TextData
from baton.registry import Version
from baton.run import Run, program

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Document = tuple[list[int], list[bool]]


def main(recipe: PretrainRecipe) -> Version:
    """Train a tokenizer and a decoder on text, or load a base (mode: load), and publish it as a base version."""
    run = Run.start(recipe)
    if version := run.already_published():
        return run.finish(version, "up to date")
    return run.finish(register_base(run) if recipe.mode == "load" else from_scratch(run))


def from_scratch(run: Run[PretrainRecipe]) -> Version:
    """Tokenizer, packed text, Trainer, measures, publish."""
    import torch
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, set_seed

    from baton.packing import collate, pack
    from baton.schedule import row_order
    from baton.training import Recorder, drop_incomplete, mean_loss, trainer_settings

    recipe = run.recipe
    data, shape, train = recipe.data, recipe.model, recipe.train
    assert data and shape and train and recipe.tokenizer
    started = time.monotonic()
    texts = read_texts(run, data)
    tokenizer = shared_tokenizer(run, [row["text"] for row in texts["train"]])
    documents = {use: [encode_document(tokenizer, row["text"]) for row in rows] for use, rows in texts.items()}
    assert tokenizer.pad_token_id is not None
    packed = {use: pack(parts, train.sequence_length, int(tokenizer.pad_token_id)) for use, parts in documents.items()}
    run.say(
        f"{packed['train'].num_tokens:,} tokens of training text in {len(packed['train'].rows):,} rows of "
        f"{train.sequence_length}, {packed['train'].padding_share:.1%} padding; vocabulary of {len(tokenizer):,}"
    )

    set_seed(train.seed)
    model = build_decoder(shape, tokenizer, train.sequence_length)
    micro = (train.tokens_per_micro_batch or train.tokens_per_batch) // train.sequence_length
    order = row_order(len(packed["train"].rows), recipe.rows_per_batch, train.steps, train.seed)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**trainer_settings(run, train, recipe.rows_per_batch, micro)),
        train_dataset=Dataset.from_list(packed["train"].rows).select(order),
        data_collator=collate,
        callbacks=[Recorder(run, "pretrain", train.tokens_per_batch, "tokens")],
    )
    _quiet(trainer)
    trainer.train(resume_from_checkpoint=drop_incomplete(run))

    metrics: dict[str, Any] = {}
    trained = trainer.accelerator.unwrap_model(trainer.model)
    # from here on, what is measured is what is published
    refresh_unseen_rows(trained, packed["train"].rows, train.seed)
    trained.to(getattr(torch, shape.dtype))
    if run.is_main:
        if documents["eval"]:
            nats, count = mean_loss(trained, packed["eval"].rows, micro, run.dtype)
            num_bytes = sum(len(row["text"].encode()) for row in texts["eval"])
            metrics["eval/loss"] = nats
            metrics["eval/bits_per_byte"] = nats * count / math.log(2) / num_bytes
            if recipe.ngram_order:
                metrics["eval/ngram_bits_per_byte"] = ngram_bits_per_byte(
                    documents, recipe.ngram_order, len(tokenizer), num_bytes
                )
        metrics |= ask_base(run, data, trained, tokenizer)
        metrics["parameters"] = sum(p.numel() for p in trained.parameters())
        metrics["seconds"] = round(time.monotonic() - started, 1)
        run.log(train.steps, metrics)

    def write(folder: Path) -> None:
        trained.config.use_cache = True
        trained.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return run.publish(write, kind="base", metrics=metrics)


def read_texts(run: Run[PretrainRecipe], data: TextData) -> dict[str, list[dict[str, Any]]]:
    """{"train", "eval"} -> text rows, mixed by weight; prints what was kept and dropped."""
    assert run.recipe.train
    texts = {}
    for use, sources in (("train", data.train), ("eval", data.eval)):
        loaded: list[Loaded] = [load(source, run.recipe.folder, "text") for source in sources]
        run.say(report(loaded))
        texts[use] = mix(loaded, run.recipe.train.seed)
    load_questions(data.questions, run.recipe.folder)  # now, so that a bad file is refused before training
    return texts


def shared_tokenizer(run: Run[PretrainRecipe], texts: list[str]) -> PreTrainedTokenizerBase:
    """The tokenizer trained on rank 0 and read by every process."""
    from baton.bpe import train_tokenizer
    from baton.models import load_tokenizer

    settings = run.recipe.tokenizer
    assert settings
    folder = run.folder / "tokenizer"
    if run.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        train_tokenizer(texts, settings.vocab_size, settings.sample_bytes).save_pretrained(folder)
    run.state.wait_for_everyone()
    return load_tokenizer(folder)


def encode_document(tokenizer: PreTrainedTokenizerBase, text: str) -> Document:
    """(ids, in_loss): the document between two end-of-document tokens; all but the first are predicted."""
    end = int(tokenizer.eos_token_id)  # type: ignore[arg-type]
    ids = [end, *tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], end]  # type: ignore[misc]
    return ids, [True] * len(ids)


def build_decoder(shape: Decoder, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Any:
    """A Llama (Touvron et al. 2023) with random weights in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=max(sequence_length, 1024),
        tie_word_embeddings=shape.tie_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,  # a cache in training would let packed documents attend to each other
    )
    return LlamaForCausalLM(config)


def refresh_unseen_rows(model: Any, rows: list[dict[str, list[int]]], seed: int) -> None:
    """Give the embeddings of tokens that never occurred, such as the reserved chat tokens, separate random places.

    Such a row gets only the softmax's push, which is the same for all of them, and Adam scales it to full steps: they
    end at one point, where no adapter on frozen embeddings can tell the start of a turn from its end.
    """
    import torch

    rows_of_tokens = model.get_input_embeddings().weight.data
    seen = torch.zeros(len(rows_of_tokens), dtype=torch.bool)
    for row in rows:
        seen[torch.tensor(row["input_ids"])[torch.tensor(row["labels"]) != -100]] = True
    noise = torch.randn(int((~seen).sum()), rows_of_tokens.shape[1], generator=torch.Generator().manual_seed(seed))
    known = rows_of_tokens[seen]
    rows_of_tokens[~seen] = known.mean(0) + known.std() * noise.to(rows_of_tokens)


def ngram_bits_per_byte(documents: dict[str, list[Document]], order: int, vocabulary: int, num_bytes: int) -> float:
    """Held-out bits per byte of an interpolated n-gram model on the very same tokens: the statistical baseline."""
    from baton.ngram import train

    model = train([ids for ids, _ in documents["train"]], order, vocabulary)
    return model.nats([ids for ids, _ in documents["eval"]]) / math.log(2) / num_bytes


def ask_base(
    run: Run[PretrainRecipe], data: TextData, model: Any, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """What the base answers before any dialogue was seen, asked in the template that SFT will use."""
    from copy import deepcopy

    from baton.chat import install_template

    questions = load_questions(data.questions, run.recipe.folder)
    if not questions:
        return {}
    asking = deepcopy(tokenizer)
    install_template(asking, "chatml", run.recipe.folder)
    model.eval()
    model.config.use_cache = True
    return ask(model, asking, questions)[0]


def register_base(run: Run[PretrainRecipe]) -> Version:
    """Load an existing base, check that it computes, and publish it in its own dtype."""
    from baton.external import load_external

    assert run.inputs.model
    source = run.inputs.model

    def write(folder: Path) -> None:
        model, tokenizer = load_external(source)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return run.publish(write, kind="base")


def _quiet(trainer: Any) -> None:
    """Without tqdm the Trainer prints every log as a dict; Recorder shows and keeps them."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


if __name__ == "__main__":
    program(main, PretrainRecipe)
