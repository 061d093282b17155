"""The transfer queue: the ledger, its ordering and packing, the store, and where prompts come from."""

from asyncflow.data.batch import Batch
from asyncflow.data.queue import TransferQueue

__all__ = ["Batch", "TransferQueue"]
