"""Which rows share a micro-batch. Pure."""

from __future__ import annotations

import heapq

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


def assign(lengths: IntArray, max_tokens: int, num_ranks: int) -> list[list[IntArray]]:
    """Split rows into micro-batches for data-parallel ranks: as many for each rank, of about as many tokens.

    Collectives of the ranks match then; a rank that has fewer rows gets empty micro-batches. Rows
    are given, the longest first, to the micro-batch with the fewest tokens (Graham, 1969: at most
    4/3 of the best possible). Returns row numbers, `[rank][micro-batch]`; every row is in exactly one.

    >>> [[rows.tolist() for rows in rank] for rank in assign(np.array([9, 4, 5], np.int32), 10, 2)]
    [[[0]], [[1, 2]]]
    """
    rounds = max(1, -(-int(lengths.sum()) // (max_tokens * num_ranks)))
    while True:
        batches = _spread(lengths, rounds * num_ranks)
        if max(tokens for tokens, _ in batches) <= max(max_tokens, int(lengths.max(initial=0))):
            break
        rounds += 1
    heaviest_first = sorted(batches, key=lambda batch: -batch[0])
    ranks: list[list[IntArray]] = [[] for _ in range(num_ranks)]
    for place, (_, rows) in enumerate(heaviest_first):
        turn, rank = divmod(place, num_ranks)
        ranks[rank if turn % 2 == 0 else num_ranks - 1 - rank].append(np.array(sorted(rows), np.int32))
    return ranks


def _spread(lengths: IntArray, num_batches: int) -> list[tuple[int, list[int]]]:
    """Tokens and rows of each of so many micro-batches."""
    heap: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(num_batches)]
    for row in np.argsort(-lengths, kind="stable").tolist():
        tokens, number, rows = heapq.heappop(heap)
        heapq.heappush(heap, (tokens + int(lengths[row]), number, [*rows, row]))
    return [(tokens, rows) for tokens, _, rows in sorted(heap, key=lambda batch: batch[1])]
