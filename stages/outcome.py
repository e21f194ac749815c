"""What a PPO run has reached: the policy against the reference on held-out prompts, samples, and publishing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.questions import ask
from baton.recipe import PPORecipe
from baton.registry import Version
from baton.run import Run
from stages.prompts import Prompts, micro_batch_size, sample

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from stages.roles import Roles
    from stages.rollout import Episode

EVAL_EPISODES_FROM = 1 << 40
"""Held-out rollouts take their sampling noise from here on, away from training's."""


def evaluate(
    run: Run[PPORecipe], roles: Roles, tokenizer: PreTrainedTokenizerBase, prompts: Prompts
) -> dict[str, float]:
    """The same held-out prompts, noise and questions for the reference (`…_before`) and the policy."""
    metrics: dict[str, float] = {}
    texts: dict[str, list[str]] = {}
    for role, suffix in (("reference", "_before"), ("policy", "")):
        found: dict[str, float] = {}
        if prompts.eval:
            episodes = held_out(run, roles, tokenizer, prompts.eval, role)
            texts[role] = [str(tokenizer.decode(e.reply.ids, skip_special_tokens=True)) for e in episodes]
            found |= {f"eval/{key}": value for key, value in judge(run, roles, tokenizer, episodes, role).items()}
        with roles.acting_as(role) as model:
            found |= ask(model, tokenizer, prompts.questions)[0]
        metrics |= {key + suffix: value for key, value in found.items()}
    if prompts.eval:
        show_samples(run, tokenizer, prompts.eval, texts)
    return metrics


def held_out(
    run: Run[PPORecipe], roles: Roles, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], role: str
) -> list[Episode]:
    """Sampled replies to the held-out prompts."""
    indices = [EVAL_EPISODES_FROM + at for at in range(len(prompts))]
    return sample(run.recipe, roles, tokenizer, prompts, indices, role)


def judge(
    run: Run[PPORecipe], roles: Roles, tokenizer: PreTrainedTokenizerBase, episodes: list[Episode], role: str
) -> dict[str, float]:
    """Mean reward, KL from the reference in nats a reply, length and share of finished replies."""
    import torch

    from stages.roles import REFERENCE
    from stages.rollout import make_micro_batch

    totals = torch.zeros(4, dtype=torch.float64)
    size = micro_batch_size(run)
    pad_id = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    with torch.no_grad():
        for at in range(0, len(episodes), size):
            batch = make_micro_batch(episodes[at : at + size], pad_id, run.state.device)
            kl = roles.logprobs(role, batch) - roles.logprobs(REFERENCE, batch)
            parts = (roles.scores(batch), kl, batch.is_response, batch.ended)
            totals += torch.stack([part.double().sum().cpu() for part in parts])
    reward, kl_nats, length, eos = (totals / len(episodes)).tolist()
    return {"reward": reward, "kl_nats": kl_nats, "length": length, "eos_rate": eos}


def show_samples(
    run: Run[PPORecipe],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    texts: dict[str, list[str]],
) -> None:
    """Write samples.jsonl; print a few replies before and after."""
    rows = [
        {"prompt": str(tokenizer.decode(ids, skip_special_tokens=True)), "before": before, "after": after}
        for ids, before, after in zip(prompts, texts["reference"], texts["policy"], strict=True)
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (run.folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    for row in rows[: run.recipe.samples]:
        run.say(f"\nprompt  {row['prompt'].strip()}\nbefore  {row['before'].strip()}\nafter   {row['after'].strip()}")


def publish(
    run: Run[PPORecipe],
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    metrics: dict[str, float],
    base: Path,
    dtype: torch.dtype,
    prompts: Prompts,
) -> Version:
    """The policy, and the value model where the recipe names one; the policy is reloaded and compared first."""
    recipe = run.recipe
    base_version = run.registry.by_digest(run.inputs.versions["sft"].manifest["base"])

    def write_policy(folder: Path) -> None:
        roles.save_policy(folder)
        tokenizer.save_pretrained(folder)
        check_reload(roles, base, folder, dtype, prompts.train[0])

    def write_value(folder: Path) -> None:
        roles.save_value(folder)
        tokenizer.save_pretrained(folder)

    if recipe.publish_value:
        run.publish(
            write_value,
            kind="value",
            base=base_version,
            name=recipe.publish_value.name,
            alias=recipe.publish_value.alias,
        )
    return run.publish(write_policy, kind="adapter", base=base_version, metrics=metrics)


def check_reload(roles: Roles, base: Path, folder: Path, dtype: torch.dtype, ids: list[int]) -> None:
    """The written adapter on a fresh base gives the logits of the policy in memory, up to the dtype's rounding."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from stages.roles import POLICY

    device = next(roles.parameters()).device
    fresh: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    fresh = PeftModel.from_pretrained(fresh, folder).to(device).eval()
    given = torch.tensor([ids], device=device)
    with torch.no_grad(), roles.acting_as(POLICY) as model:
        ours = model(input_ids=given).logits[0, -1].float().log_softmax(-1)
        theirs = fresh(input_ids=given).logits[0, -1].float().log_softmax(-1)
    gap = float((ours.exp() * (ours - theirs)).sum())
    bound = 1e-6 if dtype is torch.float32 else 1e-2
    if gap > bound:
        raise RuntimeError(
            f"the policy does not survive being saved: reloaded, its next-token distribution is {gap:.3g} nats "
            "away from "
            "the policy in memory; nothing was published"
        )
