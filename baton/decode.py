"""Cached batched decoding: finished rows leave the batch, waiting prompts take their place; the caller picks tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from baton.thin_linear import thin_products

PREFILL_TOKENS = 4096
"""Tokens, padding included, of prompts that are read in one forward."""

JOIN_SHARE = 8
"""Prompts join when 1/8 of the rows is free: reading one prompt costs about as much as a step of all rows, so joining
one by one would double the time; waiting leaves rows idle. The best share is sqrt(2 / steps a reply): 1/8 at 128."""


class Choice(NamedTuple):
    """The tokens that were picked, (N,) each."""

    ids: torch.Tensor
    logprobs: torch.Tensor | None = None  # under the distribution that was sampled


Pick = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Choice]
"""(logits (N, V), rows (N,) of the original batch, positions (N,) of the new tokens in their replies) -> Choice."""


@dataclass(frozen=True)
class Reply:
    """What the model said: the ids, the stop token included when `ended`, and what each was worth when sampled."""

    ids: list[int]
    ended: bool
    logprobs: list[float] = field(default_factory=list)  # in nats; empty where the picker gave none


def greedy(logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> Choice:
    """The likeliest token."""
    return Choice(logits.argmax(-1))


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    pick: Pick = greedy,
    max_rows: int = 64,
    agree: Callable[[bool], bool] | None = None,
) -> list[Reply]:
    """Continue every prompt until a stop token or `max_new_tokens`, `max_rows` prompts at a time.

    `pick` gets logits of at least float32 and the rows' indices into `prompts`. What a row gets does not depend on
    its company, up to the rounding of the matrix products.

    `agree(going on here)` says whether any process still goes on. Where the model's weights are spread over processes
    (FSDP2, ZeRO-3), all must call it equally often: one that is done then goes on with a dummy token.
    """
    from baton.slot_cache import fits

    assert all(len(prompt) for prompt in prompts), "a prompt has at least one token"
    call = model if agree is None else _InStep(model, agree)
    run = _Decoding(call, model, prompts, max_new_tokens, stop_ids, pad_id, pick)
    # the longest first: one that joins later finds room before the column where the others stand, and rows of like
    # length share the batch, whose attention is as long as its longest row
    order = sorted(range(len(prompts)), key=lambda at: (-len(prompts[at]), at))
    with thin_products(model):
        if max_new_tokens and fits(model):
            _decode_in_slots(run, order, min(max_rows, len(prompts)))
        elif max_new_tokens:
            for start in range(0, len(order), max_rows):
                _decode_group(run, order[start : start + max_rows])
        if agree is not None:
            dummy = torch.tensor([[pad_id]], device=model.device)
            while agree(False):
                model(input_ids=dummy, use_cache=False)
    return run.replies()


class _InStep:
    """The model, called in step with other processes."""

    def __init__(self, model: Any, agree: Callable[[bool], bool]) -> None:
        self._model, self._agree = model, agree

    def __call__(self, **inputs: Any) -> Any:
        self._agree(True)
        return self._model(**inputs)


class _Decoding:
    """What is being decoded, and what has been said: P prompts, T new tokens at most."""

    def __init__(
        self,
        call: Any,
        model: Any,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Sequence[int],
        pad_id: int,
        pick: Pick,
    ) -> None:
        self.call, self.model, self.config, self.prompts, self.pad_id = call, model, model.config, prompts, pad_id
        self.dtype, self.device = model.dtype, model.device
        self._max_new_tokens, self._pick = max_new_tokens, pick
        self._stops = torch.tensor(list(stop_ids), dtype=torch.long, device=self.device)
        size = (len(prompts), max_new_tokens)
        self._ids = torch.zeros(size, dtype=torch.long, device=self.device)
        self._logprobs: torch.Tensor | None = None
        self._lengths = torch.zeros(len(prompts), dtype=torch.long, device=self.device)
        self._ended = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)

    def say(
        self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, list[bool] | None]:
        """Pick and keep one token for each of `rows`. Returns (tokens, which rows are done, or None if none is)."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        choice = self._pick(logits.to(wide), rows, positions)
        self._ids[rows, positions] = choice.ids
        if choice.logprobs is not None:
            if self._logprobs is None:
                self._logprobs = torch.zeros(self._ids.shape, dtype=choice.logprobs.dtype, device=self.device)
            self._logprobs[rows, positions] = choice.logprobs
        is_stop = torch.isin(choice.ids, self._stops)
        done = is_stop | (positions + 1 == self._max_new_tokens)
        if not done.any():
            return choice.ids, None
        self._lengths[rows] = positions + 1
        self._ended[rows] = is_stop
        return choice.ids, done.tolist()

    def replies(self) -> list[Reply]:
        """In the order of the prompts."""
        ids, lengths, ended = self._ids.tolist(), self._lengths.tolist(), self._ended.tolist()
        logprobs = [[]] * len(ids) if self._logprobs is None else self._logprobs.tolist()
        return [Reply(i[:n], e, p[:n]) for i, n, e, p in zip(ids, lengths, ended, logprobs, strict=True)]

    def padded(self, rows: Sequence[Sequence[int]], side: str) -> torch.Tensor:
        """Token ids (B, L), filled up to the longest row."""
        longest = max(len(row) for row in rows)
        filling = [[self.pad_id] * (longest - len(row)) for row in rows]
        pairs = zip(rows, filling, strict=True)
        full = [[*row, *fill] if side == "right" else [*fill, *row] for row, fill in pairs]
        return torch.tensor(full, device=self.device)


