"""The durable log's files: their format, reading them back, and dropping payloads that nobody needs.

A folder holds segments, `00000001.log`, `00000002.log` and so on, without a gap. Numbers are
little-endian::

    segment   magic 8s, version u32, number u32, first LSN u64, crc32 u32; then records to the end
    record    magic 4s, crc32 u32, LSN u64, durable LSN u64, flags u32, meta bytes u32, payload bytes u64;
              then the meta, then the payload

A record's checksum covers the segment's number and the record's offset, the header after the
checksum, the meta and the payload: what looks like a record inside a payload, or was copied
from elsewhere, is none. The durable LSN is the last record that was on the disk when this one
was written.

**What a crash may leave, and what it may not.** Records written since the last flush to the
disk may be missing, cut or zero, in any combination (a power cut keeps pages in any order);
none of them was acknowledged. So a segment ends where its first bad record is, unless a sound
record further on says that the bad one was on the disk before: that is damage. A segment
starts only when everything before it is on the disk, and appears whole, by renaming a draft;
so a bad segment header, a gap in the numbers and a gap in the LSNs are always damage.

A compacted segment has every record at its old place and a hole in the file where a payload
was dropped, so a `Place` stays true.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from asyncflow.core.errors import LogDamagedError, RunFolderError
from asyncflow.core.world import sync_folder

MAX_META_BYTES = 16 << 20
MAX_PAYLOAD_BYTES = 1 << 30
LOCK_FILE = "lock"
SEGMENT_NAME = re.compile(r"\d{8}\.log")
DRAFT = ".draft"

SEGMENT_MAGIC = b"asyncflo"
SEGMENT_VERSION = 1
RECORD_MAGIC = b"\xa5AFr"
IS_COMPACTED = 1

_SEGMENT = struct.Struct("<8sIIQ")
_CRC = struct.Struct("<I")
_RECORD = struct.Struct("<4sI")
_FIELDS = struct.Struct("<QQIIQ")
_PLACE = struct.Struct("<QQ")
SEGMENT_HEADER_BYTES = _SEGMENT.size + _CRC.size
RECORD_HEADER_BYTES = _RECORD.size + _FIELDS.size
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a payload of `length` bytes lies: at byte `offset` of `segment`, whose record begins at byte `record`."""

    segment: Path
    record: int
    offset: int
    length: int
    is_compacted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedRecord:
    """A record as it was appended; its payload is read by `read_payload(place)`."""

    lsn: int
    meta: bytes
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordHeader:
    """A record's fields. `payload_bytes` is the original length, also of a compacted payload."""

    lsn: int
    durable_lsn: int
    flags: int
    meta_bytes: int
    payload_bytes: int

    @property
    def is_compacted(self) -> bool:
        """Whether the payload was dropped."""
        return self.flags == IS_COMPACTED

    @property
    def num_bytes(self) -> int:
        """Bytes from the beginning of this record to the next, holes included."""
        return RECORD_HEADER_BYTES + self.meta_bytes + self.payload_bytes

    def start_checksum(self, number: int, offset: int) -> tuple[bytes, int]:
        """The packed fields, and the checksum of place and fields, to be continued over meta and payload."""
        fields = _FIELDS.pack(self.lsn, self.durable_lsn, self.flags, self.meta_bytes, self.payload_bytes)
        return fields, zlib.crc32(fields, zlib.crc32(_PLACE.pack(number, offset)))


def pack_segment(number: int, first_lsn: int) -> bytes:
    """The header of a segment."""
    header = _SEGMENT.pack(SEGMENT_MAGIC, SEGMENT_VERSION, number, first_lsn)
    return header + _CRC.pack(zlib.crc32(header))


def pack_record(fields: bytes, checksum: int) -> bytes:
    """The header of a record: what `RecordHeader.start_checksum` gave, the checksum finished."""
    return _RECORD.pack(RECORD_MAGIC, checksum) + fields


def segment_path(folder: Path, number: int) -> Path:
    """The file of a segment."""
    return folder / f"{number:08}.log"


