"""A published reward measured on data of one's own, at any time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.errors import UserError
from baton.registry import Registry, Version
from reward.knowledge.debias import LengthFit
from reward.knowledge.measure import Knowledge, know
from reward.knowledge.report import write_report
from reward.knowledge.sft_samples import SftSample, held_out_prompts, sample_sft
from reward.pairs import Pair, encode_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from reward.classifier import ClassifierSource


@dataclass(frozen=True)
class Question:
    """On what a reward is measured, and how much of it."""

    data: tuple[str, ...]
    format: str | None
    limit: int  # pairs of each source
    max_length: int  # tokens
    num_perturbed: int  # pairs
    sampled: tuple[str, int, int] | None = None  # a policy's reference, prompts, tokens of a reply


def ask(
    registry: Registry, ref: str, question: Question, out: Path, say: Callable[[str], None] = lambda _: None
) -> Knowledge:
    """Score the pairs with the reward version `ref`, measure it and write the page at `out`.

    Raises UserError where `ref` is no reward, the policy is of another tokenizer, or no pair is left.
    """
    version = registry.resolve(ref)
    if version.manifest["kind"] != "reward":
        raise UserError(
            f"{version.ref} is a {version.manifest['kind']} model, which gives no reward. Name a reward model; "
            "`baton list` shows what there is"
        )
    policy = registry.resolve(question.sampled[0]) if question.sampled else None
    if policy is not None and policy.manifest["tokenizer_digest"] != version.manifest["tokenizer_digest"]:
        raise UserError(
            f"--sft {policy.ref} has another tokenizer than {version.ref}: its replies cannot be scored token by "
            "token. Name the SFT version that the reward was trained from"
        )
    # pairs are read before the model is loaded: what is wrong with a file should not cost minutes
    rows = read_rows(question)
    source, tokenizer, most_tokens = _opened(registry, version)
    question = replace(question, max_length=min(question.max_length, most_tokens))
    pairs = encode(tokenizer, rows, question, say)
    samples: list[SftSample] = []
    if policy is not None and question.sampled is not None:
        samples = _sampled(registry, policy, tokenizer, pairs, question.sampled)
    known = know(
        source.member_scores,
        tokenizer,
        pairs,
        samples=samples,
        num_perturbed=question.num_perturbed,
        max_tokens=question.max_length,
        fit=_recorded_fit(version),
    )
    facts = {"data": ", ".join(question.data), "members": str(len(known.margin))}
    write_report(out, known, name=version.ref, facts=facts | ({"SFT": policy.ref} if policy else {}))
    return known


def read_rows(question: Question) -> list[dict[str, Any]]:
    """Normalised preference rows with their `source`."""
    from baton.data import FORMATS, load
    from baton.recipe import Source

    if question.format is not None and question.format not in FORMATS:
        raise UserError(f"--format {question.format}: known are {', '.join(FORMATS)}")
    rows = []
    for path in question.data:
        source = Source.model_validate({"path": path, "format": question.format})
        rows += [row | {"source": path} for row in load(source, Path.cwd(), "preference").rows[: question.limit]]
    return rows


def encode(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], question: Question, say: Callable[[str], None]
) -> list[Pair]:
    """The pairs that fit and spell out no special token. Raises UserError where no decided one is left."""
    from baton.chat import has_control_text

    plain = [row for row in rows if not has_control_text(tokenizer, row["prompt"] + row["chosen"] + row["rejected"])]
    encoded = [encode_pair(tokenizer, row) for row in plain]
    pairs = [pair for pair in encoded if max(len(pair.chosen_ids), len(pair.rejected_ids)) <= question.max_length]
    say(
        f"{len(pairs):,} pairs; left out: {len(encoded) - len(pairs):,} longer than {question.max_length} tokens, "
        f"{len(rows) - len(plain):,} that spell out a special token"
    )
    if all(pair.is_tie for pair in pairs):
        raise UserError(
            f"--data {' '.join(question.data)}: of {len(rows):,} pairs, {len(pairs):,} are left and none of them was "
            "won by a side. Give other data, or raise --max-length"
        )
    return pairs


def _opened(registry: Registry, version: Version) -> tuple[ClassifierSource, PreTrainedTokenizerBase, int]:
    """The version as a source of (K, N) scores, its tokenizer, and how many tokens it reads."""
    import torch

    from baton.generate import context_length
    from baton.models import compute_dtype
    from baton.ppo_sections import RewardSource
    from reward.classifier import ClassifierSource, load_registered

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_registered(registry, version, compute_dtype("auto"))
    source = ClassifierSource(RewardSource(model=version.ref), version.ref, (model, tokenizer), device, 8192)
    return source, tokenizer, context_length(model)


def _sampled(
    registry: Registry,
    policy: Version,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    sampled: tuple[str, int, int],
) -> list[SftSample]:
    """The policy's replies to the first prompts of the pairs."""
    import torch

    from baton.models import load_policy

    _, num_prompts, max_new_tokens = sampled
    model, _ = load_policy(registry, policy)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    return sample_sft(model, tokenizer, held_out_prompts(pairs, num_prompts), max_new_tokens=max_new_tokens)


def _recorded_fit(version: Version) -> LengthFit | None:
    """The length's worth as the version's training recorded it."""
    names = ("length/slope", "length/slope_error", "length/mean")
    found = [version.metrics.get(name) for name in names]
    return LengthFit(*map(float, found)) if all(isinstance(value, int | float) for value in found) else None  # type: ignore[arg-type]
