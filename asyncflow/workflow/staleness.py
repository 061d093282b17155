"""The staleness bound, asserted on every batch although the gate makes a violation impossible."""

from __future__ import annotations

import numpy as np

from asyncflow.core.columns import VERSIONS
from asyncflow.core.errors import StalenessError
from asyncflow.core.types import NOT_SAMPLED, IntArray, MicroBatch


def token_staleness(batch: MicroBatch, step: int) -> IntArray:
    """How many versions old each sampled token of a batch is, for a trainer at version `step`."""
    versions = batch[VERSIONS]
    staleness: IntArray = (step - versions[versions != NOT_SAMPLED]).astype(np.int32)
    return staleness


def check_staleness(batch: MicroBatch, step: int, bound: int) -> IntArray:
    """The staleness of the sampled tokens. Raises `StalenessError` if one is over the bound or below 0."""
    staleness = token_staleness(batch, step)
    if staleness.size and not 0 <= staleness.min() <= staleness.max() <= bound:
        tickets = np.unique(batch.rows.tickets)
        raise StalenessError(
            f"batch holds tokens {staleness.min()} to {staleness.max()} versions old, the bound is {bound} "
            f"(trainer at version {step}, groups {tickets[0]} to {tickets[-1]})"
        )
    return staleness
