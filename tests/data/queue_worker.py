"""A consumer in a process of its own: `python -m tests.data.queue_worker ADDRESS TASK MODE`.

Prints the numbers of each batch it got as a line of JSON. In mode `drain` it acknowledges every
batch, to the end of the stream; in mode `hold` it keeps the first, and its own put, until it is killed.
"""

from __future__ import annotations

import json
import signal
import sys

import numpy as np

from asyncflow.data.queue import TransferQueue


def main() -> None:
    address, task, mode = sys.argv[1:]
    with TransferQueue.connect(address) as queue:
        if mode == "hold":
            queue.put({"ids": np.array([-1, -2])})
        while (batch := queue.get(task, max_rows=7)) is not None:
            numbers = batch["ids"].values.tolist()
            print(json.dumps(numbers), flush=True)
            if mode == "hold":
                signal.pause()
            queue.acknowledge(batch)


if __name__ == "__main__":
    main()
