"""The weight channel: what is written arrives, for as long as promised, and is attested."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.core.errors import ConfigError, WeightSyncError
from asyncflow.core.types import PolicyVersion, WeightsRef
from asyncflow.engines.channel import ALIGNMENT_BYTES, CARRIERS, Array, Manifest, MemoryChannel, fingerprint

SHAPES = {"embed": ("float32", (5, 3)), "norm": ("bfloat16", (7,)), "scale": ("float32", ()), "none": ("float16", (0,))}


def weights(fill: int) -> dict[str, Array]:
    return {name: np.full(shape, fill, CARRIERS[dtype]) for name, (dtype, shape) in SHAPES.items()}


@pytest.fixture
def writer() -> Iterator[MemoryChannel]:
    channel = MemoryChannel.create(SHAPES)
    yield channel
    channel.close()


@pytest.fixture
def reader(writer: MemoryChannel) -> Iterator[MemoryChannel]:
    channel = MemoryChannel.attach(os.dup(writer.fd), Manifest.decode(writer.manifest.encode()))
    yield channel
    channel.close()


def test_what_is_written_is_read(writer: MemoryChannel, reader: MemoryChannel) -> None:
    ref = writer.write(weights(3), 12, "line")
    assert (ref.version.step, ref.version.lineage) == (12, "line")
    read = reader.read(ref)
    assert read.keys() == SHAPES.keys()
    for name, expected in weights(3).items():
        assert read[name].dtype == expected.dtype
        np.testing.assert_array_equal(read[name], expected)


def test_the_fingerprint_is_that_of_the_content(writer: MemoryChannel, reader: MemoryChannel) -> None:
    ref = writer.write(weights(3), 1, "")
    held = {name: (SHAPES[name][0], bits) for name, bits in reader.read(ref).items()}
    assert fingerprint(held) == ref.version.fingerprint
    assert writer.write(weights(3), 2, "").version.fingerprint == ref.version.fingerprint
    assert writer.write(weights(4), 3, "").version.fingerprint != ref.version.fingerprint


def test_a_version_stays_readable_until_the_write_after_the_next(writer: MemoryChannel, reader: MemoryChannel) -> None:
    first = writer.write(weights(1), 1, "")
    views = reader.read(first)
    writer.write(weights(2), 2, "")
    assert reader.holds(first)
    assert views["embed"][0, 0] == 1
    writer.write(weights(3), 3, "")
    assert not reader.holds(first)
    with pytest.raises(WeightSyncError, match="holds step 3"):
        reader.read(first)


def test_a_half_written_version_is_not_readable(writer: MemoryChannel, reader: MemoryChannel) -> None:
    wrong = weights(2) | {"norm": np.zeros((8,), np.uint16)}
    with pytest.raises(WeightSyncError, match=r"norm came as uint16\[8\]"):
        writer.write(wrong, 5, "")
    with pytest.raises(WeightSyncError, match="not 5"):
        reader.read(WeightsRef(version=PolicyVersion(step=5), address="memory:0"))


def test_a_reader_can_not_write(writer: MemoryChannel, reader: MemoryChannel) -> None:
    views = reader.read(writer.write(weights(1), 1, ""))
    with pytest.raises(ValueError, match="read-only"):
        views["embed"][0, 0] = 9


def test_missing_and_unknown_tensors_are_named(writer: MemoryChannel) -> None:
    with pytest.raises(WeightSyncError, match="extra"):
        writer.write(weights(1) | {"extra": np.zeros(1, np.float32)}, 1, "")
    with pytest.raises(WeightSyncError, match="norm"):
        writer.write({name: bits for name, bits in weights(1).items() if name != "norm"}, 1, "")


@pytest.mark.parametrize("address", ["memory:2", "memory:", "file:/tmp/x", "memory:-1"])
def test_a_foreign_address_is_refused(reader: MemoryChannel, address: str) -> None:
    with pytest.raises(WeightSyncError, match="not in a memory channel"):
        reader.read(WeightsRef(version=PolicyVersion(step=1), address=address))


def test_closing_twice_is_allowed_and_views_outlive_it(writer: MemoryChannel, reader: MemoryChannel) -> None:
    ref = writer.write(weights(6), 1, "")
    views = reader.read(ref)
    for channel in (writer, reader):
        channel.close()
        channel.close()
    assert views["embed"][4, 2] == 6
    with pytest.raises(WeightSyncError, match="closed"):
        reader.read(ref)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="int8"):
        MemoryChannel.create({"weight": ("int8", (2,))})


@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b"[]",
        b'{"tensors":[{"name":"a","dtype":"float32","shape":[9],"offset":0}],"slot_bytes":8}',
        b'{"tensors":[{"name":"a","dtype":"float32","shape":[1],"offset":-64}],"slot_bytes":64}',
        b'{"tensors":[{"name":"a","dtype":"pickle","shape":[1],"offset":0}],"slot_bytes":64}',
    ],
)
def test_a_damaged_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match="damaged weight manifest"):
        Manifest.decode(data)


def test_a_manifest_of_another_channel_is_refused(writer: MemoryChannel) -> None:
    descriptor = os.dup(writer.fd)
    with pytest.raises(ConfigError, match="manifest says"):
        MemoryChannel.attach(descriptor, Manifest.lay_out({"a": ("float32", (10_000,))}))
    os.close(descriptor)


@given(st.dictionaries(st.text(max_size=5), st.tuples(st.sampled_from(sorted(CARRIERS)), st.lists(st.integers(0, 9)))))
def test_tensors_are_aligned_and_do_not_overlap(drawn: dict[str, tuple[str, list[int]]]) -> None:
    manifest = Manifest.lay_out({name: (dtype, tuple(shape[:3])) for name, (dtype, shape) in drawn.items()})
    end = 0
    for spec in manifest.tensors:
        assert spec.offset % ALIGNMENT_BYTES == 0
        assert spec.offset >= end
        end = spec.offset + spec.num_bytes
    assert end <= manifest.slot_bytes
    assert Manifest.decode(manifest.encode()) == manifest


def test_a_fingerprint_depends_on_names_dtypes_shapes_and_bits() -> None:
    bits = np.arange(6, dtype=np.uint16)
    variants: list[dict[str, tuple[str, Array]]] = [
        {"a": ("bfloat16", bits)},
        {"b": ("bfloat16", bits)},
        {"a": ("float16", bits)},
        {"a": ("bfloat16", bits.reshape(2, 3))},
        {"a": ("bfloat16", bits + np.uint16(1))},
    ]
    assert len({fingerprint(variant) for variant in variants}) == len(variants)
    two: dict[str, tuple[str, Array]] = {"a": ("bfloat16", bits), "b": ("bfloat16", bits)}
    assert fingerprint(two) == fingerprint(dict(reversed(two.items())))


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 80])
def test_a_fingerprint_does_not_depend_on_threads_but_on_every_byte(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 16 bytes, so that few bytes make many; the order of equal-sized blocks counts too."""
    monkeypatch.setattr("asyncflow.engines.channel.BLOCK_BYTES", 16)
    bits = np.arange(length, dtype=np.uint16)
    variants: list[Array] = [bits]
    for place in range(len(bits)):
        changed = bits.copy()
        changed[place] += 1000
        variants.append(changed)
    if length > 8:
        variants.append(np.roll(bits, 8))
    found = [fingerprint({"a": ("bfloat16", one)}) for one in variants]
    assert len(set(found)) == len(variants)
    assert found == [fingerprint({"a": ("bfloat16", one)}, threads=3) for one in variants]
    assert all(len(one) == 32 for one in found)


def test_weights_written_under_other_names_are_refused(writer: MemoryChannel) -> None:
    for tensors, message in [
        ({name: bits for name, bits in weights(1).items() if name != "norm"}, "without some .* example norm"),
        (weights(1) | {"more": np.zeros(1)}, "does not have: more"),
        (weights(1) | {"norm": np.zeros(7, np.float32)}, "norm came as float32"),
    ]:
        with pytest.raises(WeightSyncError, match=message):
            writer.write(tensors, 1, "")
