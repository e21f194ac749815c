"""What each size of a ladder is trained on and how: tokens, compute, learning rate, batch, and its recipe's file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from baton.errors import UserError
from baton.ladder_plot import Rung
from baton.ladder_sections import LadderRecipe, Size
from baton.pretrain_sections import PretrainRecipe
from baton.scaling import learning_rate, matrix_parameters, tokens_per_batch, training_flops_per_token
from baton.strict import explain

WARMUP_SHARE = 0.05
LEAST_ROWS = 4
"""Rows of a batch are a multiple of it, so that a few processes can share them."""

LEAST_STEPS = 1000
"""Measured: models of 38,000 and 58,000 parameters, 12 tokens a parameter, reach the same loss after 450 steps each."""


@dataclass(frozen=True)
class Plan:
    """One size before its training."""

    size: str
    parameters: int  # that multiply: layers and output head
    tokens: int
    flops: float
    content: dict[str, Any]  # its pretrain recipe

    def rung(self, loss: float, bits_per_byte: float | None, seconds: float | None) -> Rung:
        """The size with what its training told."""
        return Rung(self.size, self.parameters, self.tokens, self.flops, loss, bits_per_byte, seconds)


def plan_rungs(recipe: LadderRecipe) -> list[Plan]:
    """A plan for every size, each checked as the pretrain recipe that it will be. Raises UserError.

    The last size must cost more than any other: its prediction goes beyond what was seen, not back into it.
    """
    vocabulary = vocabulary_of(recipe)
    plans = [plan_rung(recipe, size, vocabulary) for size in recipe.sizes]
    for smaller, larger in zip(plans, plans[1:], strict=False):
        if larger.flops <= smaller.flops:
            raise UserError(
                f"{recipe.path}: sizes: {larger.size} costs {larger.flops:.2e} FLOPs, {smaller.size} before it "
                f"{smaller.flops:.2e}; order the sizes by compute, the one to predict last"
            )
    return plans


def plan_rung(recipe: LadderRecipe, size: Size, vocabulary: int) -> Plan:
    """Tokens by parameters, steps by tokens; learning rate and batch by compute where the recipe leaves them out."""
    length = int(recipe.train["sequence_length"])
    shape = size.model.shape(vocabulary)
    parameters = matrix_parameters(*shape, vocabulary)
    # attention by whole rows, as the model FLOPs of every training are counted (baton/throughput.py)
    per_token = training_flops_per_token(parameters, shape.layers, shape.hidden_size, length)
    wanted = recipe.tokens_per_parameter * parameters
    train = recipe.train | size.train
    least = LEAST_ROWS * length
    rule = {
        "learning_rate": float(f"{learning_rate(wanted * per_token):.3g}"),
        "tokens_per_batch": least * max(1, round(tokens_per_batch(wanted * per_token) / least)),
    }
    batch = int(train.get("tokens_per_batch", rule["tokens_per_batch"]))
    steps = max(1, round(wanted / batch))
    rule["warmup_steps"] = max(1, round(WARMUP_SHARE * steps)) if train.get("schedule") != "constant" else 0
    content = recipe.rung_content(size, steps, rule)
    if size is not recipe.sizes[-1]:
        content["continuations"] = 0  # samples are worth reading of the best model alone
    try:
        PretrainRecipe.model_validate(content)
    except ValidationError as error:
        raise UserError(explain(f"{recipe.path}: size {size.name}", PretrainRecipe, error)) from None
    return Plan(size.name, parameters, steps * batch, per_token * steps * batch, content)


def too_short(plans: list[Plan]) -> list[str]:
    """The sizes that are trained so few steps that their loss follows the steps more than the compute."""
    return [plan.size for plan in plans if plan.content["train"]["steps"] < LEAST_STEPS]


def vocabulary_of(recipe: LadderRecipe) -> int:
    """Tokens of the vocabulary: those asked for, or those of the tokenizer at `tokenizer.path`."""
    settings = recipe.tokenizer
    if settings.vocab_size is not None:
        return settings.vocab_size
    from baton.models import load_tokenizer, num_ids

    assert settings.path is not None
    folder = recipe.folder / settings.path
    if not folder.is_dir():
        raise UserError(
            f"{recipe.path}: tokenizer.path: there is no folder {folder}; a ladder counts its parameters by a "
            "tokenizer's folder, or by tokenizer.vocab_size"
        )
    return num_ids(load_tokenizer(folder))


def write_recipe(recipe: LadderRecipe, plan: Plan) -> Path:
    """Write the size's pretrain recipe into its run's folder, with the data's paths as seen from there."""
    import yaml

    folder = Path(plan.content["run_dir"])
    content = plan.content | {"data": dict(plan.content["data"])}
    for use in ("train", "eval", "questions"):
        if use in content["data"]:
            content["data"][use] = [
                source | {"path": _moved(source["path"], recipe.folder, folder)} for source in content["data"][use]
            ]
    path = folder / "recipe.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_name("recipe.yaml.new")
    aside.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(aside, path)
    return path


def _moved(path: str, before: Path, after: Path) -> str:
    """A data path relative to the folder `before` as seen from `after`; hub ids and absolute paths stay."""
    from baton.data.files import locate

    if Path(path).expanduser().is_absolute() or "://" in path or locate(path, before) is None:
        return path
    return os.path.relpath(os.path.join(os.path.abspath(before), path), os.path.abspath(after))
