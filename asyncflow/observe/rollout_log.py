"""What the model wrote, one JSON object for each trajectory, in files of a thousand tickets.

Every group is kept until `FULL_BYTES` have been written; then every second ticket until as
much again has been written, then every fourth, and so on. So the log of a long run grows
like a logarithm, its beginning is complete and its end is evenly sampled.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from asyncflow.core.types import Group, Trajectory
from asyncflow.core.world import Disk
from asyncflow.observe.json_lines import JsonLines
from asyncflow.observe.records import ROLLOUTS_FOLDER

FULL_BYTES = 64 * 2**20
TICKETS_IN_FILE = 1000


class RolloutLog:
    """Writes `rollouts/tickets-000000.jsonl` and so on."""

    def __init__(self, run: Path, disk: Disk, *, full_bytes: int = FULL_BYTES) -> None:
        self._folder = run / ROLLOUTS_FOLDER
        self._disk = disk
        self._full_bytes = full_bytes
        self._num_bytes = sum(file.stat().st_size for file in self._folder.glob("*.jsonl"))
        self._files: dict[int, JsonLines] = {}

    def add(self, group: Group) -> None:
        """Keep the trajectories of a group, or pass over it when much has been kept already."""
        stride = 2 ** min(62, self._num_bytes // self._full_bytes)
        if group.ticket % stride:
            return
        lines = self._file(group.ticket // TICKETS_IN_FILE)
        for sibling, trajectory in enumerate(group.trajectories):
            self._num_bytes += lines.add(_line(group, sibling, trajectory))

    def flush(self) -> None:
        """Hand everything to the operating system, and forget files that are surely complete."""
        for lines in self._files.values():
            lines.flush()
        # Groups end out of order, so the file before the newest may still grow.
        for index in sorted(self._files)[:-2]:
            del self._files[index]

    def _file(self, index: int) -> JsonLines:
        if index not in self._files:
            path = self._folder / f"tickets-{index * TICKETS_IN_FILE:06d}.jsonl"
            self._files[index] = JsonLines(path, self._disk, is_resumed=path.is_file())
        return self._files[index]


def _line(group: Group, sibling: int, trajectory: Trajectory) -> dict[str, object]:
    return {
        "ticket": int(group.ticket),
        "sibling": sibling,
        "prompt_id": group.prompt.id,
        "prompt": trajectory.prompt_text,
        "completion": trajectory.completion_text,
        "answer": group.prompt.answer,
        "reward": trajectory.reward,
        "finish_reason": str(trajectory.finish_reason),
        "num_turns": trajectory.num_turns,
        "num_tokens": len(trajectory.token_ids),
        "versions": _runs(trajectory),
    }


def _runs(trajectory: Trajectory) -> list[tuple[int, int]]:
    """The versions of the sampled tokens, run-length coded."""
    versions = trajectory.versions[trajectory.loss_mask]
    if not len(versions):
        return []
    starts = np.concatenate([[0], np.flatnonzero(np.diff(versions)) + 1, [len(versions)]])
    return [(int(versions[start]), int(end - start)) for start, end in pairwise(starts)]
