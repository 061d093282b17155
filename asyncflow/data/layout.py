"""The layout of a block: the columns of one put, in memory, on the wire and in the log alike.

::

    column "response", ragged          column "reward", one value a row
    ┌──────────────┬───────────────┐   ┌───────────────┐
    │ lengths [S]  │ values [T]    │   │ values [S]    │          each part begins at a multiple
    │ int32        │ any dtype     │   │               │          of 64 bytes from the block's start
    └──────────────┴───────────────┘   └───────────────┘

A block has no pickle and no objects: `ColumnSpec` says where each column lies and what it
is, and readers get views. Strings are their UTF-8 bytes, None is a row of length -1, bfloat16 travels
as its 16 bits. A column that is the same for all rows of a group is stored once for the group.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from math import prod
from typing import Protocol, TypeAlias, TypeGuard

import msgspec
import numpy as np
from numpy.typing import NDArray

from asyncflow.core.errors import ColumnError
from asyncflow.core.types import IntArray, Ragged

Array: TypeAlias = NDArray[np.generic]

ALIGNMENT_BYTES = 64
NONE = -1
"""Length of a row that is None."""
STRING = "str"
BFLOAT16 = "bfloat16"
MAX_DIMENSIONS = 8
MAX_ROWS = 1 << 24
"""Of one block."""

CARRIERS: Mapping[str, np.dtype[np.generic]] = {
    **{
        name: np.dtype(name)
        for name in (
            *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
            *("float16", "float32", "float64", "complex64", "complex128"),
        )
    },
    BFLOAT16: np.dtype(np.uint16),
    STRING: np.dtype(np.uint8),
}
"""The numpy dtype that carries the bits of each dtype a column may have."""

_NAMES = {dtype: name for name, dtype in CARRIERS.items() if name == dtype.name}


class Kind(StrEnum):
    """How the rows of a column lie."""

    DENSE = "d"
    """Every row has the shape `shape`; there are no lengths."""
    RAGGED = "r"
    """A row is `[n, *shape]`, and n differs."""


class ColumnSpec(msgspec.Struct, frozen=True, array_like=True):
    """One column of a block. Offsets count bytes from the block's start.

    `is_shared`: it holds one row for each group, which all rows of the group have.
    """

    name: str
    dtype: str
    kind: Kind
    shape: tuple[int, ...]
    is_shared: bool
    num_rows: int
    num_values: int
    lengths_at: int
    values_at: int


class _Tensor(Protocol):
    """What a torch tensor can do, as far as needed here; torch itself is not imported."""

    dtype: object

    def detach(self) -> _Tensor: ...
    def cpu(self) -> _Tensor: ...
    def contiguous(self) -> _Tensor: ...
    def view(self, dtype: object) -> _Tensor: ...
    def numpy(self) -> Array: ...


Rows: TypeAlias = Sequence[Array | str | bool | int | float | _Tensor | None]
ColumnLike: TypeAlias = Ragged | Array | Rows | _Tensor
"""A column to put: one array `[S, ...]`, a `Ragged`, or one array, tensor, string, number or None for each row."""


class Draft:
    """A column that has its place in a block and is not written yet."""

    __slots__ = ("lengths", "parts", "spec")

    def __init__(self, spec: ColumnSpec, lengths: IntArray | None, parts: Sequence[Array]) -> None:
        self.spec = spec
        self.lengths = lengths
        self.parts = parts


def lay_out(
    columns: Mapping[str, ColumnLike], *, group_size: int = 1, shared: Sequence[str] = ()
) -> tuple[list[Draft], int, int]:
    """Give every column its place: drafts, bytes of the block, number of rows.

    Columns named in `shared` have one row for each group of `group_size` rows. Raises
    `ColumnError` when a column can't be stored, or the columns differ in their number of rows.

    >>> drafts, num_bytes, num_rows = lay_out({"ids": [np.arange(3), np.arange(2)], "reward": np.zeros(2, np.float32)})
    >>> num_rows, num_bytes, drafts[0].spec.kind, drafts[1].spec.values_at
    (2, 192, <Kind.RAGGED: 'r'>, 128)
    """
    drafts: list[Draft] = []
    end = num_rows = 0
    for name, column in columns.items():
        is_shared = name in shared
        draft = _draft(name, column, is_shared, end)
        spec = draft.spec
        rows = spec.num_rows * group_size if is_shared else spec.num_rows
        if drafts and rows != num_rows:
            raise ColumnError(f"column {name} has {rows} rows, the columns before it have {num_rows}")
        num_rows = rows
        end = _aligned(spec.values_at + values_bytes(spec))
        drafts.append(draft)
    if num_rows == 0:
        raise ColumnError("there is nothing to put: no columns, or no rows")
    if num_rows % group_size:
        raise ColumnError(f"{num_rows} rows are no whole number of groups of {group_size}")
    return drafts, end, num_rows


def fill(drafts: Sequence[Draft], block: NDArray[np.uint8]) -> tuple[ColumnSpec, ...]:
    """Write the columns into the memory of their block; what they are."""
    for draft in drafts:
        spec = draft.spec
        if draft.lengths is not None:
            _view(block, spec.lengths_at, draft.lengths.nbytes, draft.lengths.dtype)[:] = draft.lengths
        if spec.num_values:
            values = _values(spec, block)
            try:
                np.concatenate(draft.parts, out=values, casting="no")
            except (TypeError, ValueError) as error:
                odd = sorted({f"{part.dtype}{list(part.shape[1:])}" for part in draft.parts})
                raise ColumnError(
                    f"rows of column {spec.name} differ in dtype or inner shape: {', '.join(odd[:4])}"
                ) from error
    return tuple(draft.spec for draft in drafts)


def read(spec: ColumnSpec, block: NDArray[np.uint8]) -> Ragged:
    """A column of a block, as views. Raises `ColumnError` when the block does not hold it."""
    values = _values(spec, block)
    if spec.kind == Kind.DENSE:
        return Ragged(values=values, lengths=_ones(spec.num_rows), dtype=_special(spec.dtype), is_dense=True)
    lengths = _view(block, spec.lengths_at, 4 * spec.num_rows, np.dtype(np.int32)).view(np.int32)
    total = int(lengths.sum())  # the usual case; rows that are None count -1
    if total != spec.num_values and int(np.maximum(lengths, 0).sum()) != spec.num_values:
        raise ColumnError(f"column {spec.name} is damaged: its lengths do not add up to {spec.num_values}")
    return Ragged(values=values, lengths=lengths, dtype=_special(spec.dtype))


def check(spec: ColumnSpec, block_bytes: int) -> None:
    """Raise `ColumnError` unless the column is one that can lie in a block of so many bytes."""
    is_sane = (
        spec.dtype in CARRIERS
        and len(spec.shape) <= MAX_DIMENSIONS
        and spec.num_rows <= MAX_ROWS
        and all(size >= 0 for size in spec.shape)
        and min(spec.num_rows, spec.num_values, spec.lengths_at, spec.values_at) >= 0
        and spec.values_at % ALIGNMENT_BYTES == spec.lengths_at % ALIGNMENT_BYTES == 0
        and spec.values_at + values_bytes(spec) <= block_bytes
        and (spec.kind == Kind.DENSE or spec.lengths_at + 4 * spec.num_rows <= block_bytes)
        and (spec.kind == Kind.RAGGED or spec.num_values == spec.num_rows)
    )
    if not is_sane:
        raise ColumnError(f"damaged description of column {spec.name!r}: of unknown dtype, or outside its block")


def row_type(spec: ColumnSpec) -> tuple[str, tuple[int, ...]]:
    """What rows of a column must have in common to be read together: dtype, and shape but for the length."""
    return spec.dtype, spec.shape[1:] if spec.kind == Kind.DENSE else spec.shape


def select(column: Ragged, places: slice | NDArray[np.integer]) -> Ragged:
    """Some rows of a column, in the order of `places`; a slice gives views.

    >>> column = Ragged(values=np.array([1, 2, 3, 4]), lengths=np.array([2, 0, 2], np.int32))
    >>> select(column, np.array([2, 0])).values.tolist()
    [3, 4, 1, 2]
    """
    if isinstance(places, slice) and places == slice(0, len(column.lengths)):
        return column
    lengths = column.lengths[places]
    if column.is_dense:
        return Ragged(values=column.values[places], lengths=lengths, dtype=column.dtype, is_dense=True)
    ends = np.cumsum(np.maximum(column.lengths, 0))
    if isinstance(places, slice):
        start = int(ends[places.start - 1]) if places.start else 0
        stop = int(ends[places.stop - 1]) if places.stop else 0
        return Ragged(values=column.values[start:stop], lengths=lengths, dtype=column.dtype)
    counts = np.maximum(lengths, 0)
    begins = ends[places] - counts
    shift = np.repeat(begins - (np.cumsum(counts) - counts), counts)
    return Ragged(values=column.values[shift + np.arange(len(shift))], lengths=lengths, dtype=column.dtype)


def join(parts: Sequence[Ragged]) -> Ragged:
    """Columns behind each other; a single one stays what it is. Raises `ColumnError` when their dtypes differ.

    Where some are dense and others not, all become ragged. A column without values, whose rows
    are all None or empty, goes with any.
    """
    if len(parts) == 1:
        return parts[0]
    filled = parts
    if len(set(map(_kind, parts))) > 1:
        parts = [_to_ragged(part) for part in parts]
        filled = [part for part in parts if len(part.values)] or parts[:1]
        if len(kinds := set(map(_kind, filled))) > 1:
            raise ColumnError(f"rows of one column were put with different types: {sorted(map(str, kinds))}")
    return Ragged(
        values=np.concatenate([part.values for part in filled]),
        lengths=np.concatenate([part.lengths for part in parts]),
        dtype=filled[0].dtype,
        is_dense=filled[0].is_dense,
    )


def _kind(column: Ragged) -> tuple[object, ...]:
    return column.values.dtype, column.dtype, column.is_dense, column.values.shape[1:]


def _to_ragged(column: Ragged) -> Ragged:
    """A dense column as one of rows that have the same length; a number is a row of one."""
    if not column.is_dense:
        return column
    num_rows, *shape = column.values.shape
    size = shape[0] if shape else 1
    values = column.values.reshape(num_rows * size, *shape[1:])
    return Ragged(values=values, lengths=np.full(num_rows, size, np.int32), dtype=column.dtype)


def values_bytes(spec: ColumnSpec) -> int:
    """Bytes of a column's values."""
    return spec.num_values * prod(spec.shape) * CARRIERS[spec.dtype].itemsize


