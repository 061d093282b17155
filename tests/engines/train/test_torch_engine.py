"""What the torch engine promises beyond the contract."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncflow.algo.algorithms import make_warmup_loss
from asyncflow.core.columns import LOSS_MASK
from asyncflow.core.config import TrainConfig, WarmupConfig
from asyncflow.core.errors import ConfigError, NonFiniteError, RunFolderError
from asyncflow.core.ports import LossInputs, LossOutput
from asyncflow.core.types import FloatArray, MicroBatch, PolicyVersion, Ragged
from asyncflow.engines import channel
from asyncflow.engines.channel import Array
from asyncflow.engines.models import build_text_model
from asyncflow.engines.train.export import to_bits
from asyncflow.engines.train.optimizer import Phase
from asyncflow.engines.train.torch_engine import TorchTrainEngine
from tests.contracts.train_engine import SUITE, Check, Subject
from tests.engines.train.tiny import (
    CONFIG,
    PHASE,
    build_tiny_model,
    gradient,
    make_batch,
    make_loss,
    open_engine,
    select,
)


@pytest.mark.parametrize("check", SUITE, ids=lambda check: check.__name__)
async def test_contract(check: Check[Tensor], tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    async with open_engine(build_tiny_model(tmp_path / "model")) as engine:
        batches = (make_batch([5, 4], seed=1), make_batch([3], seed=2))
        await check(Subject(engine=engine, loss=make_loss(), batches=batches, folder=tmp_path / "checkpoint"))


async def test_reports_are_of_the_whole_step_however_it_was_split(tmp_path: Path) -> None:
    batch, loss = make_batch([8, 5]), make_loss()
    denominator = loss.denominator(batch)
    source = build_tiny_model(tmp_path)
    async with open_engine(source) as engine, open_engine(source) as other:
        await engine.accumulate(batch, loss)
        for samples in (range(4), range(4, 13)):
            await other.accumulate(select(batch, samples), loss)
        norm = (gradient(engine) / denominator).norm().item()
        await engine.accumulate(batch, loss)  # counts twice in the sums of this step, in none of the next
        whole, parts = await engine.apply(denominator), await other.apply(denominator)
    assert parts.grad_norm == pytest.approx(norm, rel=1e-5)
    assert whole.loss == pytest.approx(2 * parts.loss, rel=1e-4, abs=1e-6)
    assert parts.metrics["ratio"] == pytest.approx(1, abs=0.2)
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-4, abs=1e-6)
    assert (parts.num_tokens, parts.num_samples) == (int(batch[LOSS_MASK].sum()), 13)


async def test_logprobs_are_the_models_own(tmp_path: Path) -> None:
    source, batch = build_tiny_model(tmp_path), make_batch([6])
    model = AutoModelForCausalLM.from_pretrained(source)
    async with open_engine(source) as engine:
        logprobs = await engine.logprobs(batch)
    expected = []
    for tokens in batch.columns["token_ids"].rows():
        logits = model(input_ids=torch.tensor(tokens[None].astype(int))).logits[0]
        scored = torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(tokens[1:, None].astype(int)))
        expected += [0.0, *scored[:, 0].tolist()]
    np.testing.assert_allclose(logprobs, expected, atol=2e-6)


async def test_temperature_belongs_to_the_phase(tmp_path: Path) -> None:
    batch = make_batch([3])
    source = build_tiny_model(tmp_path)
    warm = Phase(learning_rate=0, betas=(0.9, 0.99), weight_decay=0, max_grad_norm=1, temperature=0.25)
    async with open_engine(source) as engine, open_engine(source, phase=warm) as other:
        plain = await engine.logprobs(batch)
        assert np.abs(await other.logprobs(batch) - plain).max() > 1e-2
        await engine.begin_phase(warm)
        np.testing.assert_array_equal(await engine.logprobs(batch), await other.logprobs(batch))


async def test_a_cancelled_call_has_left_the_thread_when_it_returns(tmp_path: Path) -> None:
    """A loss that waits stands for a long computation; the caller is cancelled twice while it runs."""
    started, go_on, finished = threading.Event(), threading.Event(), threading.Event()

    class SlowLoss:
        def __call__(self, inputs: LossInputs[Tensor]) -> LossOutput[Tensor]:
            started.set()
            go_on.wait(10)
            finished.set()
            return make_loss()(inputs)

        def weights(self, batch: MicroBatch) -> FloatArray:
            return make_loss().weights(batch)

        def denominator(self, batch: MicroBatch) -> float:
            return make_loss().denominator(batch)

    async with open_engine(build_tiny_model(tmp_path)) as engine, asyncio.TaskGroup() as tasks:
        call = tasks.create_task(engine.accumulate(make_batch([4]), SlowLoss()), name="accumulate")
        await asyncio.to_thread(started.wait, 10)
        for _ in range(2):
            call.cancel()
            await asyncio.sleep(0)
        assert not call.done()
        go_on.set()
        await asyncio.wait([call])
        assert call.cancelled()
        assert finished.is_set()
        assert gradient(engine).abs().sum() > 0


async def test_a_gradient_that_is_no_number_leaves_the_weights_alone(tmp_path: Path) -> None:
    batch = make_batch([4])
    async with open_engine(build_tiny_model(tmp_path)) as engine:
        before = await engine.logprobs(batch)
        await engine.accumulate(batch, make_loss())
        next(iter(engine._parameters.values())).grad = torch.full((14, 32), torch.inf)
        with pytest.raises(NonFiniteError, match="gradient norm"):
            await engine.apply(1.0)
        assert engine.version.step == 0
        np.testing.assert_array_equal(await engine.logprobs(batch), before)


async def test_an_empty_micro_batch_adds_nothing(tmp_path: Path) -> None:
    batch, loss = make_batch([4]), make_loss()
    empty = MicroBatch(
        rows=batch.rows[:0],
        columns={
            name: Ragged(values=column.values[:0], lengths=column.lengths[:0]) for name, column in batch.columns.items()
        },
    )
    masked = MicroBatch(
        rows=batch.rows,
        columns={
            **batch.columns,
            LOSS_MASK: Ragged(values=np.zeros(batch.num_tokens, np.bool_), lengths=batch.lengths),
        },
    )
    async with open_engine(build_tiny_model(tmp_path)) as engine:
        await engine.accumulate(batch, loss)
        expected = gradient(engine)
        for part in (empty, batch, masked):
            await engine.accumulate(part, loss)
        assert torch.equal(gradient(engine), expected)


async def test_a_checkpoint_is_a_model_and_continues_bit_for_bit(tmp_path: Path) -> None:
    """A second engine, from other weights, goes on exactly as the first would have."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    source, other_source = build_tiny_model(tmp_path / "a"), build_tiny_model(tmp_path / "b", seed=4)
    batches, loss = [make_batch([4, 3], seed=seed) for seed in range(4)], make_loss()

    async def continue_with(engine: TorchTrainEngine) -> list[tuple[float, float]]:
        reports = []
        for batch in batches[2:]:
            await engine.accumulate(batch, loss)
            reports.append(await engine.apply(loss.denominator(batch)))
        return [(report.loss, report.grad_norm) for report in reports]

    async with open_engine(source) as engine, open_engine(other_source) as other:
        for batch in batches[:2]:
            await engine.accumulate(batch, loss)
            await engine.apply(loss.denominator(batch))
        await engine.save(folder)
        await other.load(folder)
        assert other.version == engine.version == PolicyVersion(step=2)
        assert await continue_with(other) == await continue_with(engine)
        for name, parameter in engine._parameters.items():
            assert torch.equal(parameter, other._parameters[name]), name
    assert AutoTokenizer.from_pretrained(folder).encode("1+2=") == [1, 10, 2, 11]
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 32


