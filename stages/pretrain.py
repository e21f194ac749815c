"""Stage 1: next-token training of a decoder, from scratch or from a base's weights; or registering a base as it is."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.errors import UserError
from baton.questions import ask, load_questions
from baton.recipe import Decoder, PretrainRecipe
from baton.registry import Version
from baton.run import Run, program

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from transformers import PreTrainedTokenizerBase

    from baton.causal_trainer import CausalTrainer
    from baton.corpus.shards import Corpus, PreparedSource
    from baton.corpus_sections import CorpusData


def main(recipe: PretrainRecipe) -> Version:
    """Train a decoder on text, from scratch or from a base (mode: continue), or load one; publish it as a base."""
    run = Run.start(recipe)
    if version := run.already_published():
        return run.finish(version, "up to date")
    return run.finish(register_base(run) if recipe.mode == "load" else trained(run))


@dataclass(frozen=True)
class Start:
    """What a training starts from."""

    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    base: Version | None  # none from scratch
    folder: Path | None  # of the base
    token_metrics: dict[str, float]  # bytes per token by language and script; on rank 0


def trained(run: Run[PretrainRecipe]) -> Version:
    """Corpus, model, Trainer, measures, publish."""
    from transformers import set_seed

    from baton.causal_trainer import CausalTrainer
    from baton.corpus.rows import training_rows
    from baton.training import train_guarded

    recipe = run.recipe
    data, train = recipe.data, recipe.train
    assert data and train
    started = time.monotonic()
    load_questions(data.questions, recipe.folder)  # now, so that a bad file is refused before training
    start = prepare_start(run)
    metrics = measure(run, make_model(run, start), start, "before") if start.base else {}

    def make_trainer(skipped: tuple[int, ...]) -> CausalTrainer:
        set_seed(train.seed)
        model = make_model(run, start)
        rows = training_rows(start.corpus, data, train, pad_id_of(start.tokenizer), skipped)
        run.say(rows.report())
        return CausalTrainer(run, model, train, rows, skipped)

    trainer = train_guarded(run, make_trainer)
    if trainer.average is not None:
        trainer.average.write_to_model()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    # from here on, what is measured is what is published
    if start.base is None:
        refresh_unseen_rows(model, start.corpus.train, train.seed)
    model.to(published_dtype(run, start))
    metrics |= measure(run, model, start, "eval")
    if run.is_main:
        metrics |= start.token_metrics | statistical_baseline(run, start)
        metrics |= ask_base(run, data, model, start.tokenizer)
        show_continuations(run, model, start)
        metrics |= trainer.summary()
        metrics["parameters"] = sum(p.numel() for p in model.parameters())
        metrics["seconds"] = round(time.monotonic() - started, 1)
        run.log(train.steps, metrics)

    def write(folder: Path) -> None:
        model.config.use_cache = True
        model.save_pretrained(folder)
        start.tokenizer.save_pretrained(folder)

    parents = {"base": start.base} if start.base else None
    return run.publish(write, kind="base", metrics=metrics, parents=parents)


def prepare_start(run: Run[PretrainRecipe]) -> Start:
    """The base, if any, and the tokenised text: made by rank 0 where they are not there yet, opened by all."""
    from baton.corpus.prepare import prepared_corpus
    from baton.corpus.shards import Corpus
    from baton.corpus.table import corpus_table
    from baton.models import load_tokenizer
    from baton.token_report import measure_sources, report_table

    recipe = run.recipe
    base = base_version(run) if recipe.is_continued else None

    def prepared() -> tuple[str, str | None]:
        folder = run.registry.materialise(base) if base else None
        return str(prepared_corpus(recipe, folder, say=run.say).folder), str(folder) if folder else None

    place, folder = run.on_main(prepared)
    corpus = Corpus.open(Path(place))
    tokenizer = load_tokenizer(corpus.tokenizer_folder)
    told: dict[str, float] = {}
    if run.is_main:
        from rich.console import Console

        report = measure_sources(tokenizer, corpus.eval or corpus.train)
        Console().print(corpus_table(corpus), report_table({"this tokenizer": report}), sep="\n")
        told = report.metrics()
    return Start(tokenizer, corpus, base, Path(folder) if folder else None, told)


def base_version(run: Run[PretrainRecipe]) -> Version:
    """The base to continue from; a folder, a file or a hub id is registered first, so that it is a known parent."""
    if "base" in run.inputs.versions:
        return run.inputs.versions["base"]
    about = {"stage": "pretrain", "base": run.recipe.base}
    name = f"{run.recipe.publish.name}-start"
    return run.publish(external_writer(run), kind="base", name=name, alias="main", parents={}, recipe=about)


def make_model(run: Run[PretrainRecipe], start: Start) -> Any:
    """The model to train, in float32, whose steps are too fine for bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    from baton.document_borders import check_borders
    from baton.models import check_positions, num_ids

    recipe = run.recipe
    assert recipe.train
    if start.folder is None:
        assert recipe.model
        return build_decoder(recipe.model, start.tokenizer, recipe.train.sequence_length)
    check_positions(start.folder, recipe.train.sequence_length, "train.sequence_length")
    model: Any = AutoModelForCausalLM.from_pretrained(start.folder, dtype=torch.float32)
    model.config.use_cache = False  # a cache in training would let packed documents attend to each other
    if num_ids(start.tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise UserError(f"base: {recipe.base} has fewer embedding rows than its tokenizer has tokens")
    check_borders(model)
    return model.train()


def published_dtype(run: Run[PretrainRecipe], start: Start) -> torch.dtype:
    """From scratch what the recipe says; continued, the base's own."""
    import torch
    from transformers import AutoConfig

    if start.folder is None:
        assert run.recipe.model
        found = getattr(torch, run.recipe.model.dtype)
    else:
        found = AutoConfig.from_pretrained(start.folder).dtype or torch.float32
    assert isinstance(found, torch.dtype)
    return found


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """What rows are filled up with; never in the loss, so that a document's end will do where there is none."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert isinstance(found, int)
    return found


def measure(run: Run[PretrainRecipe], model: Any, start: Start, when: str) -> dict[str, Any]:
    """Held-out loss and bits per byte, in all and by source and language, as `when`/…; all processes share the work."""
    from baton.bits import bits_per_byte
    from baton.causal_trainer import micro_batch_tokens

    train = run.recipe.train
    assert train
    if not start.corpus.eval:
        return {}
    model.to(run.state.device)
    tokens_at_once = micro_batch_tokens(model.config, train, run.dtype, run.state.num_processes)
    found = bits_per_byte(model, start.corpus.eval, train.sequence_length, tokens_at_once, run.dtype, run.state)
    return {f"{when}/{name.removeprefix('eval/')}": value for name, value in found.items()}


def statistical_baseline(run: Run[PretrainRecipe], start: Start) -> dict[str, float]:
    """Bits per byte of an n-gram model of the very same tokens: what a neural model must beat."""
    from baton.bits import ngram_bits_per_byte
    from baton.models import num_ids

    order = run.recipe.ngram_order
    if not order:
        return {}
    return ngram_bits_per_byte(start.corpus.train, start.corpus.eval, order, num_ids(start.tokenizer))


def show_continuations(run: Run[PretrainRecipe], model: Any, start: Start) -> None:
    """Print how the model goes on from held-out text, a few samples a language, and keep them in the run's folder."""
    from rich.console import Console

    from baton.continuations import continuations, continuations_table

    if not run.recipe.continuations or not start.corpus.eval:
        return
    found = continuations(model, start.tokenizer, start.corpus.eval, run.recipe.continuations)
    Console().print(continuations_table(found))
    lines = [json.dumps(each._asdict(), ensure_ascii=False) + "\n" for each in found]
    (run.folder / "continuations.jsonl").write_text("".join(lines), encoding="utf-8")


def build_decoder(decoder: Decoder, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Any:
    """A Llama (Touvron et al. 2023) with random weights in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from baton.models import num_ids

    shape = decoder.shape(num_ids(tokenizer))
    config = LlamaConfig(
        vocab_size=num_ids(tokenizer),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=max(sequence_length, 1024),
        tie_word_embeddings=decoder.tie_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # small init (Nguyen and Salazar 2019): the usual 0.02 is far too little for narrow models
        initializer_range=math.sqrt(2 / (5 * shape.hidden_size)),
        use_cache=False,  # a cache in training would let packed documents attend to each other
    )
    return LlamaForCausalLM(config)


def refresh_unseen_rows(model: Any, sources: Sequence[PreparedSource], seed: int) -> None:
    """Give the embeddings of tokens that never occurred, such as the reserved chat tokens, separate random places.

    Such a row gets only the softmax's push, which is the same for all of them, and Adam scales it to full steps: they
    end at one point, where no adapter on frozen embeddings can tell the start of a turn from its end.
    """
    import numpy as np
    import torch

    rows_of_tokens = model.get_input_embeddings().weight.data
    counts = np.zeros(len(rows_of_tokens), dtype=np.int64)
    for source in sources:
        for piece in source.read_through():
            counts += np.bincount(piece, minlength=len(counts))
    seen = torch.from_numpy(counts > 0)
    noise = torch.randn(int((~seen).sum()), rows_of_tokens.shape[1], generator=torch.Generator().manual_seed(seed))
    known = rows_of_tokens[seen]
    rows_of_tokens[~seen] = known.mean(0) + known.std() * noise.to(rows_of_tokens)


def ask_base(
    run: Run[PretrainRecipe], data: CorpusData, model: Any, tokenizer: PreTrainedTokenizerBase
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
    return run.publish(external_writer(run), kind="base")


def external_writer(run: Run[PretrainRecipe]) -> Callable[[Path], None]:
    """What writes a base from outside the registry into a folder, once it was seen to compute."""
    from baton.external import load_external

    assert run.inputs.model
    source = run.inputs.model

    def write(folder: Path) -> None:
        model, tokenizer = load_external(source)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return write


if __name__ == "__main__":
    program(main, PretrainRecipe)
