"""Training of the reward model: SFT's adapter goes on as the reward's, with a score head, on preference pairs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.data import load, mix, report
from baton.errors import UserError
from baton.recipe import RewardRecipe
from baton.registry import Version
from baton.run import Run, program

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pairs = dict[str, list[list[int]]]
"""{"chosen_ids", "rejected_ids"}, the columns that TRL's RewardTrainer reads."""


def main(recipe: RewardRecipe) -> Version:
    """Train a reward model with TRL's RewardTrainer from an SFT version and publish its adapter and head."""
    run = Run.start(recipe)
    if version := run.already_published():
        return run.finish(version, "up to date")
    from datasets import Dataset
    from transformers import PrinterCallback, set_seed
    from trl import RewardConfig, RewardTrainer

    from baton.models import base_folder, load_tokenizer
    from baton.schedule import row_order
    from baton.training import Recorder, drop_incomplete, trainer_settings
    from reward.scoring import pair_metrics

    started = time.monotonic()
    train = recipe.train
    data = {use: read_pairs(run, use) for use in ("train", "eval")}
    sft = run.inputs.versions["sft"]
    with run.state.main_process_first():
        folder, base = run.registry.materialise(sft), base_folder(run.registry, sft)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id is not None
    pairs = {use: encode_pairs(run, tokenizer, rows, use) for use, rows in data.items()}

    set_seed(train.seed)
    dtype = run.dtype
    model = reward_from_sft(base, folder, dtype, int(tokenizer.pad_token_id))
    settings = trainer_settings(run, train, train.pairs_per_batch, train.pairs_per_micro_batch or train.pairs_per_batch)
    lengths = [max(len(a), len(b)) for a, b in zip(*pairs["train"].values(), strict=True)]
    order = row_order(len(lengths), train.pairs_per_batch, train.steps, train.seed, lengths)
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**settings, max_length=None),
        train_dataset=Dataset.from_dict(pairs["train"]).select(order),
        processing_class=tokenizer,
        callbacks=[Recorder(run, "reward", train.pairs_per_batch, "pairs")],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=drop_incomplete(run))
    trained = trainer.accelerator.unwrap_model(trainer.model).eval()

    metrics: dict[str, Any] = {}
    held_out = pairs["eval"]
    if run.is_main:
        if held_out["chosen_ids"]:
            metrics = pair_metrics(
                trained, held_out["chosen_ids"], held_out["rejected_ids"], int(tokenizer.pad_token_id)
            )
        metrics["seconds"] = round(time.monotonic() - started, 1)
        run.log(train.steps, metrics)
    version = run.publish(
        lambda target: write_reward(run, trained, tokenizer, target, base, dtype, pairs["train"]["chosen_ids"][:8]),
        kind="reward",
        base=run.registry.by_digest(sft.manifest["base"]),
        metrics=metrics,
    )
    return run.finish(version)


def read_pairs(run: Run[RewardRecipe], use: str) -> list[dict[str, Any]]:
    """Preference rows of one use, mixed by weight; prints what was kept and dropped."""
    loaded = [load(source, run.recipe.folder, "preference") for source in getattr(run.recipe.data, use)]
    if loaded:
        run.say(report(loaded))
    return mix(loaded, run.recipe.train.seed)


def encode_pairs(
    run: Run[RewardRecipe], tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], use: str
) -> Pairs:
    """Both sides as the reward model reads them; a pair with a side over `max_length` tokens is dropped and counted."""
    from baton.chat import encode_scored, has_control_text

    pairs: Pairs = {"chosen_ids": [], "rejected_ids": []}
    limit = run.recipe.train.max_length
    num_long = num_control = 0
    for row in rows:
        if has_control_text(tokenizer, row["prompt"] + row["chosen"] + row["rejected"]):
            num_control += 1
            continue
        chosen = encode_scored(tokenizer, row["prompt"] + row["chosen"])
        rejected = encode_scored(tokenizer, row["prompt"] + row["rejected"])
        if max(len(chosen), len(rejected)) > limit:
            num_long += 1
            continue
        pairs["chosen_ids"].append(chosen)
        pairs["rejected_ids"].append(rejected)
    if rows and not pairs["chosen_ids"]:
        raise UserError(
            f"data.{use}: none of {len(rows):,} pairs is left: all have a side longer than train.max_length = {limit} "
            "tokens; raise it"
        )
    if rows:
        run.say(
            f"{use}: {len(pairs['chosen_ids']):,} pairs; {num_long:,} longer than {limit} tokens dropped, "
            f"{num_control:,} that spell out a special token dropped"
        )
    return pairs


def reward_from_sft(base: Path, adapter: Path, dtype: Any, pad_id: int) -> Any:
    """A sequence classifier on `base` whose LoRA adapter starts as a copy of the SFT adapter in `adapter`.

    The score head starts at zero, so that training starts from equal rewards, and is trained and saved whole. Giving
    the SFT folder to RewardTrainer together with a new configuration would discard SFT: both would be named default.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification

    from baton.adapters import SCORE_KEY, lora_config_from, read_adapter, set_adapter_tensors

    config, tensors = read_adapter(adapter)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=dtype)
    model.config.pad_token_id = pad_id
    model.config.use_cache = False
    model = get_peft_model(model, lora_config_from(config, task_type="SEQ_CLS", modules_to_save=["score"]))
    hidden = model.config.get_text_config().hidden_size
    set_adapter_tensors(model, tensors | {SCORE_KEY: torch.zeros(1, hidden)}, "default")
    for name, parameter in model.named_parameters():
        if name.endswith("score.modules_to_save.default.weight"):
            parameter.data = parameter.data.float()
            assert parameter.requires_grad, "the score head is frozen"
    return model


def write_reward(
    run: Run[RewardRecipe],
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    base: Path,
    dtype: Any,
    samples: list[list[int]],
) -> None:
    """Write adapter, head and tokenizer; reload them on a fresh base and rescore: a lost head would show here."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from reward.scoring import score

    assert tokenizer.pad_token_id is not None
    pad_id = int(tokenizer.pad_token_id)
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16)
    with autocast:
        before = score(model, samples, pad_id)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=dtype)
    fresh.config.pad_token_id = pad_id
    with autocast:
        after = score(PeftModel.from_pretrained(fresh, target).to(device).eval(), samples, pad_id)
    gap = float((before - after).abs().max())
    bound = (
        0.02 * (1 + float(before.abs().max())) if dtype is torch.bfloat16 else 1e-4 * (1 + float(before.abs().max()))
    )
    if gap > bound:
        raise RuntimeError(
            f"the reward model does not survive being saved: reloaded, it scores {gap:.3g} away from the model "
            "in memory "
            f"({after.tolist()} against {before.tolist()}); nothing was published"
        )


if __name__ == "__main__":
    program(main, RewardRecipe)