async def test_a_resumed_engine_keeps_the_lineage_it_was_opened_with(tmp_path: Path) -> None:
    """Steps after a resume are not those that the first start took under the same numbers."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    source = build_tiny_model(tmp_path / "model")
    async with open_engine(source, lineage="run.1") as first, open_engine(source, lineage="run.2") as second:
        await first.accumulate(make_batch([4]), make_loss())
        await first.apply(10.0)
        await first.save(folder)
        await second.load(folder)
        assert second.version == PolicyVersion(step=1, lineage="run.2")
        await second.begin_phase(PHASE)
        assert (await second.export_weights()).version.lineage == "run.2"


async def test_a_folder_of_something_else_is_no_checkpoint(tmp_path: Path) -> None:
    async with open_engine(build_tiny_model(tmp_path)) as engine:
        with pytest.raises(RunFolderError, match="not a checkpoint"):
            await engine.load(tmp_path)


async def test_the_supervised_phase_learns_and_a_new_phase_starts_afresh(tmp_path: Path) -> None:
    loss, batch = make_warmup_loss(), make_batch([16])
    warmup = Phase.supervised(WarmupConfig(steps=20, learning_rate=1e-2), TrainConfig())
    async with open_engine(build_tiny_model(tmp_path), phase=warmup) as engine:
        reports = []
        for _ in range(20):
            await engine.accumulate(batch, loss)
            reports.append(await engine.apply(loss.denominator(batch)))
        assert reports[-1].loss < reports[0].loss - 0.3
        assert reports[0].learning_rate == pytest.approx(1e-2)
        assert reports[-1].learning_rate == pytest.approx(1e-3)
        await engine.begin_phase(PHASE)
        assert engine.version.step == 0
        assert engine._optimizer.state() == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
async def test_exports_are_the_weights_in_the_rollouts_dtype(tmp_path: Path, dtype: str) -> None:
    async with open_engine(build_tiny_model(tmp_path), export_dtype=dtype) as engine:
        ref = await engine.export_weights()
        bits = engine.channel.read(ref)
        assert bits.keys() == engine._parameters.keys()
        for name, parameter in engine._parameters.items():
            received = torch.tensor(bits[name])
            if dtype == "bfloat16":
                received = received.view(torch.bfloat16)
            assert torch.equal(received, parameter.to(getattr(torch, dtype))), name
        del bits


async def test_an_optimizer_step_does_not_wait_for_the_hash_of_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing takes long for large models; the step changes the weights that are being hashed."""
    hashing, go_on = threading.Event(), threading.Event()

    def slow_fingerprint(tensors: Mapping[str, tuple[str, Array]], *, threads: int) -> str:
        hashing.set()
        assert go_on.wait(10)
        return channel.fingerprint(tensors, threads=threads)

    async with open_engine(build_tiny_model(tmp_path), lineage="run") as engine, asyncio.TaskGroup() as tasks:
        before = {name: ("float32", to_bits(one, "float32").copy()) for name, one in engine._parameters.items()}
        await engine.accumulate(make_batch([4]), make_loss())
        with monkeypatch.context() as patch:
            patch.setattr("asyncflow.engines.channel.fingerprint", slow_fingerprint)
            export = tasks.create_task(engine.export_weights(), name="export")
            await asyncio.to_thread(hashing.wait, 10)
        async with asyncio.timeout(5):
            report = await engine.apply(10.0)
        go_on.set()
        assert report.version.step == 1
        assert (await export).version == PolicyVersion(
            step=0, lineage="run", fingerprint=channel.fingerprint(before, threads=2)
        )


