"""Keys and values of rows that come and go while a batch is decoded; every row ends at the same column.

Time is the column: a step writes one column for all rows, and a row that joins is laid down so that it ends where the
others do. So a step writes by a plain slice, its attention reads one slice as long as the longest row, and what a row
may see is a mask over columns. Rows are the first `len(starts)` slots; a row that leaves is replaced by the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

BLOCK = 128
"""Columns by which the cache grows; as often, columns that no row needs any more are dropped."""

PLAIN_ATTENTION = ("sdpa", "eager")


def fits(model: Any) -> bool:
    """Whether every layer is plain full attention that takes a mask over columns and explicit positions."""
    import inspect

    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False) or getattr(config, "alibi", False):
        return False
    if config._attn_implementation not in PLAIN_ATTENTION:
        return False
    layers = DynamicCache(config=config).layers
    plain = len(layers) == config.num_hidden_layers and all(type(layer) is DynamicLayer for layer in layers)
    return plain and "position_ids" in inspect.signature(model.forward).parameters


class SlotCache:
    """Room for `max_rows` rows. `cache` is what the model is given; the rest is called between its forwards."""

    def __init__(self, num_layers: int, max_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.max_rows = max_rows
        self.starts: list[int] = []  # the first column of each row
        self.clock = 0  # the column that the next step writes
        self.capacity = 0
        self.first = 0  # the first column that any row needs
        self._layers = [_SlotLayer(self) for _ in range(num_layers)]
        self.cache = Cache(layers=list(self._layers))
        self._mask = torch.zeros(max_rows, 1, 1, 0, dtype=dtype, device=device)

    def add(self, prompt: DynamicCache | None, lengths: Sequence[int]) -> None:
        """Rows join. `prompt` holds their keys and values, padded on the right; None where all `lengths` are zero.

        Rows must not be longer than the longest that is there: the columns before it may be gone.
        """
        longest = max(lengths)
        if not self.starts:
            self.clock = self.first = longest
        begin = len(self.starts)
        assert begin + len(lengths) <= self.max_rows and longest <= self.clock, (lengths, self.clock)
        self.starts += [self.clock - length for length in lengths]
        self.first = min(self.starts)
        if self.clock > self.capacity:
            self._rehouse(self.clock + BLOCK, shift=0)
        device = self._mask.device
        starts = torch.tensor(self.starts[begin:], device=device)[:, None]
        columns = torch.arange(self.capacity, device=device)
        hidden = (columns < starts) | (columns >= self.clock)
        seen = torch.zeros_like(hidden, dtype=self._mask.dtype)
        self._mask[begin : len(self.starts), 0, 0] = seen.masked_fill_(hidden, torch.finfo(seen.dtype).min)
        if prompt is None:
            return
        # column c of the window is token c - (longest - length) of its row
        window = torch.arange(longest, device=device)
        taken = (window - (longest - torch.tensor(lengths, device=device)[:, None])).clamp(min=0)
        for layer, filled in zip(self._layers, prompt.layers, strict=True):
            layer.lay_down(slice(begin, len(self.starts)), slice(self.clock - longest, self.clock), taken, filled)

    def drop(self, leaving: Sequence[bool]) -> list[int]:
        """Rows leave; returns, for each row that is then there, the place where it was before."""
        places = [place for place, leaves in enumerate(leaving) if not leaves]
        size = len(places)
        moved = [place for place in places if place >= size]
        holes = [place for place in range(size) if leaving[place]]
        order = list(range(size))
        for hole, place in zip(holes, moved, strict=True):
            order[hole] = place
        self.starts = [self.starts[place] for place in order]
        if moved:
            to, source = (torch.tensor(some, device=self._mask.device) for some in (holes, moved))
            self._mask[to] = self._mask[source]
            for layer in self._layers:
                layer.move(source, to, slice(self.first, self.clock))
        self.first = min(self.starts, default=self.clock)
        return order

    def step(self) -> torch.Tensor:
        """Make room for one more column; returns the additive mask (rows, 1, 1, columns) for the forward to come."""
        if self.clock == self.capacity:
            self._rehouse(self.clock - self.first + BLOCK, shift=self.first)
        self._mask[: len(self.starts), ..., self.clock] = 0
        return self._mask[: len(self.starts), ..., self.first : self.clock + 1]

    @property
    def whole_mask(self) -> torch.Tensor:
        """The mask (rows, 1, 1, capacity) over all columns of the layers' tensors, after `step`."""
        return self._mask[: len(self.starts)]

    def stepped(self) -> None:
        """The forward has written its column."""
        self.clock += 1

    def _rehouse(self, capacity: int, shift: int) -> None:
        """Room for `capacity` columns; column `shift` becomes the first."""
        rows, kept = slice(len(self.starts)), slice(shift, self.clock)
        fresh = self._mask.new_full((self.max_rows, 1, 1, capacity), torch.finfo(self._mask.dtype).min)
        known = self._mask[rows, ..., kept]
        fresh[rows, ..., : known.shape[-1]] = known
        self._mask, self.capacity = fresh, capacity
        for layer in self._layers:
            layer.rehouse(rows, kept)
        self.starts = [start - shift for start in self.starts]
        self.first, self.clock = self.first - shift, self.clock - shift


class _SlotLayer(DynamicLayer):
    """One layer's part: keys and values (max_rows, heads, capacity, size)."""

    keys: Any
    values: Any

    def __init__(self, slots: SlotCache) -> None:
        super().__init__()
        self._slots = slots

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One token a row; returns all that the rows may see."""
        slots = self._slots
        self._open(key_states, value_states)
        rows, column, seen = len(key_states), slots.clock, slice(slots.first, slots.clock + 1)
        self.keys[:rows, :, column : column + 1] = key_states
        self.values[:rows, :, column : column + 1] = value_states
        return self.keys[:rows, :, seen], self.values[:rows, :, seen]

    def lay_down(self, rows: slice, columns: slice, taken: torch.Tensor, filled: Any) -> None:
        """Write a prefilled batch: `taken` (joining rows, columns) chooses the position of each column."""
        self._open(filled.keys, filled.values)
        for ours, theirs in ((self.keys, filled.keys), (self.values, filled.values)):
            at = taken[:, None, :, None].expand(-1, theirs.shape[1], -1, theirs.shape[3])
            ours[rows, :, columns] = theirs.gather(2, at)

    def move(self, source: torch.Tensor, to: torch.Tensor, columns: slice) -> None:
        """Copy rows to other slots."""
        for ours in (self.keys, self.values):
            ours[to, :, columns] = ours[source, :, columns]

    def rehouse(self, rows: slice, kept: slice) -> None:
        """The kept columns become the first of tensors of the new capacity."""
        if not self.is_initialized:
            return
        old_keys, old_values = self.keys, self.values
        self.is_initialized = False
        self._open(old_keys, old_values)
        for ours, old in ((self.keys, old_keys), (self.values, old_values)):
            known = old[rows, :, kept]
            ours[rows, :, : known.shape[2]] = known

    def _open(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self.is_initialized:
            return
        slots = self._slots
        # zeros: a masked column has weight 0, and 0 x NaN of raw memory would be NaN
        self.keys, self.values = (
            like.new_zeros(slots.max_rows, like.shape[1], slots.capacity, like.shape[3]) for like in (keys, values)
        )
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
