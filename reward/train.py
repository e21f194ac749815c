"""Training of the reward model: SFT's adapter goes on as the reward's, with a score head, on preference pairs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.errors import UserError
from baton.recipe import RewardRecipe
from baton.registry import Version
from baton.run import Run, program

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reward.knowledge.measure import Knowledge
    from reward.members import Members
    from reward.pairs import Pair

REPORT = "reward_report.html"


def main(recipe: RewardRecipe) -> Version:
    """Train a reward model, or an ensemble, from an SFT version; measure it on held-out pairs and publish it."""
    run = Run.start(recipe)
    if version := run.already_published():
        return run.finish(version, "up to date")
    from transformers import set_seed

    from baton.models import base_folder, check_positions, load_tokenizer
    from baton.training import train_guarded
    from reward.members import Members
    from reward.pairs import encode_pairs, read_all_pairs
    from reward.trainer import PairTrainer

    started = time.monotonic()
    rows = read_all_pairs(run)
    sft = run.inputs.versions["sft"]
    with run.state.main_process_first():
        folder, base = run.registry.materialise(sft), base_folder(run.registry, sft)
    check_positions(base, recipe.train.max_length, "train.max_length")
    tokenizer = load_tokenizer(folder)
    pairs = {"train": encode_pairs(run, tokenizer, rows.train, "train")}
    pairs["eval"] = encode_pairs(run, tokenizer, rows.eval, "eval")
    check_margins(recipe, pairs["train"])

    assert tokenizer.pad_token_id is not None
    pad_id = int(tokenizer.pad_token_id)

    def make_trainer(skipped: tuple[int, ...]) -> PairTrainer:
        set_seed(recipe.train.seed)
        members = Members.from_sft(
            base,
            folder if sft.kind == "adapter" else None,
            run.dtype,
            pad_id,
            count=recipe.ensemble,
            trained=recipe.trained,
            seed=recipe.train.seed,
            lora=recipe.lora,
        )
        return PairTrainer(run, members, pairs, skipped)

    trainer = train_guarded(run, make_trainer)
    members = trainer.members
    trainer.keep_best()
    members.round_as_saved()  # what is measured is what is published

    metrics: dict[str, Any] = rows.facts | {f"data/{use}/pairs": len(pairs[use]) for use in ("train", "eval")}
    known: Knowledge | None = None
    if run.is_main:
        metrics |= trainer.summary()
        known = learn_about(run, members, tokenizer, pairs)
        metrics |= known.metrics if known else {}
        metrics["seconds"] = round(time.monotonic() - started, 1)
        run.log(trainer.state.global_step, metrics)

    def write(target: Path) -> None:
        write_members(members, tokenizer, target, [pair.chosen_ids for pair in pairs["train"][:8]])
        if known:
            write_page(run, known, target)

    is_adapter = recipe.trained != "full"
    under = run.registry.by_digest(sft.manifest["base"]) if sft.kind == "adapter" else sft
    on_base = under if is_adapter else None
    return run.finish(run.publish(write, kind="reward", base=on_base, metrics=metrics))


def check_margins(recipe: RewardRecipe, pairs: list[Pair]) -> None:
    """Raises UserError when the recipe weighs margins and no training pair has one."""
    if recipe.loss.margin_weight and not any(pair.margin for pair in pairs):
        raise UserError(
            f"loss.margin_weight would be ignored: none of {len(pairs):,} training pairs has a margin. Give the rows a "
            "`margin`, or leave it out"
        )


def learn_about(
    run: Run[RewardRecipe],
    members: Members,
    tokenizer: PreTrainedTokenizerBase,
    pairs: dict[str, list[Pair]],
) -> Knowledge | None:
    """What held-out pairs and samples of SFT's say of the reward; None where no held-out pair was won by a side."""
    from baton.models import load_policy
    from reward.knowledge.measure import know
    from reward.knowledge.sft_samples import held_out_prompts, sample_sft

    if all(pair.is_tie for pair in pairs["eval"]):
        return None
    settings = run.recipe.measure
    samples = []
    if settings.sft_samples:
        policy, _ = load_policy(run.registry, run.inputs.versions["sft"], str(run.dtype).removeprefix("torch."))
        samples = sample_sft(
            policy.to(run.state.device),
            tokenizer,
            held_out_prompts(pairs["eval"], settings.sft_samples),
            max_new_tokens=settings.max_new_tokens,
            seed=run.recipe.train.seed,
        )
    return know(
        members.score,
        tokenizer,
        pairs["eval"],
        samples=samples,
        fitting=[pair for pair in pairs["train"][: len(pairs["eval"])] if not pair.is_tie],
        num_perturbed=settings.perturbed,
        max_tokens=run.recipe.train.max_length,
    )


def write_page(run: Run[RewardRecipe], known: Knowledge, target: Path) -> None:
    """The report, in the version and, where people look first, in the run's folder."""
    from reward.knowledge.report import write_report

    recipe = run.recipe
    facts = {"trained": recipe.trained, "members": str(recipe.ensemble), "from": run.inputs.versions["sft"].ref}
    for folder in (target, run.folder):
        write_report(folder / REPORT, known, name=recipe.publish.name, facts=facts)


def write_members(members: Members, tokenizer: PreTrainedTokenizerBase, target: Path, samples: list[list[int]]) -> None:
    """Write every member with its head, then load each by plain transformers and peft and score `samples` again.

    A lost head would show here: RuntimeError.
    """
    from baton.adapters import MEMBERS, member_folders

    for number in range(len(members)):
        members.save(number, target / MEMBERS / str(number) if number else target)
    tokenizer.save_pretrained(target)
    for number, folder in enumerate(member_folders(target)):
        check_member(members, number, folder, samples)


def check_member(members: Members, number: int, folder: Path, samples: list[list[int]]) -> None:
    """Score `samples` by the member in memory and by the one in `folder`: RuntimeError where they differ.

    In bfloat16 the two ways to compute a low-rank product round differently, which a sharply trained model can magnify
    on single samples to more than any bound that would still tell a lost factor: then float32 decides.
    """
    import torch

    is_narrow = members.dtype is torch.bfloat16
    before, after = members.score(samples)[number], score_as_others_do(members, folder, samples)
    gap = float((before - after).abs().max())
    if gap <= (0.05 if is_narrow else 1e-4) * (1 + float(before.abs().max())):
        return
    if is_narrow:
        check_member(members.in_float32(), number, folder, samples)
        return
    raise RuntimeError(
        f"the reward model does not survive being saved: reloaded, member {number} scores {gap:.3g} away from "
        f"the model in memory ({after.tolist()} against {before.tolist()}); nothing was published"
    )


def score_as_others_do(members: Members, folder: Path, samples: list[list[int]]) -> Any:
    """Scores (N,) of a saved member that was loaded as any user of transformers and peft would load it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from reward.scoring import score

    is_whole = members.trained == "full"
    source = folder if is_whole else members.base_folder
    # a fully trained model is saved in its base's number format, an adapter was trained on the base as it was loaded
    dtype = members.dtype if is_whole else members.base_dtype
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=dtype)
    model = loaded.to(members.dtype)
    model.config.pad_token_id = members.pad_id
    if not is_whole:
        model = PeftModel.from_pretrained(model, folder)
    device = members.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=members.dtype is torch.bfloat16):
        return score(model.to(device).eval(), samples, members.pad_id)


if __name__ == "__main__":
    program(main, RewardRecipe)