def list_segments(folder: Path) -> list[Path]:
    """The segments in order; drafts are ignored.

    Raises `RunFolderError` for files that are not the log's, `LogDamagedError` when a segment is missing.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    segments = [name for name in names if SEGMENT_NAME.fullmatch(name)]
    foreign = [name for name in names if name not in segments and name != LOCK_FILE and not name.endswith(DRAFT)]
    if foreign:
        raise RunFolderError(f"{folder} holds files that are not the log's: {', '.join(foreign)}; move them away")
    for number, name in enumerate(segments, 1):
        if int(name[:8]) != number:
            raise _damage(segment_path(folder, number), 0, f"the file is missing, though there is {name}")
    return [folder / name for name in segments]


def read_log(folder: Path) -> Iterator[LoggedRecord]:
    """Every record in order, its checksum verified; payloads are not kept in memory.

    Raises `LogDamagedError` where a record that was on the disk is gone or changed.
    """
    expected = 1
    end = (segment_path(folder, 1), 0)  # of the sound records so far
    for number, path in enumerate(list_segments(folder), 1):
        first = read_first_lsn(path, number)
        if first != expected:
            raise _damage(*end, f"record {expected} should follow, but the next segment begins with record {first}")
        end = (path, SEGMENT_HEADER_BYTES)
        for record in read_segment(path, number):
            expected = record.lsn + 1
            end = (path, record.place.offset + record.place.length)
            yield record


def read_first_lsn(path: Path, number: int) -> int:
    """The number of the segment's first record, which may not exist yet. Raises `LogDamagedError`."""
    with path.open("rb") as file:
        header = file.read(SEGMENT_HEADER_BYTES)
    first = int(_SEGMENT.unpack(header[: _SEGMENT.size])[3]) if len(header) == SEGMENT_HEADER_BYTES else 0
    if header != pack_segment(number, first):
        raise _damage(path, 0, f"the header of segment {number} is damaged, or another version of asyncflow wrote it")
    return first


def read_segment(path: Path, number: int) -> Iterator[LoggedRecord]:
    """The records of one segment up to where a crash cut it. Raises `LogDamagedError`."""
    expected = read_first_lsn(path, number)
    offset = SEGMENT_HEADER_BYTES
    with path.open("rb") as file:
        while True:
            if (found := _read_record(file, path, number, offset)) is None:
                proof = _find_proof(file, path, number, offset, expected)
                if proof is None:
                    return
                # A writer may have been at this record when we read it, and have gone on since.
                if (found := _read_record(file, path, number, offset)) is None:
                    raise _damage(
                        path, offset, f"record {expected} is damaged; it was on the disk, as record {proof} shows"
                    )
            header, record = found
            if record.lsn != expected:
                raise _damage(path, offset, f"record {expected} was expected, but there is record {record.lsn}")
            yield record
            offset += header.num_bytes
            expected += 1


def read_metas(path: Path) -> Iterator[LoggedRecord]:
    """The records of a closed segment without a look at payloads, so without checksums: quick, and no proof."""
    expected, offset = read_first_lsn(path, int(path.name[:8])), SEGMENT_HEADER_BYTES
    with path.open("rb") as file:
        while (parsed := _read_header(file, offset)) is not None and parsed[0].lsn == expected:
            header, start = parsed[0], offset + RECORD_HEADER_BYTES + parsed[0].meta_bytes
            meta, length = file.read(header.meta_bytes), header.payload_bytes
            place = Place(segment=path, record=offset, offset=start, length=length, is_compacted=header.is_compacted)
            yield LoggedRecord(lsn=header.lsn, meta=meta, place=place)
            expected, offset = expected + 1, offset + header.num_bytes


def _read_header(file: BinaryIO, offset: int) -> tuple[RecordHeader, int] | None:
    """The header at this offset and its checksum, if all of the record can lie in the file."""
    file.seek(offset)
    header = file.read(RECORD_HEADER_BYTES)
    if len(header) < RECORD_HEADER_BYTES or not header.startswith(RECORD_MAGIC):
        return None
    lsn, durable_lsn, flags, meta_bytes, payload_bytes = _FIELDS.unpack(header[_RECORD.size :])
    found = RecordHeader(
        lsn=lsn, durable_lsn=durable_lsn, flags=flags, meta_bytes=meta_bytes, payload_bytes=payload_bytes
    )
    is_possible = flags in {0, IS_COMPACTED} and meta_bytes <= MAX_META_BYTES and payload_bytes <= MAX_PAYLOAD_BYTES
    if not is_possible or offset + found.num_bytes > os.fstat(file.fileno()).st_size:
        return None
    return found, _RECORD.unpack(header[: _RECORD.size])[1]


def _read_record(file: BinaryIO, path: Path, number: int, offset: int) -> tuple[RecordHeader, LoggedRecord] | None:
    """The sound record at this offset, if there is one."""
    if (parsed := _read_header(file, offset)) is None:
        return None
    header, checksum = parsed
    meta = file.read(header.meta_bytes)
    computed = zlib.crc32(meta, header.start_checksum(number, offset)[1])
    place = Place(
        segment=path,
        record=offset,
        offset=offset + RECORD_HEADER_BYTES + header.meta_bytes,
        length=header.payload_bytes,
        is_compacted=header.is_compacted,
    )
    if not header.is_compacted:
        for chunk in _chunks(file, header.payload_bytes):
            computed = zlib.crc32(chunk, computed)
    return (header, LoggedRecord(lsn=header.lsn, meta=meta, place=place)) if computed == checksum else None