def _decode_in_slots(run: _Decoding, order: list[int], max_rows: int) -> None:
    """A slot for each row in the making; all but the last token of a prompt are read when it joins."""
    from baton import decode_step
    from baton.slot_cache import SlotCache

    autocast = torch.is_autocast_enabled(run.device.type)
    dtype = torch.get_autocast_dtype(run.device.type) if autocast else run.dtype
    slots = SlotCache(run.config.get_text_config(decoder=True).num_hidden_layers, max_rows, dtype, run.device)
    waiting, share = list(order), max(1, max_rows // JOIN_SHARE)
    step = decode_step.Step(run.model) if run.call is run.model and decode_step.can_compute(run.model) else None
    # of each row in the making: its prompt, the position of the next token in its reply, and the token that is read
    rows = positions = tokens = depths = torch.zeros(0, dtype=torch.long, device=run.device)
    while waiting or len(rows):
        free = max_rows - len(rows)
        if waiting and (not len(rows) or free >= min(share, len(waiting))):
            joining, waiting = waiting[:free], waiting[free:]
            _read_prompts(run, slots, joining)
            prompts = [run.prompts[row] for row in joining]
            lasts = [[row, 0, prompt[-1], len(prompt) - 1] for row, prompt in zip(joining, prompts, strict=True)]
            columns = torch.tensor(lasts, device=run.device).unbind(1)
            known = (rows, positions, tokens, depths)
            rows, positions, tokens, depths = (torch.cat(pair) for pair in zip(known, columns, strict=True))
        if step is not None:
            logits = step(tokens, depths, slots)
        else:
            logits = run.call(
                input_ids=tokens[:, None],
                attention_mask=slots.step(),
                position_ids=depths[:, None],
                past_key_values=slots.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        slots.stepped()
        tokens, done = run.say(logits, rows, positions)
        positions, depths = positions + 1, depths + 1
        if done is not None:
            left = torch.tensor(slots.drop(done), dtype=torch.long, device=run.device)
            rows, positions, tokens, depths = (some[left] for some in (rows, positions, tokens, depths))


def _read_prompts(run: _Decoding, slots: Any, joining: list[int]) -> None:
    """Fill slots with all but the last tokens of prompts, the longest first; padding stands on the right."""
    from transformers import DynamicCache

    begun = [list(run.prompts[row][:-1]) for row in joining]
    while begun:
        count = max(1, min(len(begun), PREFILL_TOKENS // max(1, len(begun[0]))))
        now, begun = begun[:count], begun[count:]
        cache = None
        if now[0]:
            cache = DynamicCache(config=run.config)
            input_ids = run.padded(now, "right")
            # no mask: causal attention alone keeps real tokens from the padding behind them
            position_ids = torch.arange(input_ids.shape[1], device=run.device).expand(len(now), -1)
            run.call(
                input_ids=input_ids,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        slots.add(cache, [len(row) for row in now])


def _decode_group(run: _Decoding, members: list[int]) -> None:
    """For caches of any kind (sliding windows, recurrent states): rows padded on the left; none takes a free place."""
    from transformers import DynamicCache

    lengths = [len(run.prompts[row]) for row in members]
    longest = max(lengths)
    input_ids = run.padded([run.prompts[row] for row in members], "left")
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths], device=run.device)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    rows = torch.tensor(members, device=run.device)
    positions = torch.zeros_like(rows)
    cache = DynamicCache(config=run.config)
    while True:
        logits = run.call(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens, done = run.say(logits, rows, positions)
        positions = positions + 1
        if done is not None:
            going = torch.tensor([at for at, is_done in enumerate(done) if not is_done], device=run.device)
            if not len(going):
                return
            cache.batch_select_indices(going)
            rows, positions, tokens = rows[going], positions[going], tokens[going]
            mask, position_ids = mask[going], position_ids[going]
        input_ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)
        position_ids = position_ids[:, -1:] + 1
