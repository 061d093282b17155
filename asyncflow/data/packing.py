"""Which rows share a micro-batch. Pure."""

from __future__ import annotations

import numpy as np

from asyncflow.core.types import IntArray


def pack(lengths: IntArray, max_tokens: int) -> list[IntArray]:
    """Split rows into micro-batches of at most `max_tokens` tokens, as equal as their order allows.

    Rows of like length come together, so that an engine that pads wastes little. A row longer
    than `max_tokens` gets a micro-batch of its own. Returns row numbers, one array for each
    micro-batch; every row is in exactly one.

    >>> [rows.tolist() for rows in pack(np.array([3, 9, 3, 9], np.int32), 18)]
    [[0, 2, 1], [3]]
    """
    order = np.argsort(lengths, kind="stable").astype(np.int32)
    num_batches = max(1, -(-int(lengths.sum()) // max_tokens))
    target = lengths.sum() / num_batches
    batches: list[list[int]] = [[]]
    tokens = 0
    for row in order:
        length = int(lengths[row])
        if batches[-1] and (tokens + length > max_tokens or tokens + length / 2 > target):
            batches.append([])
            tokens = 0
        batches[-1].append(int(row))
        tokens += length
    return [np.array(rows, np.int32) for rows in batches]
