"""A loop over a task's rows, as a training script has one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from asyncflow.data.batch import Asked, Batch
from asyncflow.data.queue import TransferQueue


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingLoader:
    """Batches of `rows_per_batch` rows, each as soon as it is complete, until the queue is finished.

    ::

        for batch in StreamingLoader(queue=queue, task="train", rows_per_batch=32):
            loss = step(torch.from_numpy(batch["tokens"].values), batch["tokens"].lengths)

    A batch is acknowledged when the loop asks for the next one. When the loop ends before, by
    `break` or an error, the batch that it was at is given back, and another consumer gets it. The last
    batch may have fewer rows. In a queue of groups, rows come in whole groups of `group_size`.

    While a batch is worked on, the next `prefetch` ones are under way already. With `copy`, columns are
    writable copies that may be kept; without, read-only views of shared memory where rows lie
    together, valid until the next batch. Raises `TimeoutError` when a batch is not complete after `timeout_s`.
    """

    queue: TransferQueue
    task: str
    rows_per_batch: int
    group_size: int = 1
    prefetch: int = 1
    copy: bool = True
    timeout_s: float | None = None

    def __iter__(self) -> Iterator[Batch]:
        """The batches; several loops, also in other processes, get different ones."""
        asked = deque(self._ask(None) for _ in range(1 + self.prefetch))
        try:
            while (batch := self.queue.answer(asked.popleft(), timeout_s=self.timeout_s, copy=self.copy)) is not None:
                is_done = False
                try:
                    yield batch
                    is_done = True
                finally:
                    if not is_done:
                        self.queue.release(batch)
                asked.append(self._ask(batch))
        finally:
            for one in asked:
                self.queue.withdraw(one)

    def _ask(self, done: Batch | None) -> Asked:
        """Ask for a batch, and acknowledge the one that is done."""
        rows = self.rows_per_batch
        return self.queue.ask(self.task, max_rows=rows, at_least=rows, group_size=self.group_size, done=done)
