"""A seeded order of any number of rows without a list of them: place -> row, computed from the seed alone."""

from __future__ import annotations

import hashlib

_ROUNDS = 12
"""Of half a Feistel network each: enough that even a handful of rows takes every order about equally often."""
_MASK = (1 << 64) - 1


class SeededOrder:
    """A bijection of 0 … size - 1 chosen by `key`: `order[place]` is the row at that place.

    A Feistel network (Luby and Rackoff 1988) over the next power of two, whose results beyond `size` are walked on
    until they fall within (Black and Rogaway 2002): at most two passes on average. Its rounds mix with SplitMix64's
    finisher (Steele, Lea and Flood 2014). Memory does not grow with `size`; the same key gives the same order on every
    machine.
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        assert size > 0, "no rows to order"
        self.size = size
        bits = (size - 1).bit_length()
        self._low_bits = bits - bits // 2
        self._low, self._high = (1 << self._low_bits) - 1, (1 << bits // 2) - 1
        digest = hashlib.shake_256(repr((size, *key)).encode()).digest(8 * _ROUNDS)
        self._keys = [int.from_bytes(digest[at : at + 8], "little") for at in range(0, len(digest), 8)]

    def __getitem__(self, place: int) -> int:
        assert 0 <= place < self.size, (place, self.size)
        while True:
            high, low = place >> self._low_bits, place & self._low
            keys = iter(self._keys)
            for key in keys:
                high ^= _mixed(low + key) & self._high
                low ^= _mixed(high + next(keys)) & self._low
            place = high << self._low_bits | low
            if place < self.size:
                return place


def _mixed(number: int) -> int:
    """SplitMix64's finisher."""
    number &= _MASK
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _MASK
    return number ^ number >> 31
