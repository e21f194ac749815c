"""Before the start: a PPO run's batch arithmetic in words, and an estimate of its memory by parts."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from baton.recipe import PPORecipe

if TYPE_CHECKING:
    import torch

GB = 10**9
TOO_FULL = 0.9
"""Warn above this share of what is available: allocators keep gaps, and estimates err."""
FLOAT, HALF = 4, 2
"""Bytes of float32, and of bfloat16."""
LOGITS_COPIES = 3
"""Of a chunk of logits in float32: the logits, their exponentials or gradient, and one on the way between."""
GAPS_ON_CPU, GAPS_ON_GPU = 0.7, 0.1
"""What the allocator wastes, as a share of the activations. glibc's heap seldom puts a tensor where a freed one was:
of a small Llama's update it held 1.3 (bfloat16) to 1.7 (float32) times what was alive; with every large tensor mapped
by itself (MALLOC_MMAP_THRESHOLD_=262144) 1.0 times, at about a third more time for page faults."""
Way = Literal["fused", "eager", "blocks"]
"""How layers are computed: transformers' with fused or plain attention, or baton.decoder_blocks."""
LIBRARIES_BYTES = 600_000_000
"""Resident in any process that has imported torch and transformers; on a GPU the context, about as much."""


@dataclass(frozen=True)
class BatchPlan:
    """What a run does in numbers; episodes and tokens are global unless a name says otherwise."""

    steps: int
    episodes: int  # a step
    processes: int
    epochs: int
    minibatches: int
    longest_tokens: int  # of one episode, prompt and reply
    prompt_tokens: int
    micro_batch_tokens: int  # real tokens, a process
    critic_warmup_steps: int
    may_stop_early: bool

    @classmethod
    def of(cls, recipe: PPORecipe, processes: int) -> BatchPlan:
        """The plan of `recipe` on so many processes."""
        train, ppo, rollout = recipe.train, recipe.ppo, recipe.rollout
        return cls(
            train.steps,
            train.episodes_per_batch,
            processes,
            ppo.epochs,
            ppo.minibatches,
            rollout.max_prompt_tokens + rollout.max_new_tokens,
            rollout.max_prompt_tokens,
            train.tokens_per_micro_batch,
            ppo.critic_warmup_steps,
            ppo.kl_budget_nats is not None or ppo.kl_minibatch_stop_nats is not None,
        )

    @property
    def optimizer_steps(self) -> int:
        return self.steps * self.epochs * self.minibatches

    @property
    def micro_batches(self) -> int:
        """Of one minibatch on one process, if every episode were as long as it can be."""
        episodes = math.ceil(self.episodes / self.processes / self.minibatches)
        return math.ceil(episodes / max(self.micro_batch_tokens // self.longest_tokens, 1))

    def text(self) -> str:
        """A few lines for a person."""
        share = self.episodes / self.processes
        each = f", {share:g} a process" if self.processes > 1 else ""
        size = f"minibatches of {self.episodes / self.minibatches:g}" if self.minibatches > 1 else "minibatch"
        most = "at most " if self.may_stop_early else ""
        reply = self.longest_tokens - self.prompt_tokens
        lines = [
            f"batch   {_count(self.steps, 'step')} of {_count(self.episodes, 'episode')}{each}: "
            f"{self.steps * self.episodes:,} episodes in all",
            f"update  {_count(self.epochs, 'epoch')} × {self.minibatches} {size} = "
            f"{_count(self.epochs * self.minibatches, 'optimizer step')} a rollout, "
            f"{most}{self.optimizer_steps:,} in all",
            f"tokens  at most {self.longest_tokens:,} an episode ({self.prompt_tokens:,} of prompt, {reply:,} of reply)"
            f" and {self.episodes * self.longest_tokens:,} a step",
            f"        at most {self.micro_batch_tokens:,} a micro-batch, so {self.micro_batches} or fewer of them "
            f"a minibatch{' and process' if self.processes > 1 else ''}",
        ]
        if self.critic_warmup_steps:
            lines.append(f"critic  trained alone in the first {_count(self.critic_warmup_steps, 'step')}")
        if self.longest_tokens > self.micro_batch_tokens:
            lines.append(
                f"note    an episode can be longer than train.tokens_per_micro_batch ({self.micro_batch_tokens:,}); "
                "such a one is a micro-batch by itself"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Shape:
    """What of a Llama-like decoder decides its activations."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a Hugging Face config."""
        heads = int(config.num_attention_heads)
        return cls(
            int(config.hidden_size),
            int(config.num_hidden_layers),
            heads,
            int(getattr(config, "num_key_value_heads", None) or heads),
            int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            int(config.intermediate_size),
            int(config.vocab_size),
        )

    def layer_bytes_per_token(self, longest: int, rank: int | None, half: bool, way: Way) -> float:
        """What autograd keeps of one layer for one token, in bytes; `rank` is LoRA's, None if every weight is trained.

        In numbers, with H hidden, I intermediate, Q = heads × head_dim, K = kv_heads × head_dim, r LoRA's rank, L the
        longest row; a frozen base with adapters on all linear layers:

        ======================  =======  ======================================================================
        RMSNorm, twice          2H + 2   its input and the inverse root mean square, float32 always
        inputs of the adapters  2H       q, k and v share the first norm's output; gate and up the second's
        attention, fused        2Q + 2K  query, key, value, and the output: o's adapter's input
                                heads    the log of each softmax's sum, float32 always
        attention, eager        4Q       the same, with keys and values repeated for every head
                                heads L  the softmax, float32 always, and in bfloat16 once more
        MLP                     4I       gate before and after SiLU, up, and their product: down's adapter's input
        adapters                7r       what lies between their two factors
        ======================  =======  ======================================================================

        A frozen linear layer keeps no input; rotary embeddings and residual sums keep nothing. The model computes in
        bfloat16 (`half`) or in float32. baton.decoder_blocks (`blocks`) keeps 4H, 2Q + 2K + heads L, 4I and 7r in that
        format, and two root mean squares.

        If every weight is trained, in float32 under autocast if `half`, the norms keep their normalised input too (2H)
        and there is no 7r; the linear layers' inputs are the adapters' above, but autocast narrows those of q, k, v,
        gate and up one by one: 5H in place of 2H.
        """
        full, width = rank is None, HALF if half else FLOAT
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if way == "blocks":
            attention = 2 * query + 2 * key + self.heads * longest
            return 2 * FLOAT + width * (4 * self.hidden_size + attention + 4 * self.intermediate_size + 7 * (rank or 0))
        wide = (4 if full else 2) * self.hidden_size + 2
        inputs = (5 if full and half else 2) * self.hidden_size
        other = inputs + 4 * self.intermediate_size + 7 * (rank or 0)
        if way == "eager":
            softmax = self.heads * longest
            return FLOAT * (wide + softmax) + width * (other + 4 * query) + (HALF * softmax if half else 0)
        return FLOAT * (wide + self.heads) + width * (other + 2 * query + 2 * key)


@dataclass(frozen=True)
class Weights:
    """One set of weights in memory: how they are called, their number, how many are trained, bytes each when frozen.

    Trained ones are float32 whatever the frozen ones are, and have a gradient and Adam's two moments.
    """

    name: str
    parameters: int
    trained: int
    frozen_bytes: int


@dataclass(frozen=True)
class MemoryEstimate:
    """One process's memory in bytes by parts; the update's and the rollout's are never there together."""

    always: tuple[tuple[str, int], ...]
    update: tuple[tuple[str, int], ...]
    rollout: tuple[tuple[str, int], ...]
    available: int | None

    @property
    def total(self) -> int:
        """At the peak."""
        return _sum(self.always) + max(_sum(self.update), _sum(self.rollout))

    def text(self) -> str:
        """A line a part, and a warning if it may not fit."""
        phase = "update" if _sum(self.update) >= _sum(self.rollout) else "rollout"
        known = "" if self.available is None else f" of {_gb(self.available)} available"
        lines = [f"memory  about {_gb(self.total)}{known} a process, at the peak in the {phase}"]
        for when, parts in (("always", self.always), ("update", self.update), ("rollout", self.rollout)):
            lines += [f"        {_gb(size):>8}  {when}: {name}" for name, size in parts if size]
        return "\n".join([*lines, *([self.warning] if self.warning else [])])

    @property
    def warning(self) -> str | None:
        """In words, where the peak is over 90% of what is available."""
        if self.available is None or self.total <= TOO_FULL * self.available:
            return None
        cures = {
            "update": "train.tokens_per_micro_batch, or use ppo.critic: shared",
            "rollout": "rollout.rows or rollout.max_prompt_tokens",
        }
        phase = "update" if _sum(self.update) >= _sum(self.rollout) else "rollout"
        heavy = max(_sum(self.update), _sum(self.rollout))
        cure = f"lower {cures[phase]} ({_gb(heavy)} in the {phase})"
        if _sum(self.always) > TOO_FULL * self.available:
            cure = "take a smaller model, bfloat16, policy: adapter, or more memory: the weights alone nearly fill it"
        share = self.total / max(self.available, 1)
        return (
            f"warning: about {_gb(self.total)} a process is {share:.0%} of the {_gb(self.available)} available: the "
            f"run may end for want of memory. To be safe, {cure}"
        )


def estimate_memory(
    shape: Shape,
    weights: Sequence[Weights],
    *,
    half: bool,
    rank: int | None,
    graphs: int,
    micro_batch_tokens: int,
    longest_tokens: int,
    logits_rows: int,
    rollout_rows: int,
    prefill_tokens: int,
    on_cpu: bool,
    joined: bool = False,
    laid_out: int = 0,
    shards: int = 1,
    available: int | None = None,
) -> MemoryEstimate:
    """One process's memory from plain numbers.

    `graphs`: forwards whose activations live together, 2 where policy and critic run apart before one backward.
    `rank`: LoRA's, None if every weight is trained. `micro_batch_tokens`: real tokens; rows are grouped by length, so
    padding adds little. `logits_rows`: positions whose logits exist at a time. `prefill_tokens`: prompt tokens that
    are read at a time in the rollout. `on_cpu`: whose allocator leaves its gaps. `joined`: whether layers can be
    computed by baton.decoder_blocks. `laid_out`: bytes of the weights' copy that decoding makes (`Roles.laid_out`).
    `shards`: processes that share weights and moments (FSDP, ZeRO-3).
    """
    from baton.attention import SHORT

    width = HALF if half else FLOAT
    trained = sum(part.trained for part in weights)
    tokens = max(micro_batch_tokens, longest_tokens)
    way: Way = "fused" if not on_cpu or longest_tokens > SHORT else "blocks" if joined and rank else "eager"
    layer = tokens * shape.layer_bytes_per_token(longest_tokens, rank, half, way)
    # the backward has a bfloat16 copy of every trained weight; the layer in work holds its gradients too
    activations = graphs * shape.layers * layer + layer + (HALF * trained if half else 0)
    keys_values = rollout_rows * longest_tokens * shape.layers * 2 * shape.kv_heads * shape.head_dim * width
    # without gradients a layer's tensors go when the next begins; the widest moment is in the MLP
    prefill = prefill_tokens * (3 * shape.intermediate_size + 3 * shape.hidden_size) * width
    logits = shape.vocabulary * FLOAT * LOGITS_COPIES
    always = [
        (
            f"weights, {part.name}",
            (part.trained * FLOAT + (part.parameters - part.trained) * part.frozen_bytes) // shards,
        )
        for part in weights
    ]
    return MemoryEstimate(
        always=(*always, ("Adam's moments", 2 * FLOAT * trained // shards), ("libraries", LIBRARIES_BYTES)),
        update=(
            ("gradients", FLOAT * trained // shards),
            (f"activations of a micro-batch of {tokens:,} tokens", int(activations)),
            ("gaps that the allocator leaves", int(activations * (GAPS_ON_CPU if on_cpu else GAPS_ON_GPU))),
            (f"logits, {logits_rows:,} positions at a time", logits_rows * logits),
        ),
        rollout=(
            (f"keys and values of {rollout_rows} replies", keys_values),
            ("reading prompts", prefill),
            (f"logits of {rollout_rows} next tokens", rollout_rows * logits),
            ("a copy of the weights, laid out for decoding", laid_out),
        ),
        available=available,
    )


def available_bytes(device: torch.device, processes: int) -> int | None:
    """What this process could hold in all: what is free, and what it holds already; None where nobody can tell.

    On a CPU the machine's processes share; a container's limit counts where it is lower.
    """
    if device.type == "cuda":
        import torch

        # the context is no longer free, but part of the estimate
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) + LIBRARIES_BYTES
    if device.type != "cpu":
        return None
    import psutil

    memory, own = psutil.virtual_memory(), psutil.Process(os.getpid()).memory_info().rss
    limits = [int(memory.available) // processes + int(own)]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2, v1
        path = Path("/sys/fs/cgroup") / name
        text = path.read_text().strip() if path.is_file() else ""
        limits += [int(text) // processes] if text.isdigit() else []
    return min(limits)


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held so far: resident on a CPU, the allocator's on a GPU."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _sum(parts: Sequence[tuple[str, int]]) -> int:
    return sum(size for _, size in parts)


def _gb(size: float) -> str:
    return f"{size / GB:.2f} GB" if size < 10 * GB else f"{size / GB:.1f} GB"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
