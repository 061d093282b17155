"""From groups to the columns of the transfer queue. Pure."""

from __future__ import annotations

from collections.abc import Sequence

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


def demonstration_columns(samples: Sequence[tuple[IntArray, IntArray]]) -> dict[str, Ragged]:
    """The columns of supervised samples, (prompt tokens, completion tokens): rows that learn the completion.

    >>> columns = demonstration_columns([(np.array([1, 2], np.int32), np.array([7], np.int32))])
    >>> columns["token_ids"].values.tolist(), columns["loss_mask"].values.tolist()
    ([1, 2, 7], [False, False, True])
    """
    masks = [np.arange(len(prompt) + len(completion)) >= len(prompt) for prompt, completion in samples]
    return {
        TOKEN_IDS: Ragged.stack([np.concatenate(sample).astype(np.int32) for sample in samples]),
        LOSS_MASK: Ragged.stack([*masks]),
    }
