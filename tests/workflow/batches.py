"""Groups and batches for tests of the workflow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asyncflow.core.columns import LOGPROBS, LOSS_MASK, REWARD, TOKEN_IDS, VERSIONS
from asyncflow.core.types import NOT_SAMPLED, MicroBatch, Ragged, Rows


def group_columns(rewards: Sequence[float], lengths: Sequence[int], *, first_token: int = 0) -> dict[str, Ragged]:
    """A group whose tokens are numbered from `first_token`: one prompt token, the rest sampled at version 0."""
    masks = [np.arange(length) > 0 for length in lengths]
    tokens = np.split(first_token + np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    return {
        TOKEN_IDS: Ragged.stack([array.astype(np.int32) for array in tokens]),
        LOSS_MASK: Ragged.stack(list(masks)),
        LOGPROBS: Ragged.stack([np.where(mask, -1, 0).astype(np.float32) for mask in masks]),
        VERSIONS: Ragged.stack([np.where(mask, 0, NOT_SAMPLED).astype(np.int32) for mask in masks]),
        REWARD: Ragged(values=np.array(rewards, np.float32), lengths=np.ones(len(rewards), np.int32)),
    }


def versions_batch(versions: Sequence[int], tickets: Sequence[int] = (7,)) -> MicroBatch:
    """One sample a ticket, each with these versions."""
    rows = [np.array(versions, np.int32) for _ in tickets]
    columns = {
        TOKEN_IDS: Ragged.stack([np.zeros(len(row), np.int32) for row in rows]),
        LOSS_MASK: Ragged.stack([row != NOT_SAMPLED for row in rows]),
        VERSIONS: Ragged.stack(list(rows)),
    }
    return MicroBatch(rows=Rows.of_groups(np.array(tickets), 1), columns=columns)
