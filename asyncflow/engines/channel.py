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

import hashlib
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
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


def fingerprint(tensors: Mapping[str, tuple[str, Array]]) -> str:
    """A 128-bit hash of `name -> (dtype, bits)`, whatever the order of the names.

    Every tensor is hashed by itself, then the hashes are, so that they may be computed apart.
    """
    whole = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        dtype, bits = tensors[name]
        whole.update(_digest(name, dtype, bits))
    return whole.hexdigest()


def _digest(name: str, dtype: str, bits: Array) -> bytes:
    one = hashlib.blake2b(repr((name, dtype, bits.shape)).encode(), digest_size=16)
    one.update(np.ascontiguousarray(bits).reshape(-1).view(np.uint8).data)
    return one.digest()


class MemoryChannel:
    """Carries weights from the one process that writes to those that read.

    The writer calls `create`, starts its readers with `pass_fds=[channel.fd]` and hands them
    `channel.manifest.encode()`; a reader calls `attach`. Not safe for two writers.
    """

    def __init__(self, fd: int, manifest: Manifest, *, access: int) -> None:
        self.manifest = manifest
        self._fd = fd
        self._names = {spec.name for spec in manifest.tensors}
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
        """Copy a version into the slot that was written longer ago; bfloat16 comes as uint16 bits.

        Takes a memory copy and a hash of everything: run it off the event loop. Raises
        `WeightSyncError` when names, dtypes or shapes are not the manifest's.
        """
        if tensors.keys() != self._names:
            odd = ", ".join(sorted(tensors.keys() ^ self._names)[:4])
            raise WeightSyncError(f"weights written under other names than the channel's, for example {odd}")
        slot, self._next_slot = self._next_slot, (self._next_slot + 1) % NUM_SLOTS
        steps, views = self._steps(), self._views(slot)
        steps[slot] = EMPTY
        for name, view in views.items():
            tensor = tensors[name]
            if tensor.dtype != view.dtype or tensor.shape != view.shape:
                raise WeightSyncError(
                    f"weight {name} came as {tensor.dtype}{list(tensor.shape)}, "
                    f"the channel carries {view.dtype}{list(view.shape)}"
                )
            np.copyto(view, tensor)
        steps[slot] = version_step
        version = PolicyVersion(step=version_step, lineage=lineage, fingerprint=self._fingerprint(views))
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
        memory, start = self._open_memory(), HEADER_BYTES + slot * self.manifest.slot_bytes
        return {
            spec.name: memory[start + spec.offset : start + spec.offset + spec.num_bytes]
            .view(CARRIERS[spec.dtype])
            .reshape(spec.shape)
            for spec in self.manifest.tensors
        }

    def _fingerprint(self, views: Mapping[str, Array]) -> str:
        return fingerprint({spec.name: (spec.dtype, views[spec.name]) for spec in self.manifest.tensors})

    def _open_memory(self) -> NDArray[np.uint8]:
        if self._memory is None:
            raise WeightSyncError("the weight channel is closed")
        return self._memory
