"""The end of the durable log: taken over from the last process, written, flushed, continued in new segments."""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from asyncflow.core.errors import RunFolderError
from asyncflow.core.world import sync_folder
from asyncflow.data.log_reader import (
    DRAFT,
    LOCK_FILE,
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    RecordHeader,
    list_segments,
    pack_record,
    pack_segment,
    read_first_lsn,
    read_segment,
    segment_path,
)

BUFFERS_A_WRITE = 1024  # IOV_MAX of Linux
PAGE_BYTES = 4096
CACHE_BYTES = 1 << 20
"""Flushed bytes that may stay in the page cache: dropping it is a system call too."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A record that waits to be written."""

    lsn: int
    meta: bytes
    payload: list[memoryview]
    payload_bytes: int


@dataclass(slots=True, kw_only=True)
class SegmentWriter:
    """The end of the log's files; used by one thread at a time. Every method may raise `OSError`."""

    folder: Path
    segment_bytes: int
    number: int
    first_lsn: int
    descriptor: int = -1
    offset: int = 0
    written_lsn: int = 0
    durable_lsn: int = 0
    _cached_from: int = 0
    _batch: list[bytes | memoryview] = field(default_factory=list)
    _batch_lsn: int = 0

    def start(self) -> None:
        """Create the segment whole; the folder and the file are on the disk when this returns."""
        path = segment_path(self.folder, self.number)
        draft = path.with_name(path.name + DRAFT)
        draft.unlink(missing_ok=True)
        header = pack_segment(self.number, self.first_lsn)
        self.descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            self._write_all([header])
            os.fsync(self.descriptor)
            draft.replace(path)
            sync_folder(self.folder)
        except OSError:
            self.close()
            raise
        self.offset, self._cached_from = len(header), 0
        self.written_lsn = self.durable_lsn = self._batch_lsn = self.first_lsn - 1

    def write(self, records: Sequence[Pending]) -> None:
        """Append records, into new segments where they don't fit."""
        for record in records:
            num_bytes = RECORD_HEADER_BYTES + len(record.meta) + record.payload_bytes
            if self.offset > SEGMENT_HEADER_BYTES and self.offset + num_bytes > self.segment_bytes:
                self._write_batch()
                self.sync()
                self.close()
                self.number, self.first_lsn = self.number + 1, record.lsn
                self.start()
            header = RecordHeader(
                lsn=record.lsn,
                durable_lsn=self.durable_lsn,
                flags=0,
                meta_bytes=len(record.meta),
                payload_bytes=record.payload_bytes,
            )
            fields, checksum = header.start_checksum(self.number, self.offset)
            checksum = zlib.crc32(record.meta, checksum)
            for part in record.payload:
                checksum = zlib.crc32(part, checksum)
            self._batch += (pack_record(fields, checksum), record.meta, *record.payload)
            self.offset += num_bytes
            self._batch_lsn = record.lsn
        self._write_batch()

    def sync(self) -> None:
        """Flush what was written to the disk, and give the page cache back."""
        os.fdatasync(self.descriptor)
        self.durable_lsn = self.written_lsn
        if self.offset - self._cached_from >= CACHE_BYTES:
            end = self.offset - self.offset % PAGE_BYTES  # the last page is written again: dropped, it would be read
            os.posix_fadvise(self.descriptor, self._cached_from, end - self._cached_from, os.POSIX_FADV_DONTNEED)
            self._cached_from = end

    def close(self) -> None:
        """Close the file; may be called again."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _write_batch(self) -> None:
        batch, self._batch = self._batch, []
        for start in range(0, len(batch), BUFFERS_A_WRITE):
            self._write_all(batch[start : start + BUFFERS_A_WRITE])
        self.written_lsn = self._batch_lsn

    def _write_all(self, buffers: list[bytes | memoryview]) -> None:
        while buffers:
            written = os.writev(self.descriptor, buffers)
            while buffers and written >= len(buffers[0]):
                written -= len(buffers.pop(0))
            if buffers:
                buffers[0] = memoryview(buffers[0])[written:]


def lock_folder(folder: Path) -> int:
    """Hold the folder against a second writer; the system lets go when this process ends."""
    lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise RunFolderError(f"{folder} is being written by another process; end it, or choose another run") from None
    return lock


def recover(folder: Path) -> tuple[int, int]:
    """Number and first LSN of the next segment, after what is there was cut to sound records and flushed."""
    for draft in folder.glob("*" + DRAFT):
        draft.unlink()
    segments = list_segments(folder)
    if not segments:
        return 1, 1
    path, number = segments[-1], len(segments)
    next_lsn, end = read_first_lsn(path, number), SEGMENT_HEADER_BYTES
    for record in read_segment(path, number):
        next_lsn, end = record.lsn + 1, record.place.offset + record.place.length
    with path.open("r+b") as file:
        file.truncate(end)
        os.fsync(file.fileno())  # the next segment says that all of this is on the disk
    sync_folder(folder)
    return number + 1, next_lsn
