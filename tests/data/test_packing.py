"""Packing: every row once, no micro-batch over its limit, rows of like length together."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.data.packing import pack

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@given(lengths=LENGTHS, max_tokens=st.integers(1, 200))
def test_every_row_is_in_exactly_one_micro_batch_within_the_limit(lengths: list[int], max_tokens: int) -> None:
    batches = pack(np.array(lengths, np.int32), max_tokens)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[row] for row in batch) <= max_tokens


@given(lengths=LENGTHS, max_tokens=st.integers(1, 200))
def test_lengths_do_not_fall_from_one_micro_batch_to_the_next(lengths: list[int], max_tokens: int) -> None:
    in_order = [lengths[row] for batch in pack(np.array(lengths, np.int32), max_tokens) for row in batch]
    assert in_order == sorted(lengths)


def test_micro_batches_are_about_equal() -> None:
    sizes = [len(batch) for batch in pack(np.full(100, 10, np.int32), 300)]
    assert sizes == [25, 25, 25, 25]