def _draft(name: str, column: ColumnLike, is_shared: bool, start: int) -> Draft:
    try:
        dtype, lengths, parts = _parts(column)
    except (ValueError, TypeError) as error:
        raise ColumnError(f"column {name} can't be stored: {error}") from error
    shape = parts[0].shape[1:] if parts else ()
    num_rows = len(parts[0]) if lengths is None else len(lengths)
    num_values = num_rows if lengths is None else sum(map(len, parts))
    spec = ColumnSpec(
        name=name,
        dtype=dtype,
        kind=Kind.DENSE if lengths is None else Kind.RAGGED,
        shape=shape,
        is_shared=is_shared,
        num_rows=num_rows,
        num_values=num_values,
        lengths_at=start,
        values_at=start if lengths is None else _aligned(start + 4 * num_rows),
    )
    return Draft(spec, lengths, parts)


def _parts(column: ColumnLike) -> tuple[str, IntArray | None, Sequence[Array]]:
    """A column's dtype, the lengths of its rows (None: dense), and arrays which joined are its values."""
    if isinstance(column, Ragged):
        dtype, array = _array(column.values)
        if column.is_dense:
            return column.dtype or dtype, None, [array]
        if int(np.maximum(column.lengths, 0).sum()) != len(array):
            raise ValueError(f"its lengths add up to {np.maximum(column.lengths, 0).sum()}, it has {len(array)} values")
        return column.dtype or dtype, column.lengths.astype(np.int32, copy=False), [array]
    if isinstance(column, np.ndarray) or _is_tensor(column):
        dtype, array = _array(column)
        if array.ndim == 0:
            raise ValueError("a column is an array of rows, this is a single value")
        return dtype, None, [array]
    if isinstance(column, str) or not isinstance(column, Sequence):
        raise TypeError(f"a column is a sequence of rows, this is a {type(column).__name__}")
    if _are_plain(column):
        return _NAMES[column[0].dtype], np.array(list(map(len, column)), np.int32), column
    if any(isinstance(row, str) for row in column):
        return _string_parts(column)
    return _row_parts(column)


