"""What every form of the transfer queue must do, after the list in the issue: numbers in the names are its numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
import pytest

from asyncflow.core.errors import QueueError, StaleHandleError
from asyncflow.core.types import Ragged, Rows
from asyncflow.data.layout import ColumnLike
from tests.data.arenas import arenas_open
from tests.data.stores import LocalStore, Needs, Store, local_store, process_store, thread_store

Start = Callable[[Needs], AbstractContextManager[Store]]


@pytest.fixture(
    params=[local_store, thread_store, pytest.param(process_store, marks=pytest.mark.slow)],
    ids=["local", "thread", "process"],
)
def start(request: pytest.FixtureRequest) -> Iterator[Start]:
    yield request.param
    assert arenas_open() == []  # nothing is left behind


def named(rows: Rows) -> list[tuple[int, int]]:
    return list(zip(rows.tickets.tolist(), rows.indices.tolist(), strict=True))


def ids(*numbers: int) -> list[np.ndarray]:
    """Rows of 1 to 3 equal numbers."""
    return [np.full(1 + number % 3, number, np.int64) for number in numbers]


def numbers_of(column: Ragged) -> list[int]:
    return [int(row[0]) for row in column.rows()]


def test_1_a_task_is_offered_a_row_exactly_when_all_its_columns_exist(start: Start) -> None:
    """Ids are put in batches of 4, two more columns are written in others, in orders of their own."""
    rng = np.random.default_rng(1)
    with start({"few": ["ids"], "more": ["ids", "reward"], "all": ["ids", "reward", "score"]}) as store:
        handles = [store.put({"ids": ids(*range(first, first + 4))}) for first in range(0, 24, 4)]
        rows = Rows.join(handles)
        got = {"few": store.get("few")}
        assert got["few"] is not None
        assert sorted(numbers_of(got["few"].columns["ids"])) == list(range(24))
        has: dict[str, set[int]] = {"reward": set(), "score": set()}
        given: dict[str, set[int]] = {"more": set(), "all": set()}
        writes = [(name, part) for name in has for part in np.array_split(rng.permutation(24), 7)]
        for place in rng.permutation(len(writes)):
            name, part = writes[place]
            store.write(rows[part], name, part.astype(np.float32))
            has[name] |= {*part.tolist()}
            for task, complete in (("more", has["reward"]), ("all", has["reward"] & has["score"])):
                batch = store.get(task)
                expected = complete - given[task]
                assert (batch is None) == (not expected)
                if batch is not None:
                    found = numbers_of(batch.columns["ids"])
                    assert {*found} == expected
                    assert len(found) == len(expected)
                    assert batch.columns["reward"].values.tolist() == found
                    given[task] |= expected
        assert given == {"more": {*range(24)}, "all": {*range(24)}}


def test_2_tasks_drain_the_same_rows_independently_and_workers_of_one_get_disjoint_ones(start: Start) -> None:
    with start({"one": ["ids"], "other": ["ids"]}) as store:
        store.put({"ids": ids(*range(20))})
        seen: dict[str, list[int]] = {"one": [], "other": []}
        held = []
        for task, size in (("one", 7), ("other", 3), ("one", 7), ("other", 90), ("one", 90)):
            got = store.get(task, max_groups=size)
            assert got is not None
            seen[task] += numbers_of(got.columns["ids"])
            held.append(got)
        assert store.get("one") is store.get("other") is None
        assert seen == {"one": list(range(20)), "other": list(range(20))}
        for got in held[:-1]:
            store.acknowledge(got)
        assert store.counts().pending == 6  # of the last worker of one
        store.acknowledge(held[-1])
        assert store.counts().trained == 20


def test_3_a_handle_selected_reordered_split_and_joined_writes_on_the_right_rows(start: Start) -> None:
    rng = np.random.default_rng(3)
    with start({"read": ["ids"], "learn": ["ids", "twice"]}) as store:
        store.put({"ids": ids(*range(30))}, group_size=3)
        first, second = store.get("read", max_groups=4), store.get("read")
        assert first is not None
        assert second is not None
        rows = Rows.join([second.rows, first.rows])
        values = np.array(numbers_of(second.columns["ids"]) + numbers_of(first.columns["ids"]))
        order = rng.permutation(30)
        rows, values = rows[order], values[order]
        is_odd = values % 2 == 1
        parts = [(rows[is_odd][4:], values[is_odd][4:]), (rows[~is_odd], values[~is_odd])]
        parts.append((rows[is_odd][:4], values[is_odd][:4]))
        for part, ours in parts:
            store.write(part, "twice", [np.full(1 + n % 2, 2 * n, np.int32) for n in ours.tolist()])
        fetched = store.fetch(rows[::-1], ["twice", "ids"])
        assert numbers_of(fetched["ids"]) == values[::-1].tolist()
        assert numbers_of(fetched["twice"]) == (2 * values[::-1]).tolist()
        learnt = store.get("learn")
        assert learnt is not None
        assert numbers_of(learnt.columns["twice"]) == [2 * n for n in numbers_of(learnt.columns["ids"])]
        assert len(learnt.rows) == 30


KINDS: dict[str, Sequence[np.ndarray | str | float | bool | None] | np.ndarray] = {
    "dense": np.arange(12, dtype=np.float64).reshape(4, 3) / 7,
    "dense_bool": np.array([True, False, True, True]),
    "scalars": [1.5, -0.0, float("inf"), 3.0],
    "flags": [True, False, False, True],
    "zero_d": [np.array(n, np.int16) for n in (3, -1, 0, 9)],
    "ragged": [np.arange(n, dtype=np.int64) for n in (3, 0, 1, 7)],
    "all_empty": [np.empty(0, np.float32) for _ in range(4)],
    "ragged_2d": [np.arange(2 * n, dtype=np.uint8).reshape(n, 2) for n in (1, 0, 4, 2)],
    "ragged_bool": [np.arange(n) % 2 == 0 for n in (2, 5, 0, 1)],
    "halves": [np.array([0.1, np.nan, -0.0][:n], np.float16) for n in (3, 1, 2, 0)],
    "complex": np.array([1 + 2j, -1j, 0, 5], np.complex64),
    "strings": ["plain", "", "ünïcode 🙂", "nul\0inside"],
    "some_strings": ["a", None, "", None],
    "some_none": [np.array([1, 2], np.int32), None, np.empty(0, np.int32), np.array([3], np.int32)],
    "some_numbers": [1.0, None, 2.0, None],
    "all_none": [None, None, None, None],
    "strided": np.arange(40, dtype=np.int32).reshape(4, 10)[:, ::3],
    "big_endian": np.arange(4, dtype=">i4"),
}


def check_rows(column: Ragged, expected: Sequence[object] | np.ndarray) -> None:
    """Bit by bit; a number among Nones comes back as one of a row."""
    for found, put in zip(column.to_list(), expected, strict=True):
        if put is None or isinstance(put, str):
            assert found == put
            continue
        array = np.asarray(put)
        assert isinstance(found, np.ndarray)
        assert found.dtype.name == array.dtype.name
        assert found.reshape(array.shape).tobytes() == array.astype(found.dtype).tobytes()
        assert found.shape == (array.shape or found.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_4_rows_come_back_bit_equal(start: Start, kind: str) -> None:
    if kind != "ragged" and start is process_store:
        pytest.skip("a process more shows the same")
    column = KINDS[kind]
    with start({"task": ["x"], "later": ["x", "y"]}) as store:
        rows = store.put({"x": column})
        got = store.get("task")
        assert got is not None
        check_rows(got.columns["x"], column)
        store.write(rows[::-1], "y", column)  # a column added in mid-run, in another order
        late = store.get("later")
        assert late is not None
        check_rows(late.columns["x"], column)
        check_rows(late.columns["y"], list(column)[::-1])


@pytest.mark.slow
def test_4_bfloat16_comes_back_bit_equal(start: Start) -> None:
    torch = pytest.importorskip("torch")
    rows = [torch.tensor([1.5, -0.0, 3e38, float("nan")][:n], dtype=torch.bfloat16) for n in (4, 0, 2)]
    dense = torch.arange(6, dtype=torch.float32).reshape(3, 2).to(torch.bfloat16)
    with start({"task": ["x", "y"]}) as store:
        store.put({"x": rows, "y": dense})
        got = store.get("task")
        assert got is not None
        for found, tensor in zip(got.columns["x"].rows(), rows, strict=True):
            assert found.tobytes() == tensor.view(torch.uint16).numpy().tobytes()
        assert got.columns["x"].dtype == got.columns["y"].dtype == "bfloat16"
        assert got.columns["y"].values.tobytes() == dense.view(torch.uint16).numpy().tobytes()


def test_4_a_column_shared_by_a_group_is_stored_once() -> None:
    with thread_store({"task": ["prompt", "answer"]}) as store:
        prompts, answers = [np.full(50, n) for n in range(3)], ids(*range(12))
        store.producer.put({"prompt": prompts, "answer": answers}, group_size=4, shared=["prompt"])  # type: ignore[attr-defined]
        got = store.get("task")
        assert got is not None
        check_rows(got.columns["prompt"], [prompts[n // 4] for n in range(12)])
        assert numbers_of(got.columns["answer"]) == list(range(12))
        taken = store.producer._memory._writer.arena.num_bytes - store.num_free()  # type: ignore[attr-defined]
        assert 3 * 400 <= taken < 12 * 400


def test_5_groups_finishing_in_random_order_come_whole_and_of_one_prompt(start: Start) -> None:
    """Answers of 8 prompts, 4 each, arrive one by one; those of prompts 2 and 5 never all."""
    rng = np.random.default_rng(5)
    with start({"task": ["prompt", "answer"]}) as store:
        prompts = np.repeat(np.arange(8), 4)
        rows = store.put({"prompt": prompts}, group_size=4)
        missing = {9, 20, 22}
        answered: dict[int, int] = dict.fromkeys(range(8), 0)
        delivered: list[int] = []
        for place in rng.permutation(32).tolist():
            if place in missing:
                continue
            store.write(rows[place : place + 1], "answer", ids(place))
            answered[place // 4] += 1
            got = store.get("task")
            assert (got is not None) == (answered[place // 4] == 4)
            if got is not None:
                assert got.columns["prompt"].values.tolist() == [place // 4] * 4
                assert numbers_of(got.columns["answer"]) == [4 * (place // 4) + n for n in range(4)]
                delivered.append(place // 4)
        assert sorted(delivered) == [0, 1, 3, 4, 6, 7]


def test_6_clear_while_others_read_is_a_clean_error_and_frees_its_space(start: Start) -> None:
    with start({"task": ["x"]}) as store:
        everything = store.put({"x": np.zeros((4, 8))}), store.num_free()
        old = store.put({"x": np.arange(64.0).reshape(8, 8)})
        got = store.get("task", max_groups=3)
        assert got is not None
        before = got.columns["x"].values.tobytes()
        store.clear()
        assert store.counts().dropped == {"cleared": 12}
        with pytest.raises(StaleHandleError):
            store.fetch(old, ["x"])
        with pytest.raises(QueueError):
            store.acknowledge(got)
        if not isinstance(store, LocalStore):  # whose leases are for any number of takes, also none
            with pytest.raises(QueueError):
                store.release(got)
        assert store.get("task") is None
        assert store.num_free() >= everything[1]
        new = store.put({"x": np.full((8, 8), -1.0)})  # in the same space
        with pytest.raises(StaleHandleError):
            store.fetch(old, ["x"])
        assert store.fetch(new, ["x"])["x"].values.max() == -1
        assert np.frombuffer(before).min() >= 0


def test_6_clear_after_a_failed_put_works_and_frees_its_space(start: Start) -> None:
    bad: Mapping[str, ColumnLike] = {"x": np.zeros((4, 8)), "y": [np.zeros(2), np.zeros(2, np.int8), *ids(1, 2)]}
    with start({"task": ["x"]}) as store:
        store.put({"x": np.zeros((4, 8)), "y": ids(1, 2, 3, 4)})
        free = store.num_free()
        with pytest.raises(QueueError):
            store.put(bad, group_size=4)
        assert store.num_free() == free
        store.clear()
        assert store.num_free() > free
        store.put({"x": np.ones((2, 8))})
        got = store.get("task")
        assert got is not None
        assert got.columns["x"].values.tolist() == np.ones((2, 8)).tolist()


def test_8_released_rows_are_delivered_again_and_first(start: Start) -> None:
    with start({"task": ["ids"]}) as store:
        store.put({"ids": ids(*range(9))})
        lost, kept = store.get("task", max_groups=4), store.get("task", max_groups=1)
        assert lost is not None
        assert kept is not None
        store.release(lost)
        again = store.get("task")
        assert again is not None
        assert numbers_of(again.columns["ids"]) == [0, 1, 2, 3, 5, 6, 7, 8]
        store.acknowledge(again)
        store.acknowledge(kept)
        assert (store.counts().trained, store.counts().pending) == (9, 0)


def test_8_space_is_used_again_for_ever(start: Start) -> None:
    """40 times the arena goes through it, in blocks of many sizes and with a column added."""
    rng = np.random.default_rng(8)
    with start({"task": ["x", "y"]}) as store:
        total, number = 0, 0
        while total < 40 << 22:
            size = int(rng.integers(1, 1 << 18))
            rows = store.put({"x": np.full((2, size), number, np.float32)})
            store.write(rows, "y", np.full((2, size // 3), number, np.float32))
            got = store.get("task")
            assert got is not None
            assert (got.columns["x"].values == number).all()
            assert (got.columns["y"].values == number).all()
            del rows
            store.acknowledge(got)
            total += 10 * size
            number += 1
        assert sys.getsizeof(store) < 1000
        assert store.counts().pending == 0
