"""The arm of Ray: packed batches in its object store, their references in the queue of an actor.

A put is `ray.put` of one array of bytes and a call that hands its reference to the actor, of which so many
may be under way; a get is a call that the actor answers when it has a reference, and
`ray.get`, which gives a view of the store's shared memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from _data_plane_run import Options
from _data_plane_work import Batch, Job, Rows, count, join, pack, unpack

WINDOW = 8
STORE_BYTES = 4 << 30
NAME, NAMESPACE = "queue", "data_plane"
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class References:
    """The actor: references in the order in which they came."""

    def __init__(self) -> None:
        self._held: deque[list[object]] = deque()
        self._came = asyncio.Event()

    async def put(self, reference: list[object]) -> None:
        """In a list, so that Ray hands over the reference and not its value."""
        self._held.append(reference)
        self._came.set()

    async def get(self, at_most: int) -> list[object]:
        """Those that are there, at least one."""
        while not self._held:
            self._came.clear()
            await self._came.wait()
        return [reference for _ in range(min(at_most, len(self._held))) for reference in self._held.popleft()]


def ray_module() -> Any:  # noqa: ANN401 - a peer that is not installed here
    """Ray, without its reports home."""
    os.environ.update(QUIET)
    return importlib.import_module("ray")


@contextlib.contextmanager
def cluster() -> Iterator[Any]:
    """A cluster of this machine, without a dashboard; ends with the block."""
    ray = ray_module()
    paths = os.pathsep.join(path for path in sys.path if path)
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=STORE_BYTES,
        namespace=NAMESPACE,
        runtime_env={"env_vars": {**QUIET, "PYTHONPATH": paths}},
    )
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def serve(options: Options) -> Iterator[object]:
    """A cluster with the actor, one of its own thread."""
    with cluster() as ray:
        actor = ray.remote(References).options(name=NAME, num_cpus=0, max_concurrency=64).remote()
        yield ray.get_runtime_context().gcs_address
        ray.kill(actor)


@contextlib.contextmanager
def connected(address: object) -> Iterator[Any]:
    """A process of the cluster."""
    ray = ray_module()
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, logging_level="error", namespace=NAMESPACE)
    yield ray


class Producer:
    """Packs and puts."""

    def __init__(self, ray: Any, job: Job) -> None:  # noqa: ANN401
        self._ray, self._columns = ray, job.columns
        self._actor = ray.get_actor(NAME)
        self._sent: deque[object] = deque()

    def put(self, rows: Rows) -> None:
        """Into the object store, and its reference to the actor."""
        packed = np.frombuffer(b"".join(pack(rows, self._columns)), np.uint8)
        self._sent.append(self._actor.put.remote([self._ray.put(packed)]))
        if len(self._sent) > WINDOW:
            self._ray.get(self._sent.popleft())

    def flush(self) -> None:
        """Wait for the actor."""
        self._ray.get(list(self._sent))
        self._sent.clear()


class Consumer:
    """Gets references until there are enough rows."""

    def __init__(self, ray: Any, job: Job) -> None:  # noqa: ANN401
        self._ray, self._job = ray, job
        self._actor = ray.get_actor(NAME)

    def get(self, num_rows: int) -> Batch:
        """Of as many messages as it takes."""
        batches: list[Batch] = []
        while num_rows > 0:
            at_most = -(-num_rows // self._job.put_rows) if self._job.workload != "D" else 1
            references = self._ray.get(self._actor.get.remote(at_most))
            batches += [unpack(packed, self._job.columns) for packed in self._ray.get(references)]
            num_rows -= sum(map(count, batches[-len(references) :]))
        return join(batches)

    def clear(self) -> None:
        """Nothing is held."""


@contextlib.contextmanager
def open_producer(address: object, job: Job) -> Iterator[Producer]:
    """Connect."""
    with connected(address) as ray:
        yield Producer(ray, job)


@contextlib.contextmanager
def open_consumer(address: object, job: Job) -> Iterator[Consumer]:
    """Connect."""
    with connected(address) as ray:
        yield Consumer(ray, job)