def _are_plain(rows: Rows) -> TypeGuard[Sequence[Array]]:
    """Whether the rows are arrays, the usual case; `fill` finds those of another dtype or inner shape."""
    first = rows[0] if len(rows) else None
    return type(first) is np.ndarray and first.ndim > 0 and first.dtype in _NAMES and {*map(type, rows)} == {np.ndarray}


def _is_tensor(value: object) -> TypeGuard[_Tensor]:
    return hasattr(value, "detach") and hasattr(value, "numpy")


def _string_parts(rows: Rows) -> tuple[str, IntArray, Sequence[Array]]:
    odd = next((row for row in rows if row is not None and not isinstance(row, str)), None)
    if odd is not None:
        raise TypeError(f"some rows are strings, one is {type(odd).__name__}")
    coded = [None if row is None else str(row).encode() for row in rows]
    lengths = np.array([NONE if row is None else len(row) for row in coded], np.int32)
    return STRING, lengths, [np.frombuffer(b"".join(row for row in coded if row), np.uint8)]


def _row_parts(rows: Rows) -> tuple[str, IntArray | None, Sequence[Array]]:
    if len(rows) == 0:
        raise ValueError("it has no rows")
    named = [_array(row) for row in rows if row is not None]
    if not named:
        return "float32", np.full(len(rows), NONE, np.int32), [np.empty(0, np.float32)]
    kinds = {(dtype, array.shape[1:], array.ndim == 0) for dtype, array in named}
    if len(kinds) > 1:
        described = ", ".join(sorted({f"{dtype}{list(array.shape)}" for dtype, array in named})[:4])
        raise ValueError(f"its rows differ in dtype or inner shape: {described}")
    dtype, _, is_scalar = next(iter(kinds))
    arrays = [array for _, array in named]
    if is_scalar and len(named) == len(rows):
        return dtype, None, [np.stack(arrays)]
    if is_scalar:
        arrays = [array.reshape(1) for array in arrays]
    if len(arrays) == len(rows):
        return dtype, np.array(list(map(len, arrays)), np.int32), arrays
    return dtype, np.array([NONE if row is None else np.size(_array(row)[1]) for row in rows], np.int32), arrays