def _chunks(file: BinaryIO, num_bytes: int) -> Iterator[memoryview]:
    """The next bytes of a file in pieces that share memory; fewer where the file ends."""
    buffer = memoryview(bytearray(min(num_bytes, _CHUNK_BYTES)))
    while num_bytes > 0 and (count := file.readinto(buffer[:num_bytes])):  # type: ignore[attr-defined]
        yield buffer[:count]
        num_bytes -= count


def _find_proof(file: BinaryIO, path: Path, number: int, offset: int, expected: int) -> int | None:
    """A sound record after this offset that was written when record `expected` was on the disk."""
    file.seek(offset)
    rest = file.read()
    at = rest.find(RECORD_MAGIC)
    while at >= 0:
        parsed = _read_header(file, offset + at)
        if parsed is not None and parsed[0].durable_lsn >= expected and _read_record(file, path, number, offset + at):
            return parsed[0].lsn
        at = rest.find(RECORD_MAGIC, at + 1)
    return None


def read_payload(place: Place) -> NDArray[np.uint8]:
    """The payload, checked against its record. Raises `RunFolderError` when it was compacted away."""
    with place.segment.open("rb") as file:
        parsed = _read_header(file, place.record)
        if parsed is not None and parsed[0].is_compacted:
            raise RunFolderError(
                f"the payload of record {parsed[0].lsn} in {place.segment} ({place.length} bytes) was compacted: "
                "no checkpoint that is kept needs it; go back to a later step"
            )
        payload = np.empty(place.length, dtype=np.uint8)
        if parsed is not None and place.offset + place.length == place.record + parsed[0].num_bytes:
            header, checksum = parsed
            computed = header.start_checksum(int(place.segment.name[:8]), place.record)[1]
            computed = zlib.crc32(file.read(header.meta_bytes), computed)
            file.readinto(payload.data)
            if zlib.crc32(payload.data, computed) == checksum:
                return payload
    raise _damage(place.segment, place.record, "the record is not what it was when the log was read")


def compact(folder: Path, is_needed: Callable[[LoggedRecord], bool]) -> int:
    """Drop the payloads that are not needed from all segments but the last; bytes of the disk that this freed.

    Every meta stays, and every other payload, each at its place. A segment is replaced whole, so
    this may be killed at any time; a `FileLog` may write meanwhile. One compaction at a time.
    """
    return sum(compact_segment(path, is_needed) for path in list_segments(folder)[:-1])


def compact_segment(path: Path, is_needed: Callable[[LoggedRecord], bool]) -> int:
    """The same for one closed segment."""
    number = int(path.name[:8])
    records = list(read_segment(path, number))
    kept = {record.lsn for record in records if not record.place.is_compacted and _keeps(record, is_needed)}
    if all(record.lsn in kept or record.place.is_compacted for record in records):
        return 0
    draft = path.with_name(path.name + DRAFT)
    try:
        with path.open("rb") as source, draft.open("wb") as target:
            target.write(source.read(SEGMENT_HEADER_BYTES))
            for record in records:
                _copy_record(source, target, number, record, keeps_payload=record.lsn in kept)
            target.truncate(records[-1].place.offset + records[-1].place.length)
            target.flush()
            os.fsync(target.fileno())
            old, new = os.fstat(source.fileno()), os.fstat(target.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)
    return max(0, old.st_blocks - new.st_blocks) * 512


def _keeps(record: LoggedRecord, is_needed: Callable[[LoggedRecord], bool]) -> bool:
    return record.place.length == 0 or is_needed(record)


def _copy_record(source: BinaryIO, target: BinaryIO, number: int, record: LoggedRecord, *, keeps_payload: bool) -> None:
    """The record at its old offset, its payload copied or left out as a hole."""
    place = record.place
    source.seek(place.record)
    target.seek(place.record)
    if keeps_payload:
        target.writelines(_chunks(source, place.offset + place.length - place.record))
        return
    lsn, durable_lsn, _, meta_bytes, payload_bytes = _FIELDS.unpack(source.read(RECORD_HEADER_BYTES)[_RECORD.size :])
    header = RecordHeader(
        lsn=lsn, durable_lsn=durable_lsn, flags=IS_COMPACTED, meta_bytes=meta_bytes, payload_bytes=payload_bytes
    )
    fields, checksum = header.start_checksum(number, place.record)
    target.write(pack_record(fields, zlib.crc32(record.meta, checksum)) + record.meta)


def _damage(path: Path, offset: int, what: str) -> LogDamagedError:
    return LogDamagedError(
        f"{path} is damaged at byte {offset}: {what}. Restore the file from a copy, or start a new run "
        "from the last checkpoint; what was trained before this place is in the records before it"
    )
