"""Which requests run, and in which row: policy only, no tensors, no clock, no I/O.

Invariants, after every call:

- the running requests occupy rows 0 .. `num_running` - 1, so that a batch is always a slice;
- `num_running <= max_running`, and rows x longest running sequence <= `cache_tokens`, unless
  one request alone is longer;
- requests start by priority, higher first, then in the order of their arrival: none overtakes
  another of its priority, so nothing starves within one.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the scheduler knows of a request: sizes in tokens.

    Requests with equal `prompt_key` have the same prompt, which is computed once.
    """

    id: int
    prompt_key: bytes
    prompt_tokens: int
    max_tokens: int
    priority: int = 0

    @property
    def most_tokens(self) -> int:
        """Length of the sequence if it runs to its end."""
        return self.prompt_tokens + self.max_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """The request in row `source` moves into row `target`, which is free."""

    source: int
    target: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What may run at once.

    `prefill_tokens` bounds the prompt tokens computed before one decode step, so that running
    requests are not held up for long; a longer prompt is admitted alone.
    """

    max_running: int
    prefill_tokens: int
    cache_tokens: int


@dataclass(slots=True)
class Scheduler:
    """A waiting queue and the rows that run. Call `admit` before and `release` after a decode step."""

    limits: Limits
    running: list[Request] = field(default_factory=list)
    _waiting: dict[int, Request] = field(default_factory=dict)
    _queue: list[tuple[int, int, int]] = field(default_factory=list)
    _num_submitted: int = 0

    @property
    def num_running(self) -> int:
        """Rows in use."""
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        """Requests without a row."""
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Queue a request behind those of its priority."""
        self._waiting[request.id] = request
        heapq.heappush(self._queue, (-request.priority, self._num_submitted, request.id))
        self._num_submitted += 1

    def withdraw(self, request: int) -> bool:
        """Forget a waiting request; false when it does not wait."""
        return self._waiting.pop(request, None) is not None

    def admit(self) -> list[Request]:
        """Start waiting requests as long as there is room; they take the rows after the running ones."""
        admitted: list[Request] = []
        prompts = {request.prompt_key for request in self.running} if self._queue else set()
        budget = self.limits.prefill_tokens
        longest = max((request.most_tokens for request in self.running), default=0)
        while (request := self._first_waiting()) is not None:
            longest = max(longest, request.most_tokens)
            cost = 0 if request.prompt_key in prompts else request.prompt_tokens
            if not self._has_room(longest) or (admitted and cost > budget):
                break
            heapq.heappop(self._queue)
            del self._waiting[request.id]
            budget -= cost
            prompts.add(request.prompt_key)
            admitted.append(request)
            self.running.append(request)
        return admitted

    def release(self, rows: Sequence[int]) -> list[Move]:
        """Free these rows; the last running requests move into the gaps.

        >>> scheduler = Scheduler(Limits(max_running=4, prefill_tokens=9, cache_tokens=99))
        >>> for id in range(4):
        ...     scheduler.submit(Request(id=id, prompt_key=b"", prompt_tokens=1, max_tokens=1))
        >>> _ = scheduler.admit()
        >>> scheduler.release([0, 2]), [request.id for request in scheduler.running]
        ([Move(source=3, target=0)], [3, 1])
        """
        freed = set(rows)
        kept = self.num_running - len(freed)
        gaps = sorted(row for row in freed if row < kept)
        last = [row for row in range(kept, self.num_running) if row not in freed]
        moves = [Move(source=source, target=target) for source, target in zip(last, gaps, strict=True)]
        for move in moves:
            self.running[move.target] = self.running[move.source]
        del self.running[kept:]
        return moves

    def row_of(self, request: int) -> int | None:
        """The row in which a request runs."""
        return next((row for row, running in enumerate(self.running) if running.id == request), None)

    def _first_waiting(self) -> Request | None:
        while self._queue and self._queue[0][2] not in self._waiting:
            heapq.heappop(self._queue)
        return self._waiting[self._queue[0][2]] if self._queue else None

    def _has_room(self, longest: int) -> bool:
        rows = self.num_running + 1
        return rows == 1 or (rows <= self.limits.max_running and rows * longest <= self.limits.cache_tokens)
