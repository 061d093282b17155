"""What every training engine promises, as functions over an engine.

An adapter's tests make an engine, its loss and two micro-batches, and run these (see `SUITE`).
A check may leave the engine at any version.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import numpy as np
import pytest

from asyncflow.core.columns import LOGPROBS
from asyncflow.core.errors import AsyncFlowError, NonFiniteError
from asyncflow.core.ports import Loss, TensorT, TrainEngine
from asyncflow.core.types import MicroBatch, Ragged, StepReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject(Generic[TensorT]):
    """An engine, a policy loss, and two micro-batches; `folder` is empty.

    `learns` is false for engines without weights.
    """

    engine: TrainEngine[TensorT]
    loss: Loss[TensorT]
    batches: tuple[MicroBatch, MicroBatch]
    folder: Path
    learns: bool = True

    async def take_step(self) -> StepReport:
        """Accumulate both micro-batches and apply."""
        for batch in self.batches:
            await self.engine.accumulate(batch, self.loss)
        return await self.engine.apply(sum(self.loss.denominator(batch) for batch in self.batches))


async def a_step_adds_one_to_the_version(subject: Subject[TensorT]) -> None:
    before = subject.engine.version
    report = await subject.take_step()
    assert report.version == subject.engine.version
    assert subject.engine.version.step == before.step + 1
    assert subject.engine.version.lineage == before.lineage


async def a_report_counts_what_was_accumulated(subject: Subject[TensorT]) -> None:
    report = await subject.take_step()
    assert report.num_samples == sum(len(batch.lengths) for batch in subject.batches)
    assert report.num_tokens == sum(int(batch["loss_mask"].sum()) for batch in subject.batches)
    assert np.isfinite([report.loss, report.grad_norm, report.learning_rate, *report.metrics.values()]).all()


async def logprobs_are_aligned_with_tokens(subject: Subject[TensorT]) -> None:
    for batch in subject.batches:
        logprobs = await subject.engine.logprobs(batch)
        assert logprobs.shape == (batch.num_tokens,)
        assert logprobs.dtype == np.float32
        assert (logprobs <= 0).all()
        first = np.cumsum(batch.lengths) - batch.lengths
        assert (logprobs[first] == 0).all()


async def a_step_changes_logprobs_and_accumulating_does_not(subject: Subject[TensorT]) -> None:
    batch = subject.batches[0]
    before = await subject.engine.logprobs(batch)
    await subject.engine.accumulate(batch, subject.loss)
    assert ((await subject.engine.logprobs(batch)) == before).all()
    await subject.engine.apply(subject.loss.denominator(batch))
    assert not subject.learns or ((await subject.engine.logprobs(batch)) != before).any()


async def an_export_names_the_version_it_holds(subject: Subject[TensorT]) -> None:
    await subject.take_step()
    first = await subject.engine.export_weights()
    assert (first.version.step, first.version.lineage) == (subject.engine.version.step, subject.engine.version.lineage)
    await subject.take_step()
    second = await subject.engine.export_weights()
    assert second.version.step == first.version.step + 1
    if subject.learns:
        assert second.version.fingerprint != first.version.fingerprint
        assert second.address != first.address  # the first must stay readable until the export after this one


async def weights_travel_while_gradients_are_computed(subject: Subject[TensorT]) -> None:
    await subject.take_step()
    async with asyncio.TaskGroup() as tasks:
        export = tasks.create_task(subject.engine.export_weights(), name="export")
        tasks.create_task(subject.engine.accumulate(subject.batches[0], subject.loss), name="accumulate")
    assert export.result().version.step == subject.engine.version.step
    await subject.engine.apply(subject.loss.denominator(subject.batches[0]))


async def loading_goes_back_to_what_was_saved(subject: Subject[TensorT]) -> None:
    await subject.take_step()
    await subject.engine.save(subject.folder)
    saved = subject.engine.version
    first = [await subject.take_step(), await subject.take_step()]
    await subject.engine.load(subject.folder)
    assert subject.engine.version == saved
    assert [await subject.take_step(), await subject.take_step()] == first  # to the last bit


async def a_loss_that_is_no_number_is_refused(subject: Subject[TensorT]) -> None:
    batch = subject.batches[0]
    column = batch.columns[LOGPROBS]
    broken = Ragged(values=np.full_like(column.values, np.nan), lengths=column.lengths)
    bad_batch = MicroBatch(rows=batch.rows, columns={**batch.columns, LOGPROBS: broken})
    with pytest.raises(NonFiniteError, match=str(batch.rows.tickets[0])):
        await subject.engine.accumulate(bad_batch, subject.loss)
    assert np.isfinite((await subject.take_step()).grad_norm)


async def a_step_without_gradients_is_refused(subject: Subject[TensorT]) -> None:
    with pytest.raises(AsyncFlowError):
        await subject.engine.apply(0.0)


async def closing_twice_is_allowed(subject: Subject[TensorT]) -> None:
    await subject.engine.aclose()
    await subject.engine.aclose()


Check = Callable[[Subject[TensorT]], Awaitable[None]]

SUITE = (
    a_step_adds_one_to_the_version,
    a_report_counts_what_was_accumulated,
    logprobs_are_aligned_with_tokens,
    a_step_changes_logprobs_and_accumulating_does_not,
    an_export_names_the_version_it_holds,
    weights_travel_while_gradients_are_computed,
    loading_goes_back_to_what_was_saved,
    a_loss_that_is_no_number_is_refused,
    a_step_without_gradients_is_refused,
    closing_twice_is_allowed,
)