def _array(value: object) -> tuple[str, Array]:
    """The bits of an array or tensor, and the name of its dtype. Raises `ValueError` for what has no plain bits."""
    if isinstance(value, np.ndarray):
        array = value
    elif _is_tensor(value):
        array = _from_tensor(value)
        if str(value.dtype) == "torch.bfloat16":
            return BFLOAT16, array
    else:
        array = np.asarray(value)
    name = array.dtype.name
    if name == BFLOAT16:  # numpy knows it where ml_dtypes is imported
        return BFLOAT16, array.view(np.uint16)
    if name not in CARRIERS:
        raise ValueError(f"dtype {array.dtype} can't be stored; known are {', '.join(CARRIERS)}")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return name, array


def _from_tensor(tensor: _Tensor) -> Array:
    plain = tensor.detach().cpu().contiguous()
    if str(plain.dtype) == "torch.bfloat16":
        return plain.view(sys.modules["torch"].uint16).numpy()
    return plain.numpy()


def _special(dtype: str) -> str:
    return dtype if dtype in (STRING, BFLOAT16) else ""


def _values(spec: ColumnSpec, block: NDArray[np.uint8]) -> Array:
    flat = _view(block, spec.values_at, values_bytes(spec), CARRIERS[spec.dtype])
    return flat.reshape(spec.num_values, *spec.shape) if spec.shape else flat


def _view(block: NDArray[np.uint8], start: int, num_bytes: int, dtype: np.dtype[np.generic]) -> Array:
    if start + num_bytes > len(block):
        raise ColumnError(f"a column ends at byte {start + num_bytes} of a block of {len(block)} bytes")
    return block[start : start + num_bytes].view(dtype)


_ONES = np.ones(4096, np.int32)
_ONES.flags.writeable = False


def _ones(count: int) -> IntArray:
    return _ONES[:count] if count <= len(_ONES) else np.ones(count, np.int32)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
