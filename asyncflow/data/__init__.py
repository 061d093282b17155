"""The transfer queue: the ledger, its ordering and packing, the store, and where prompts come from."""

from asyncflow.core.types import Ragged, Rows
from asyncflow.data.batch import Batch
from asyncflow.data.gate import Gate
from asyncflow.data.loader import StreamingLoader
from asyncflow.data.log import LogMode
from asyncflow.data.queue import TransferQueue

__all__ = ["Batch", "Gate", "LogMode", "Ragged", "Rows", "StreamingLoader", "TransferQueue"]
