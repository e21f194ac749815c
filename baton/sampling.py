"""Replies sampled from the plain softmax with noise that the caller brings, and what picking the best of n costs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from baton.chat import Messages, encode_prompt, has_control_text, stop_ids
from baton.decode import Choice, Reply, decode
from baton.generate import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_EXPONENT = -80.0
"""Smaller probabilities count as e^-80: exp() of what underflows float32 takes sixty times as long on a CPU."""

SCORED_TOKENS = 2048
"""Tokens, padding included, of one forward of `reply_logprobs`, which makes a row of the vocabulary's size of each."""

BLOCK = 256
"""Tokens whose weights `inverse_cdf` adds up at once."""


def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    draws: Sequence[int],
    *,
    seed: int,
    temperature: float,
    max_new_tokens: int,
    rows: int = 64,
) -> list[Reply]:
    """A sampled reply to each prompt; `draws` tell the replies to one prompt apart.

    The noise is a function of seed, prompt and draw, whatever else is sampled with it. Prompts must leave room for
    `max_new_tokens` in the model's context.
    """
    noise = np.empty((len(prompts), max_new_tokens))
    for place, (prompt, draw) in enumerate(zip(prompts, draws, strict=True)):
        noise[place] = text_noise(seed, json.dumps([draw, prompt], sort_keys=True), max_new_tokens)
    assert tokenizer.pad_token_id is not None
    return sample_replies(
        model,
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        noise,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids(tokenizer),
        pad_id=int(tokenizer.pad_token_id),
        rows=rows,
    )


def can_answer(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Messages, max_new_tokens: int) -> bool:
    """Whether a prompt leaves room for such a reply, and spells out no special token, which would be another turn."""
    if has_control_text(tokenizer, prompt):
        return False
    return len(encode_prompt(tokenizer, prompt)) + max_new_tokens <= context_length(model)


def reply_text(tokenizer: PreTrainedTokenizerBase, reply: Reply) -> str:
    """What was said, without special tokens: what PPO's rewards get as a response."""
    return str(tokenizer.decode(reply.ids, skip_special_tokens=True))


def best_of_kl(n: float) -> float:
    """The KL in nats between best-of-n and the model that is sampled from, at most: log n - (n - 1) / n.

    It is reached where no reply is sampled twice and no two score the same; else the KL is below (Beirami et al.
    2024). It holds for each prompt, whatever the reward.
    """
    assert n >= 1, n
    return math.log(n) - (n - 1) / n


def text_noise(seed: int, key: str, length: int) -> np.ndarray:
    """Uniform numbers (length,): one a token, a function of the seed and of what is sampled (`key`) alone."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])
    return np.random.Generator(np.random.Philox(key=[seed, number])).random(length)


def sample_replies(
    model: Any,
    prompts: Sequence[Sequence[int]],
    noise: np.ndarray,
    *,
    temperature: float,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    rows: int = 64,
    agree: Callable[[bool], bool] | None = None,
) -> list[Reply]:
    """Sample from softmax(logits / temperature) by inverse CDF with `noise` (len(prompts), max_new_tokens).

    Neither top-k nor top-p: the distribution that is sampled is the one that is trained. Raises RuntimeError where the
    model's logits are not finite.
    """
    uniform = torch.as_tensor(noise, dtype=torch.float64).to(model.device)

    def pick(logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> Choice:
        return inverse_cdf(logits if temperature == 1.0 else logits / temperature, uniform[rows, positions])

    replies = decode(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        pad_id=pad_id,
        pick=pick,
        max_rows=rows,
        agree=agree,
    )
    for place, reply in enumerate(replies):
        if not np.isfinite(reply.logprobs).all():
            at = int(np.argmin(np.isfinite(reply.logprobs)))
            raise RuntimeError(f"the policy's logits are not finite at token {at} of the reply to prompt {place}")
    return replies


def inverse_cdf(logits: torch.Tensor, uniform: torch.Tensor) -> Choice:
    """The first token whose cumulative softmax exceeds `uniform`, and its log-probability.

    logits (N, V) of at least float32, uniform (N,) float64 in [0, 1). Weights are summed by blocks first, and the
    blocks' sums in float64: only the block that the draw falls into is summed token by token.
    """
    count, size = logits.shape
    blocks = -(-size // BLOCK)
    weights = logits.new_empty(count, blocks * BLOCK)
    weights[:, size:] = 0
    highest = logits.amax(-1, keepdim=True)
    shifted = torch.sub(logits, highest, out=weights[:, :size]).clamp_(min=LEAST_EXPONENT).exp_()
    torch.threshold_(shifted, 2 * math.exp(LEAST_EXPONENT), 0.0)  # what cannot be drawn weighs nothing
    weights = weights.view(count, blocks, BLOCK)
    below = weights.sum(-1).cumsum(-1, dtype=torch.float64)
    total = below[:, -1]
    block = _first_above(below, uniform * total)
    chosen = block[:, None]
    start = torch.where(block > 0, below.gather(-1, (chosen - 1).clamp(min=0)).squeeze(-1), 0.0)
    inside = weights.gather(1, chosen[..., None].expand(-1, -1, BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
    ids = block * BLOCK + _first_above(inside, uniform * total - start)
    ids = ids.clamp(max=size - 1)  # as above
    scaled = logits.gather(-1, ids[:, None]) - highest
    return Choice(ids, scaled.squeeze(-1).double() - total.log())


def _first_above(cumulative: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """The first place whose cumulative weight (N, K) exceeds `drawn` (N,); rounding must not lead past the last."""
    most = torch.nextafter(cumulative[:, -1], cumulative.new_zeros(()))
    found = torch.searchsorted(cumulative, torch.minimum(drawn, most)[:, None], right=True).squeeze(-1)
    return found.clamp(max=cumulative.shape[-1] - 1)  # logits that are not finite lead past the last


@torch.no_grad()
def reply_logprobs(model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float) -> np.ndarray:
    """(N,): each reply's log-probability in nats, summed over its tokens, of (prompt ids, reply ids)."""
    order = sorted(range(len(pairs)), key=lambda at: (-len(pairs[at][0]) - len(pairs[at][1]), at))
    found = np.zeros(len(pairs))
    while order:
        longest = sum(map(len, pairs[order[0]]))
        count = max(1, SCORED_TOKENS // longest)
        group, order = order[:count], order[count:]
        found[group] = _summed_logprobs(model, [pairs[at] for at in group], longest, temperature).cpu().numpy()
    return found


def _summed_logprobs(
    model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], longest: int, temperature: float
) -> torch.Tensor:
    """(n,), padded on the right: causal attention keeps real tokens from what stands behind them."""
    rows = [[*prompt, *reply] + [0] * (longest - len(prompt) - len(reply)) for prompt, reply in pairs]
    spans = [(len(prompt), len(prompt) + len(reply)) for prompt, reply in pairs]
    ids = torch.tensor(rows, device=model.device)
    said = torch.tensor([[start <= at < end for at in range(1, longest)] for start, end in spans], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1][said].float()
    chosen = (logits / temperature).log_softmax(-1).gather(-1, ids[:, 1:][said][:, None])[:, 0]
    summed = torch.zeros(said.shape, dtype=torch.float64, device=model.device)
    summed[said] = chosen.double()
    return summed.sum(1)
