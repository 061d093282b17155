"""Arrays over a moving range of numbers: they grow at the end and forget at the beginning.

The queue numbers tickets and rows without end, and keeps only those that are still of use.
Cost is amortised: an entry is copied a bounded number of times, however many there are.

An array of bytes is a `bytearray` too, over the same memory: to count or set a few
consecutive ones in it takes a tenth of the time that numpy needs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import DTypeLike, NDArray

FIRST_CAPACITY = 256


class Window:
    """Arrays indexed by `number - base`, for numbers from `base` to before `end`."""

    def __init__(self, fills: Mapping[str, tuple[DTypeLike, int]], *, base: int = 0) -> None:
        self._fills: dict[str, tuple[DTypeLike, int]] = {}
        self._arrays: dict[str, NDArray[np.int64]] = {}
        self._capacity = FIRST_CAPACITY
        self.raw: dict[str, bytearray] = {}
        """The arrays of bytes, as such. Valid until the next `extend` or `forget`, like the arrays."""
        self.base = self.end = base
        for name, (dtype, fill) in fills.items():
            self.add(name, dtype, fill)

    def __getitem__(self, name: str) -> NDArray[np.int64]:
        """The whole array, of whatever integers or booleans it holds; write into it at `number - base`."""
        return self._arrays[name]

    def __contains__(self, name: str) -> bool:
        """Whether there is such an array."""
        return name in self._arrays

    def add(self, name: str, dtype: DTypeLike, fill: int) -> None:
        """Another array, filled."""
        self._fills[name] = (dtype, fill)
        self._make(name)

    def extend(self, count: int) -> None:
        """Make room for `count` more numbers, filled."""
        self.end += count
        if self.end - self.base > self._capacity:
            self._move(self.base, 2 * (self.end - self.base), kept=self._capacity)

    def forget(self, before: int) -> None:
        """Numbers below `before` are of no use; memory is given back now and then."""
        if before - self.base > max(FIRST_CAPACITY, (self.end - self.base) // 2):
            kept = self.end - before
            self._move(before, max(FIRST_CAPACITY, 2 * kept), kept=kept)

    def _move(self, base: int, capacity: int, *, kept: int) -> None:
        """Begin with `base`, in fresh arrays that keep so many entries."""
        start, self.base, self._capacity = base - self.base, base, capacity
        for name, old in list(self._arrays.items()):
            self._make(name)[:kept] = old[start : start + kept]

    def _make(self, name: str) -> NDArray[np.int64]:
        dtype, fill = self._fills[name]
        if dtype == np.uint8:
            self.raw[name] = bytearray(bytes([fill]) * self._capacity)
            self._arrays[name] = np.frombuffer(self.raw[name], np.uint8)
        else:
            self._arrays[name] = np.full(self._capacity, fill, dtype)
        return self._arrays[name]
