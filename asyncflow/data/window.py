"""Arrays over a moving range of numbers: they grow at the end and forget at the beginning.

The queue numbers tickets and rows without end, and keeps only those that are still of use.
Cost is amortised: an entry is copied a bounded number of times, however many there are.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import DTypeLike, NDArray

FIRST_CAPACITY = 256


class Window:
    """Arrays indexed by `number - base`, for numbers from `base` to before `end`."""

    def __init__(self, fills: Mapping[str, tuple[DTypeLike, int]], *, base: int = 0) -> None:
        self._fills = dict(fills)
        self._arrays: dict[str, NDArray[np.int64]] = {}
        for name, (dtype, fill) in fills.items():
            self._arrays[name] = np.full(FIRST_CAPACITY, fill, dtype)
        self.base = self.end = base

    def __getitem__(self, name: str) -> NDArray[np.int64]:
        """The whole array, of whatever integers or booleans it holds; write into it at `number - base`.

        Valid until the next `extend` or `forget`.
        """
        return self._arrays[name]

    def __contains__(self, name: str) -> bool:
        """Whether there is such an array."""
        return name in self._arrays

    def add(self, name: str, dtype: DTypeLike, fill: int) -> None:
        """Another array, filled."""
        self._fills[name] = (dtype, fill)
        self._arrays[name] = np.full(self._capacity, fill, dtype)

    def extend(self, count: int) -> None:
        """Make room for `count` more numbers, filled."""
        self.end += count
        if self.end - self.base > self._capacity:
            self._resize(2 * (self.end - self.base))

    def forget(self, before: int) -> None:
        """Numbers below `before` are of no use; memory is given back now and then."""
        if before - self.base > max(FIRST_CAPACITY, (self.end - self.base) // 2):
            kept = self.end - before
            for name, array in self._arrays.items():
                dtype, fill = self._fills[name]
                fresh = np.full(max(FIRST_CAPACITY, 2 * kept), fill, dtype)
                fresh[:kept] = array[before - self.base : self.end - self.base]
                self._arrays[name] = fresh
            self.base = before

    @property
    def _capacity(self) -> int:
        return len(next(iter(self._arrays.values())))

    def _resize(self, capacity: int) -> None:
        for name, array in self._arrays.items():
            dtype, fill = self._fills[name]
            fresh = np.full(capacity, fill, dtype)
            fresh[: len(array)] = array
            self._arrays[name] = fresh
