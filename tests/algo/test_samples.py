import numpy as np

from asyncflow.algo.samples import to_columns
from asyncflow.core.columns import LOGPROBS, LOSS_MASK, REWARD, TOKEN_IDS, VERSIONS
from asyncflow.core.types import FinishReason, Group, Prompt, Ticket, Trajectory


def make_trajectory(num_tokens: int, reward: float) -> Trajectory:
    return Trajectory(
        token_ids=np.arange(num_tokens, dtype=np.int32),
        loss_mask=np.arange(num_tokens) > 1,
        logprobs=-np.arange(num_tokens, dtype=np.float32),
        versions=np.full(num_tokens, num_tokens, np.int32),
        reward=reward,
        prompt_text="",
        completion_text="",
        finish_reason=FinishReason.STOP,
    )


def test_columns_are_aligned_rows_of_the_siblings() -> None:
    group = Group(
        ticket=Ticket(0),
        prompt=Prompt(id="0", text=""),
        trajectories=(make_trajectory(3, 1.0), make_trajectory(5, 0.5)),
    )
    columns = to_columns(group)
    assert {name: column.values.dtype.name for name, column in columns.items()} == {
        TOKEN_IDS: "int32",
        LOSS_MASK: "bool",
        LOGPROBS: "float32",
        VERSIONS: "int32",
        REWARD: "float32",
    }
    assert columns.pop(REWARD).values.tolist() == [1.0, 0.5]
    for name, column in columns.items():
        assert column.lengths.tolist() == [3, 5], name
    assert columns[TOKEN_IDS].values.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert columns[LOSS_MASK].values.tolist() == [False, False, True, False, False, True, True, True]
    assert columns[VERSIONS].values.tolist() == [3] * 3 + [5] * 5
