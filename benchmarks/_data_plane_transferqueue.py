"""The arm of TransferQueue 0.1.11: its client, and for W its streaming loader.

As it is fastest here; each of these settings can be changed by an option of the same name. `units` storage
units, of which more only help D; the controller answers a get that it can't serve at once (`polling_mode`), as it
otherwise sleeps for 5 s, producers included, and the consumer asks again after `poll_ms`; `window` puts under
way at once, each from a thread; a new partition for each `partition_rows` rows, as its cost grows with the
partition; what was consumed stays, as clearing it only takes time.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from _data_plane_ray import cluster, connected
from _data_plane_run import Options
from _data_plane_work import MIXED_RAGGED, Batch, Job, Rows

DEFAULTS = {"units": "1", "poll_ms": "2", "window": "8", "partition_rows": "1024", "threads": "8"}
TASK = "train"


@contextlib.contextmanager
def serve(options: Options) -> Iterator[object]:
    """Its controller and storage units, on a cluster of this machine."""
    options = {**DEFAULTS, **options}
    os.environ["TQ_LOGGING_LEVEL"] = "ERROR"
    os.environ["TQ_NUM_THREADS"] = options["threads"]
    with cluster() as ray:
        queue = importlib.import_module("transfer_queue")
        omegaconf = importlib.import_module("omegaconf")
        config = {
            "controller": {"polling_mode": True},
            "backend": {"SimpleStorage": {"num_data_storage_units": int(options["units"])}},
        }
        queue.init(omegaconf.OmegaConf.create(config))
        yield ray.get_runtime_context().gcs_address, options
        queue.close()


class Partitions:
    """Which partition the next rows belong to; the same on both sides."""

    def __init__(self, job: Job, options: Options) -> None:
        self._name, self._done = job.label, 0
        self._rows = sys.maxsize if job.in_one_partition else int(options["partition_rows"])

    def next(self, num_rows: int) -> str:
        """For so many rows."""
        partition = self._done // self._rows
        self._done += num_rows
        return f"{self._name}-{partition}"


class Producer:
    """Makes tensors and puts them."""

    def __init__(self, client: Any, job: Job, options: Options) -> None:  # noqa: ANN401 - not installed here
        self._client = client
        self._torch = importlib.import_module("torch")
        self._dict = importlib.import_module("tensordict").TensorDict
        self._partitions = Partitions(job, options)
        self._window = int(options["window"])
        self._threads = ThreadPoolExecutor(self._window)
        self._sent: deque[Future[object]] = deque()

    def put(self, rows: Rows) -> None:
        """A nested tensor where rows differ in length."""
        torch = self._torch
        fields: dict[str, object] = {}
        for name, column in rows.items():
            if isinstance(column, list):
                fields[name] = torch.nested.as_nested_tensor(list(map(torch.from_numpy, column)), layout=torch.jagged)
            else:
                fields[name] = torch.from_numpy(column).reshape(len(column), -1)
        num_rows = len(next(iter(rows.values())))
        data = self._dict(fields, batch_size=num_rows)
        partition = self._partitions.next(num_rows)
        if self._window == 1:
            self._client.put(data, partition_id=partition)
            return
        self._sent.append(self._threads.submit(self._client.put, data, partition_id=partition))
        if len(self._sent) >= self._window:
            self._sent.popleft().result()

    def flush(self) -> None:
        """Wait for those under way."""
        while self._sent:
            self._sent.popleft().result()


class Consumer:
    """Asks for metadata until there is some, then for the data."""

    def __init__(self, client: Any, job: Job, options: Options) -> None:  # noqa: ANN401
        self._client, self._columns = client, list(job.columns)
        self._partitions = Partitions(job, options)
        self._poll_s = float(options["poll_ms"]) / 1e3

    def get(self, num_rows: int) -> Batch:
        """Wait by asking again."""
        partition = self._partitions.next(num_rows)
        while True:
            meta = self._client.get_meta(self._columns, num_rows, partition, task_name=TASK)
            if meta.size:
                return as_batch(self._client.get_data(meta), self._columns)
            time.sleep(self._poll_s)

    def clear(self) -> None:
        """Rows stay, as clearing them only takes time."""


class DenseProducer:
    """D: puts by key, as its own benchmark does."""

    def __init__(self, job: Job) -> None:
        self._queue, self._torch = importlib.import_module("transfer_queue"), importlib.import_module("torch")
        self._dict = importlib.import_module("tensordict").TensorDict
        self._keys = keys_of(job)

    def put(self, rows: Rows) -> None:
        """All rows."""
        fields = {name: self._torch.from_numpy(column) for name, column in rows.items()}
        data = self._dict(fields, batch_size=len(self._keys))
        self._queue.kv_batch_put(keys=self._keys, partition_id="D", fields=data)

    def flush(self) -> None:
        """It has arrived."""


class DenseConsumer:
    """D: gets by key."""

    def __init__(self, job: Job) -> None:
        self._queue, self._columns = importlib.import_module("transfer_queue"), list(job.columns)
        self._keys = keys_of(job)

    def get(self, num_rows: int) -> Batch:
        """All rows."""
        return as_batch(self._queue.kv_batch_get(keys=self._keys[:num_rows], partition_id="D"), self._columns)

    def clear(self) -> None:
        """Between rounds, outside of the clock."""
        self._queue.kv_clear(keys=self._keys, partition_id="D")


def keys_of(job: Job) -> list[str]:
    """One for each row."""
    return [f"row_{i}" for i in range(job.rows)]


class Loader:
    """W: what it offers to a trainer that waits, its streaming loader."""

    def __init__(self, config: Any, job: Job) -> None:  # noqa: ANN401
        dataloader = importlib.import_module("transfer_queue.dataloader")
        self._columns = list(job.columns)
        dataset = dataloader.StreamingDataset(
            config=config,
            batch_size=job.get_rows,
            micro_batch_size=job.get_rows,
            data_fields=self._columns,
            partition_id=Partitions(job, DEFAULTS).next(0),
            task_name=TASK,
            dp_rank=0,
        )
        self._batches = iter(dataloader.StreamingDataLoader(dataset, num_workers=0))

    def get(self, num_rows: int) -> Batch:
        """The next batch; the loader knows how many rows it has."""
        data, _ = next(self._batches)
        return as_batch(data, self._columns)

    def clear(self) -> None:
        """Rows stay."""


def as_batch(data: Any, columns: list[str]) -> Batch:  # noqa: ANN401
    """Views of its tensors, which may be nested though all rows are alike."""
    batch: Batch = {}
    for name in columns:
        tensor, num_rows = data[name], len(data[name])
        if not tensor.is_nested:
            values, lengths = tensor.numpy(), np.full(num_rows, tensor[0].numel())
        elif hasattr(tensor, "offsets"):
            values, lengths = tensor.values().numpy(), np.diff(tensor.offsets().numpy())
        else:
            rows = [row.numpy() for row in tensor.unbind()]
            values, lengths = np.concatenate(rows), np.array(list(map(len, rows)))
        is_ragged = name in MIXED_RAGGED
        batch[name] = (values.reshape(-1), lengths) if is_ragged else (values.reshape(num_rows, -1), None)
    return batch


@contextlib.contextmanager
def client_of(address: object) -> Iterator[tuple[Any, Any, Options]]:
    """A client, the configuration and the options."""
    assert isinstance(address, tuple)
    gcs, options = address
    os.environ["TQ_LOGGING_LEVEL"] = "ERROR"
    os.environ["TQ_NUM_THREADS"] = options["threads"]
    with connected(gcs) as ray:
        queue = importlib.import_module("transfer_queue")
        queue.init()
        controller = ray.get_actor("TransferQueueController", namespace="transfer_queue")
        yield queue.get_client(), ray.get(controller.get_config.remote()), options


@contextlib.contextmanager
def open_producer(address: object, job: Job) -> Iterator[Producer | DenseProducer]:
    """Connect."""
    with client_of(address) as (client, _, options):
        yield DenseProducer(job) if job.workload == "D" else Producer(client, job, options)


@contextlib.contextmanager
def open_consumer(address: object, job: Job) -> Iterator[Consumer | DenseConsumer | Loader]:
    """Connect."""
    with client_of(address) as (client, config, options):
        if job.workload == "D":
            yield DenseConsumer(job)
        else:
            yield Loader(config, job) if job.workload == "W" else Consumer(client, job, options)
