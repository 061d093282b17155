"""Every error that asyncflow raises, in one tree.

::

    AsyncFlowError
    ├── ConfigError            the user's settings or files; raised before anything starts
    ├── RolloutError           one rollout failed: data, not a crash; spends the failure budget
    │   ├── AgentError         the agent or environment raised
    │   ├── RewardError        the reward raised, or was not a finite number
    │   └── RolloutTimeout     the rollout outlived its time limit
    ├── FailureBudgetError     too many rollouts failed; names the most frequent cause
    ├── NoSignalError          group after group earned equal rewards, so nothing can be learnt
    ├── EngineLostError        an engine's process died; carries its last words
    ├── NonFiniteError         a loss, gradient or log-probability is NaN or infinite
    ├── DeadlockError          every task waits and no timer is set (virtual clock only)
    ├── RunFolderError         a run folder is missing, damaged, or holds another run
    │   └── LogDamagedError    the durable log lacks a record that was on the disk
    ├── QueueError             a call of the transfer queue that can't be done
    │   ├── ColumnError        a column can't be stored, or is not what its rows have
    │   ├── StaleHandleError   rows that are no longer there, or were taken from another queue
    │   ├── LeaseLostError     rows were acknowledged that meanwhile belong to somebody else
    │   ├── QueueFullError     there is no room, and nothing that could give some back
    │   └── QueueLostError     the queue's server ended or does not answer
    └── InvariantError         asyncflow broke a promise it makes: a bug, and the run ends
        ├── StalenessError     a batch holds a token older than the bound
        ├── LedgerError        a ticket or row made a transition that must not happen
        └── WeightSyncError    an engine serves other weights than it was sent
"""

from __future__ import annotations


class AsyncFlowError(Exception):
    """Base of every error raised by asyncflow."""


class ConfigError(AsyncFlowError):
    """The user's settings or files are wrong; `problems` holds one sentence for each mistake."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class RolloutError(AsyncFlowError):
    """One rollout failed. `reason` is the word the ledger keeps for the dropped ticket."""

    reason = "failed"


class AgentError(RolloutError):
    """The agent or its environment raised."""

    reason = "agent"


class RewardError(RolloutError):
    """The reward function raised, or returned something that is not a finite number."""

    reason = "reward"


class RolloutTimeout(RolloutError):
    """The rollout outlived its time limit."""

    reason = "timeout"


class FailureBudgetError(AsyncFlowError):
    """More rollouts failed than the run allows."""


class NoSignalError(AsyncFlowError):
    """Group after group earned equal rewards, so there is nothing to learn from."""


class EngineLostError(AsyncFlowError):
    """An engine's process died or stopped answering."""


class NonFiniteError(AsyncFlowError):
    """A loss, a gradient or a log-probability is NaN or infinite."""


class DeadlockError(AsyncFlowError):
    """Every task waits and no timer is set, so nothing can ever happen again."""


class RunFolderError(AsyncFlowError):
    """A run folder is missing, damaged, or already holds another run."""


class LogDamagedError(RunFolderError):
    """The durable log lacks a record that was on the disk, or holds it changed."""


class QueueError(AsyncFlowError):
    """A call of the transfer queue that can't be done; the queue goes on."""


class ColumnError(QueueError):
    """A column can't be stored, or is not what the other rows have."""


class StaleHandleError(QueueError):
    """Rows were named that are no longer in the queue, or are of another queue."""


class LeaseLostError(QueueError):
    """Rows were acknowledged or released that are not, or no longer, leased to the caller."""


class QueueFullError(QueueError):
    """There is no room for the rows, and nothing is under way that could give some back."""


class QueueLostError(QueueError):
    """The queue's server ended, or the connection to it broke."""


class InvariantError(AsyncFlowError):
    """asyncflow broke one of its own promises. This is a bug in asyncflow."""


class StalenessError(InvariantError):
    """A batch holds a token that is older than the staleness bound."""


class LedgerError(InvariantError):
    """A ticket or a row made a transition that must not happen."""


class WeightSyncError(InvariantError):
    """An engine serves other weights than the ones it was sent."""
