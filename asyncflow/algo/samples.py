"""From groups to the columns of the transfer queue. Pure."""

from __future__ import annotations

import numpy as np

from asyncflow.core.columns import LOGPROBS, LOSS_MASK, REWARD, TOKEN_IDS, VERSIONS
from asyncflow.core.types import Group, IntArray, Ragged


def to_columns(group: Group) -> dict[str, Ragged]:
    """The columns that exist once a group is rolled out, one row for each sibling."""
    siblings = group.trajectories
    rewards_G = np.array([sibling.reward for sibling in siblings], np.float32)
    return {
        TOKEN_IDS: Ragged.stack([sibling.token_ids.astype(np.int32) for sibling in siblings]),
        LOSS_MASK: Ragged.stack([sibling.loss_mask.astype(np.bool_) for sibling in siblings]),
        LOGPROBS: Ragged.stack([sibling.logprobs.astype(np.float32) for sibling in siblings]),
        VERSIONS: Ragged.stack([sibling.versions.astype(np.int32) for sibling in siblings]),
        REWARD: Ragged(values=rewards_G, lengths=np.ones(len(siblings), np.int32)),
    }


def demonstration_columns(prompt_ids: IntArray, completion_ids: IntArray) -> dict[str, Ragged]:
    """The columns of one supervised sample: a row that learns the completion, not the prompt.

    >>> columns = demonstration_columns(np.array([1, 2], np.int32), np.array([7], np.int32))
    >>> columns["token_ids"].values.tolist(), columns["loss_mask"].values.tolist()
    ([1, 2, 7], [False, False, True])
    """
    token_ids = np.concatenate([prompt_ids, completion_ids]).astype(np.int32)
    return {
        TOKEN_IDS: Ragged.stack([token_ids]),
        LOSS_MASK: Ragged.stack([np.arange(len(token_ids)) >= len(prompt_ids)]),
    }
