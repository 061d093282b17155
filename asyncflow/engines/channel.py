"""The weight channel between processes on one machine: named tensors in shared memory, without pickle.

The memory is a `memfd`: it has no name in any file system, a child gets it as an inherited
file descriptor, and the kernel frees it when the last process holding it is gone, however
that process ended.

Layout: one page-sized header, then two slots of `Manifest.slot_bytes` each. The header holds one
signed 64-bit number per slot: the step whose weights the slot holds, or `EMPTY` while it is
being written. Invariant: writes alternate between the slots, so a reference stays readable
while the next version is written, and becomes unreadable with the write after that one.

A fingerprint names the weights by their content. Writer and reader compute it from the
same `(name, dtype, shape, bytes)`, so that a reader can attest what it serves.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from math import prod

import msgspec
import numpy as np
from numpy.typing import NDArray

from asyncflow.core.errors import ConfigError, WeightSyncError
from asyncflow.core.types import PolicyVersion, WeightsRef

Array = NDArray[np.generic]

CARRIERS: Mapping[str, np.dtype[np.generic]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),  # numpy has no bfloat16: its bits travel
}
"""The numpy dtype that carries the bits of each dtype a tensor may have."""

ALIGNMENT_BYTES = 64
HEADER_BYTES = 4096
NUM_SLOTS = 2
EMPTY = -1
BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of the channel; `offset` counts bytes from the start of its slot."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return prod(self.shape) * CARRIERS[self.dtype].itemsize

    def fits(self, slot_bytes: int) -> bool:
        """Whether it is a known tensor within a slot of this size."""
        is_sane = self.dtype in CARRIERS and self.offset >= 0 and all(size >= 0 for size in self.shape)
        return is_sane and self.offset + self.num_bytes <= slot_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Which tensors a slot holds, and where."""

    tensors: tuple[TensorSpec, ...]
    slot_bytes: int

    @classmethod
    def lay_out(cls, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> Manifest:
        """Give every tensor of `name -> (dtype, shape)` its place. Raises `ConfigError`.

        >>> [spec.offset for spec in Manifest.lay_out({"a": ("float32", (3,)), "b": ("bfloat16", ())}).tensors]
        [0, 64]
        """
        unknown = sorted({dtype for dtype, _ in shapes.values()} - CARRIERS.keys())
        if unknown:
            raise ConfigError(f"weights of dtype {', '.join(unknown)} can't be sent; known are {', '.join(CARRIERS)}")
        specs: list[TensorSpec] = []
        offset = 0
        for name, (dtype, shape) in shapes.items():
            spec = TensorSpec(name=name, dtype=dtype, shape=tuple(shape), offset=offset)
            specs.append(spec)
            offset += -(-spec.num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return cls(tensors=tuple(specs), slot_bytes=offset)

    def encode(self) -> bytes:
        """As JSON, for the other process."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """What `encode` wrote. Raises `ConfigError` for anything else."""
        try:
            manifest = msgspec.json.decode(data, type=cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"damaged weight manifest: {error}") from error
        if not all(spec.fits(manifest.slot_bytes) for spec in manifest.tensors):
            raise ConfigError("damaged weight manifest: a tensor of unknown dtype or outside its slot")
        return manifest


def fingerprint(tensors: Mapping[str, tuple[str, Array]], *, threads: int = 1) -> str:
    """A 128-bit hash of `name -> (dtype, bits)`, whatever the order of the names and the number of threads.

    SHA-256, for which most CPUs have instructions: on one of these it took half the time of
    BLAKE2b. The bytes of each tensor are hashed in blocks, then the hashes are, so that
    threads can share the work.
    """
    names = sorted(tensors)
    whole = sha256(repr([(name, tensors[name][0], tensors[name][1].shape) for name in names]).encode())
    blocks = [block for name in names for block in _blocks(tensors[name][1])]
    with ThreadPoolExecutor(threads, thread_name_prefix="asyncflow-hash") as pool:
        for digest in pool.map(_digest, blocks) if threads > 1 else map(_digest, blocks):
            whole.update(digest)
    return whole.hexdigest()[:32]


def _blocks(bits: Array) -> Iterator[memoryview]:
    flat = np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data
    return (flat[start : start + BLOCK_BYTES] for start in range(0, len(flat), BLOCK_BYTES))


def _digest(block: memoryview) -> bytes:
    return sha256(block).digest()


class MemoryChannel:
    """Carries weights from the one process that writes to those that read.

    The writer calls `create`, starts its readers with `pass_fds=[channel.fd]` and hands them
    `channel.manifest.encode()`; a reader calls `attach`. Not safe for two writers.
    """

    def __init__(self, fd: int, manifest: Manifest, *, access: int) -> None:
        self.manifest = manifest
        self._fd = fd
        num_bytes = HEADER_BYTES + NUM_SLOTS * manifest.slot_bytes
        if os.fstat(fd).st_size != num_bytes:
            raise ConfigError(f"weight channel holds {os.fstat(fd).st_size} bytes, its manifest says {num_bytes}")
        memory = np.frombuffer(mmap.mmap(fd, num_bytes, access=access), np.uint8)
        self._memory: NDArray[np.uint8] | None = memory
        self._next_slot = 0

    @classmethod
    def create(cls, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> MemoryChannel:
        """A channel for tensors `name -> (dtype, shape)`; a tied parameter is named once.

        The dtypes are the rollout engine's (`RolloutConfig.dtype`): what is sent is what is served.
        """
        manifest = Manifest.lay_out(shapes)
        fd = os.memfd_create("asyncflow-weights", os.MFD_CLOEXEC)
        os.ftruncate(fd, HEADER_BYTES + NUM_SLOTS * manifest.slot_bytes)
        channel = cls(fd, manifest, access=mmap.ACCESS_WRITE)
        channel._steps()[:] = EMPTY
        return channel

    @classmethod
    def attach(cls, fd: int, manifest: Manifest) -> MemoryChannel:
        """The reading end. It takes the descriptor over, and can't change the memory."""
        return cls(fd, manifest, access=mmap.ACCESS_READ)

    @property
    def fd(self) -> int:
        """The descriptor to pass to a reader's process."""
        return self._fd

    def write(self, tensors: Mapping[str, Array], version_step: int, lineage: str) -> WeightsRef:
        """Copy a version into the slot that was written longer ago, and name it by its content.

        Takes a memory copy and a hash of everything: run it off the event loop. Raises
        `WeightSyncError` when names, dtypes or shapes are not the manifest's.
        """
        return self.attest(self.fill(tensors.items(), version_step), lineage)

    def fill(self, tensors: Iterable[tuple[str, Array]], version_step: int) -> int:
        """The first half of `write`: the slot that now holds the version. bfloat16 comes as uint16 bits.

        Afterwards the tensors may change.
        """
        slot, self._next_slot = self._next_slot, (self._next_slot + 1) % NUM_SLOTS
        steps, views = self._steps(), self._views(slot)
        steps[slot] = EMPTY
        missing = set(views)
        for name, tensor in tensors:
            _copy(name, tensor, views.get(name))
            missing.discard(name)
        if missing:
            odd = ", ".join(sorted(missing)[:4])
            raise WeightSyncError(f"weights were written without some of the channel's names, for example {odd}")
        steps[slot] = version_step
        return slot

    def attest(self, slot: int, lineage: str, *, threads: int = 1) -> WeightsRef:
        """The second half of `write`: the reference to what the slot holds, with its fingerprint."""
        held = {spec.name: (spec.dtype, view) for spec, view in self._specified(slot)}
        version = PolicyVersion(
            step=int(self._steps()[slot]), lineage=lineage, fingerprint=fingerprint(held, threads=threads)
        )
        return WeightsRef(version=version, address=f"memory:{slot}")

    def read(self, ref: WeightsRef) -> dict[str, Array]:
        """Views of a version's tensors; check `holds(ref)` after copying them.

        Raises `WeightSyncError` when the slot holds another version.
        """
        if not self.holds(ref):
            held = self._steps()[self._slot(ref)]
            raise WeightSyncError(
                f"slot {ref.address} holds step {held} ({EMPTY}: being written), not {ref.version.step}: "
                "weights must be read before the export after the next one"
            )
        return self._views(self._slot(ref))

    def holds(self, ref: WeightsRef) -> bool:
        """Whether the slot still holds that version."""
        return int(self._steps()[self._slot(ref)]) == ref.version.step

    def close(self) -> None:
        """Let go of the memory; it is freed once no process and no view holds it. May be called twice."""
        if self._memory is not None:
            self._memory = None
            os.close(self._fd)

    def _slot(self, ref: WeightsRef) -> int:
        kind, _, slot = ref.address.partition(":")
        if kind != "memory" or slot not in {"0", "1"}:
            raise WeightSyncError(f"weights at {ref.address!r} are not in a memory channel")
        return int(slot)

    def _steps(self) -> NDArray[np.int64]:
        return self._open_memory()[: NUM_SLOTS * 8].view(np.int64)

    def _views(self, slot: int) -> dict[str, Array]:
        return {spec.name: view for spec, view in self._specified(slot)}

    def _specified(self, slot: int) -> Iterator[tuple[TensorSpec, Array]]:
        memory, start = self._open_memory(), HEADER_BYTES + slot * self.manifest.slot_bytes
        for spec in self.manifest.tensors:
            place = memory[start + spec.offset : start + spec.offset + spec.num_bytes]
            yield spec, place.view(CARRIERS[spec.dtype]).reshape(spec.shape)

    def _open_memory(self) -> NDArray[np.uint8]:
        if self._memory is None:
            raise WeightSyncError("the weight channel is closed")
        return self._memory


def _copy(name: str, tensor: Array, view: Array | None) -> None:
    if view is None:
        raise WeightSyncError(f"weights were written under a name that the channel does not have: {name}")
    if tensor.dtype != view.dtype or tensor.shape != view.shape:
        raise WeightSyncError(
            f"weight {name} came as {tensor.dtype}{list(tensor.shape)}, "
            f"the channel carries {view.dtype}{list(view.shape)}"
        )
    np.copyto(view, tensor)
