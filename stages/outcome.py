"""What a PPO run publishes: the policy, and the critic where asked for; each is reloaded and compared first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from baton.models import write_stops
from baton.recipe import PPORecipe
from baton.registry import Version
from baton.run import Run
from stages.roles import POLICY, Roles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def publish(
    run: Run[PPORecipe],
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    metrics: dict[str, float],
    ids: list[int],
) -> Version:
    """The critic where the recipe names one, then the policy; `ids` are a prompt to compare with."""
    recipe, cast = run.recipe, roles.cast
    sft = run.inputs.versions["sft"]
    base = run.registry.by_digest(sft.manifest["base"]) if sft.manifest["base"] else sft

    def write_policy(folder: Path) -> None:
        roles.save_policy(folder)
        tokenizer.save_pretrained(folder)
        if cast.policy == "full":
            _copy_generation_config(cast.base, folder)
            write_stops(folder, tokenizer)  # a base under SFT's adapter names other ones
        samples = run.folder / "samples.jsonl"
        if samples.is_file():
            (folder / samples.name).write_bytes(samples.read_bytes())
        check_policy(roles, folder, ids)

    def write_value(folder: Path) -> None:
        roles.save_value(folder)
        tokenizer.save_pretrained(folder)
        check_value(roles, folder, tokenizer, ids)

    if recipe.publish_value:
        run.publish(
            write_value,
            kind="value",
            base=None if cast.critic == "separate" else base,
            name=recipe.publish_value.name,
            alias=recipe.publish_value.alias,
        )
    if cast.policy == "full":
        return run.publish(write_policy, kind="merged", metrics=metrics)
    return run.publish(write_policy, kind="adapter", base=base, metrics=metrics)


def _copy_generation_config(base: Path, folder: Path) -> None:
    path = base / "generation_config.json"
    if path.is_file():
        (folder / path.name).write_bytes(path.read_bytes())


def _coarser(dtype: torch.dtype, complete: Path | None) -> torch.dtype:
    """The number format that decides how exactly a model comes back: a complete one is saved in its base's own."""
    from transformers import AutoConfig

    saved = AutoConfig.from_pretrained(complete).dtype if complete else None
    return dtype if saved in (None, torch.float32) else torch.bfloat16


def _bound_nats(dtype: torch.dtype) -> float:
    """Largest divergence between the model in memory and the reloaded one."""
    return 1e-6 if dtype is torch.float32 else 1e-2


@torch.no_grad()
def check_policy(roles: Roles, folder: Path, ids: list[int]) -> None:
    """The written policy, reloaded by transformers and peft alone, gives the next-token distribution of ours."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    device, dtype = roles.value_head.weight.device, roles.compute_dtype
    if roles.cast.policy == "full":
        fresh: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        fresh = AutoModelForCausalLM.from_pretrained(roles.cast.base, dtype=dtype)
        fresh = PeftModel.from_pretrained(fresh, folder)
    given = torch.tensor([ids], device=device)
    theirs = fresh.to(device).eval()(input_ids=given).logits[0, -1].float().log_softmax(-1)
    with roles.acting_as(POLICY) as model:
        ours = model(input_ids=given).logits[0, -1].float().log_softmax(-1)
    gap = float((ours.exp() * (ours - theirs)).sum())
    if not gap <= _bound_nats(_coarser(dtype, folder if roles.cast.policy == "full" else None)):
        raise RuntimeError(
            f"the policy does not survive being saved: reloaded, its next-token distribution is {gap:.3g} nats away "
            "from the policy in memory; nothing was published"
        )


@torch.no_grad()
def check_value(roles: Roles, folder: Path, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    """The written critic, reloaded as a classifier, gives the value of ours at the last of `ids`."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from baton.decode import Reply
    from stages.micro_batch import make_micro_batch
    from stages.rollout import Episode

    device, dtype = roles.value_head.weight.device, roles.compute_dtype
    complete = roles.cast.critic == "separate"
    fresh: Any = AutoModelForSequenceClassification.from_pretrained(
        folder if complete else roles.cast.base, num_labels=1, dtype=dtype
    )
    fresh.config.pad_token_id = tokenizer.pad_token_id
    if not complete:
        fresh = PeftModel.from_pretrained(fresh, folder)
    theirs = float(fresh.to(device).eval()(input_ids=torch.tensor([ids], device=device)).logits[0, 0])
    # the value of the state that a reply of one token starts from is read at the prompt's last token
    episode = Episode(0, ids, Reply([ids[-1]], False))
    ours = float(roles.values(make_micro_batch([episode], [0], 0).to(device))[0, 0])
    bound = 1e-4 if _coarser(dtype, folder if complete else None) is torch.float32 else 5e-2
    if not abs(ours - theirs) <= bound * max(1.0, abs(ours)):
        raise RuntimeError(
            f"the critic does not survive being saved: reloaded, it gives {theirs:.4g} where the critic in memory "
            f"gives {ours:.4g}; nothing was published"
        )
