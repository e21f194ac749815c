"""Episodes as tensors: groups of like length under a token budget, right-padded, with masks made from lengths.

B rows, L tokens, T response positions, S states whose value is predicted. Padding is on the right and attention is
causal: no real token ever sees padding, so no attention mask is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch

from stages.rollout import Episode


@dataclass
class MicroBatch:
    """Right-padded rows; masks come from lengths, never from ids."""

    members: list[int]  # where each row comes from in the list that was grouped
    input_ids: torch.Tensor  # (B, L)
    response_ids: torch.Tensor  # (B, T), 0 where there is no response token
    before_response: torch.Tensor  # (B, T): position of the hidden state that predicts each response token
    is_response: torch.Tensor  # (B, T)
    state_at: torch.Tensor  # (B, S): position of the hidden state of each state
    is_state: torch.Tensor  # (B, S): S = T, or T + 1 where the state after the end counts
    last: torch.Tensor  # (B,): position of the last real token
    ended: torch.Tensor  # (B,): whether the reply stopped by itself

    def blank(self) -> MicroBatch:
        """The shortest row with nothing in the loss: what a rank computes that has fewer micro-batches than another."""
        at = int(self.last.argmin())
        length = int(self.last[at]) + 1
        nothing = torch.zeros_like(self.is_response[at : at + 1, :1])
        first = torch.zeros_like(self.before_response[at : at + 1, :1])
        return MicroBatch(
            members=[],
            input_ids=self.input_ids[at : at + 1, :length],
            response_ids=first,
            before_response=first,
            is_response=nothing,
            state_at=first,
            is_state=nothing,
            last=self.last[at : at + 1],
            ended=self.ended[at : at + 1],
        )

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`."""
        moved = copy(self)
        for name, item in vars(self).items():
            if isinstance(item, torch.Tensor):
                setattr(moved, name, item.to(device))
        return moved


def group_by_length(lengths: Sequence[int], budget: int, at_least: int = 1) -> list[list[int]]:
    """Indices in groups of like length, each of at most `budget` tokens (a longer row alone makes a group of its own).

    The longest rows come first: what does not fit into memory shows at once. `at_least` groups are made where there are
    as many rows: all ranks then run the same number of micro-batches.
    """
    order = sorted(range(len(lengths)), key=lambda at: (-lengths[at], at))
    groups: list[list[int]] = []
    held = budget
    for at in order:
        if held + lengths[at] > budget:
            groups.append([])
            held = 0
        groups[-1].append(at)
        held += lengths[at]
    while len(groups) < at_least and any(len(group) > 1 for group in groups):
        widest = max(range(len(groups)), key=lambda at: (len(groups[at]), -at))
        half = (len(groups[widest]) + 1) // 2
        groups[widest : widest + 1] = [groups[widest][:half], groups[widest][half:]]
    return groups


def make_micro_batch(
    episodes: Sequence[Episode], members: Sequence[int], pad_id: int, *, score_after_eos: bool = False
) -> MicroBatch:
    """The episodes at `members`, stacked; with `score_after_eos`, the state after a reply's end is a state, too."""
    chosen = [episodes[at] for at in members]
    prompts = torch.tensor([len(episode.prompt) for episode in chosen])
    responses = torch.tensor([len(episode.reply.ids) for episode in chosen])
    ended = torch.tensor([episode.reply.ended for episode in chosen])
    steps = int(responses.max())
    offsets = torch.arange(steps)
    is_response = offsets < responses[:, None]
    before = torch.where(is_response, prompts[:, None] - 1 + offsets, 0)
    state_at, is_state = before, is_response
    if score_after_eos:
        states = torch.arange(steps + 1)
        is_state = states < (responses + ended)[:, None]
        state_at = torch.where(is_state, prompts[:, None] - 1 + states, 0)
    return MicroBatch(
        members=list(members),
        input_ids=_stack([episode.prompt + episode.reply.ids for episode in chosen], pad_id),
        response_ids=_stack([episode.reply.ids for episode in chosen], 0),
        before_response=before,
        is_response=is_response,
        state_at=state_at,
        is_state=is_state,
        last=prompts + responses - 1,
        ended=ended,
    )


def make_text_batch(
    rows: Sequence[tuple[Sequence[int], Sequence[bool]]], members: Sequence[int], pad_id: int
) -> MicroBatch:
    """(ids, in_loss) rows as a micro-batch whose response tokens are those in the loss; a row's first never is."""
    chosen = [rows[at] for at in members]
    places = [[at for at, flag in enumerate(in_loss) if flag and at] for _, in_loss in chosen]
    steps = max(1, *(len(row) for row in places))
    is_response = torch.arange(steps) < torch.tensor([len(row) for row in places])[:, None]
    before = torch.tensor([[at - 1 for at in row] + [0] * (steps - len(row)) for row in places])
    tokens = _stack([[ids[at] for at in row] for (ids, _), row in zip(chosen, places, strict=True)], 0, steps)
    return MicroBatch(
        members=list(members),
        input_ids=_stack([list(ids) for ids, _ in chosen], pad_id),
        response_ids=tokens,
        before_response=before,
        is_response=is_response,
        state_at=before,
        is_state=torch.zeros_like(is_response),
        last=torch.tensor([len(ids) - 1 for ids, _ in chosen]),
        ended=torch.ones(len(chosen), dtype=torch.bool),
    )


def _stack(rows: list[list[int]], filler: int, width: int | None = None) -> torch.Tensor:
    width = width or max(len(row) for row in rows)
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])