async def test_a_tied_parameter_is_exported_and_trained_once(tmp_path: Path) -> None:
    build_text_model(
        tmp_path,
        corpus=["ab"],
        vocab_size=258,
        layers=1,
        width=32,
        heads=4,
        kv_heads=2,
        intermediate=48,
        max_len=64,
        seed=0,
    )
    async with open_engine(str(tmp_path)) as engine:
        assert "lm_head.weight" not in engine._parameters
        await engine.accumulate(make_batch([4]), make_loss())
        await engine.apply(10.0)
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        await engine.save(folder)
        await engine.load(folder)


async def test_bfloat16_computes_nearly_the_same_on_float32_weights(tmp_path: Path) -> None:
    source, batch = build_tiny_model(tmp_path), make_batch([8])
    half = CONFIG.model_copy(update={"dtype": "bfloat16"})
    async with open_engine(source) as engine, open_engine(source, config=half) as rough:
        difference = np.abs(await rough.logprobs(batch) - await engine.logprobs(batch)).max()
        assert 0 < difference < 0.02
        await rough.accumulate(batch, make_loss())
        assert gradient(rough).dtype == torch.float32


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./neither"])
async def test_a_missing_model_is_a_configuration_error(source: str) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        await TorchTrainEngine.open(source, CONFIG, phase=PHASE)
