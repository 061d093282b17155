"""Logs as real runs write them, from the real loop under simulation: to be read back, and to be forged."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from asyncflow.core.config import AlgorithmConfig, CheckpointConfig, RolloutConfig, RunConfig, SamplingConfig
from asyncflow.data import records
from asyncflow.data.audit import LogAudit, audit_records
from asyncflow.data.ledger import LedgerSnapshot
from asyncflow.data.log import FileLog, LogMode, MemoryLog
from asyncflow.data.records import AnyRecord
from asyncflow.engines.scripted import Script
from asyncflow.plan.simulate import Simulation, simulate

Entry: TypeAlias = tuple[AnyRecord, bytes]

CONFIG = RunConfig(
    steps=6,
    groups_per_step=4,
    group_size=3,
    max_staleness=1,
    sampling=SamplingConfig(max_tokens=8),
    rollout=RolloutConfig(max_failures=1000, max_running=16),
    algorithm=AlgorithmConfig(drop_no_signal=True),
    checkpoint=CheckpointConfig(every=2),
)
SCRIPT = Script(failure_rate=0.06)


def simulated(
    config: RunConfig = CONFIG, snapshot: LedgerSnapshot | None = None, seed: int = 1
) -> tuple[list[Entry], Simulation]:
    """The records of a simulated run with their payloads, and what came of it."""
    log = MemoryLog()
    result = simulate(config, SCRIPT, snapshot=snapshot, seed=seed, log=log)
    return [(records.decode(meta), payload) for meta, payload in log.records], result


def audited(entries: Sequence[Entry], *, compacted: bool = False) -> LogAudit:
    """The audit of these records."""

    def read(payload: bytes) -> NDArray[np.uint8] | None:
        return None if compacted else np.frombuffer(payload, np.uint8)

    return audit_records(
        (lsn, records.encode(record), partial(read, payload)) for lsn, (record, payload) in enumerate(entries, 1)
    )


def write(folder: Path, entries: Sequence[Entry]) -> Path:
    """The same records as files."""

    async def append() -> None:
        log = FileLog.open(folder, mode=LogMode.SYNC, on_failure=lambda error: None)
        for record, payload in entries:
            log.append(records.encode(record), (payload,) if payload else ())
        await log.aclose()

    asyncio.run(append())
    return folder
