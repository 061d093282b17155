"""Deterministic training: equal calls give equal bits, in other processes and after a resume."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from asyncflow.core.metrics import NullObserver
from asyncflow.core.types import MicroBatch
from asyncflow.engines.train.compute_thread import ComputeThread
from asyncflow.engines.train.timed_calls import TimedCalls
from asyncflow.engines.train.torch_engine import TorchTrainEngine
from asyncflow.engines.train.torch_scorer import TorchScorer
from tests.engines.train.tiny import CONFIG, PHASE, build_tiny_model, make_batch, make_loss, open_engine, select

ROOT = Path(__file__).parents[3]


def steps(source: str, begin: int, end: int, checkpoint: Path, *, threads: int = 2) -> list[str]:
    """What the program of `deterministic_run` prints. `threads` are those that its process begins with."""
    words = [source, str(begin), str(end), str(checkpoint)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    program = [sys.executable, "-m", "tests.engines.train.deterministic_run", *words]
    done = subprocess.run(program, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 3, 5], ids=["in the warm-up", "after the warm-up", "after an RL step"])
def test_a_resume_equals_not_stopping_bit_for_bit(stop: int, tmp_path: Path) -> None:
    """Weights, moments and reports, each in a process of its own; the resumed one opens another file."""
    source, checkpoint = build_tiny_model(tmp_path / "model"), tmp_path / "checkpoint"
    checkpoint.mkdir()
    whole = steps(source, 0, 6, checkpoint)
    first = steps(source, 0, stop, checkpoint, threads=1)
    rest = steps(str(checkpoint), stop, 6, checkpoint)
    assert [*first[:-1], *rest] == whole
    assert all(line.endswith(" on 2") for line in whole[:-1])


async def repeat(source: str, batches: list[MicroBatch], numbers: list[int]) -> tuple[str, list[int]]:
    """The weights after a step on these numbers of threads, one for each call, and the numbers reported."""
    offers, loss, reported = iter(numbers), make_loss(), list[int]()
    engine = await TorchTrainEngine.open(source, CONFIG, phase=PHASE, num_threads=lambda: next(offers))
    assert engine.last_num_threads == 0
    for batch in batches:
        await engine.accumulate(batch, loss)
        reported.append(engine.last_num_threads)
    await engine.apply(sum(loss.denominator(batch) for batch in batches))
    reported.append(engine.last_num_threads)
    weights = await engine.fingerprint()
    await engine.aclose()
    return weights, reported


async def test_any_step_is_repeated_on_the_threads_it_reported(tmp_path: Path) -> None:
    """0 leaves the number as it is, so what was offered does not say it."""
    source, batches = build_tiny_model(tmp_path), [make_batch([4, 3], seed=seed) for seed in range(3)]
    weights, reported = await repeat(source, batches, [2, 0, 1, 2])
    assert reported == [2, 2, 1, 2]
    assert await repeat(source, batches, reported) == (weights, reported)


async def test_other_threads_do_not_change_the_number() -> None:
    """A thread that asks torch for the first time is given what any thread set last."""
    thread = ComputeThread("test")

    def call() -> int:
        other = threading.Thread(target=torch.set_num_threads, args=(1,))
        other.start()
        other.join()
        return torch.get_num_threads()

    assert await TimedCalls(thread, "test", NullObserver(), lambda: 2).run("call", call) == 2
    thread.close()


async def test_the_flags_end_with_the_engine(tmp_path: Path) -> None:
    source = build_tiny_model(tmp_path)
    engine = await TorchTrainEngine.open(source, CONFIG, phase=PHASE, deterministic=True)
    scorer = await TorchScorer.open(source, CONFIG, temperature=1.0, deterministic=True)
    for one in (scorer, engine):
        assert torch.are_deterministic_algorithms_enabled()
        await one.aclose()
    assert not torch.are_deterministic_algorithms_enabled()


async def test_a_deterministic_scorer_knows_no_neighbours(tmp_path: Path) -> None:
    """Nor does the engine's; and the scores are right."""
    source, batch = build_tiny_model(tmp_path), make_batch([6, 5])
    order = np.random.default_rng(1).permutation(11).tolist()
    scorer = await TorchScorer.open(source, CONFIG, temperature=1.0, deterministic=True)
    engine = await TorchTrainEngine.open(source, CONFIG, phase=PHASE, deterministic=True)
    async with open_engine(source) as plain:
        np.testing.assert_allclose(await scorer.logprobs(batch), await plain.logprobs(batch), atol=2e-6)
    for one in (scorer, engine):
        whole = np.split(await one.logprobs(batch), np.cumsum(batch.lengths)[:-1])
        mixed = np.split(await one.logprobs(select(batch, order)), np.cumsum(batch.lengths[order])[:-1])
        alone = [await one.logprobs(select(batch, [sample])) for sample in range(11)]
        assert [scores.tobytes() for scores in whole] == [scores.tobytes() for scores in alone]
        assert [scores.tobytes() for scores in mixed] == [alone[sample].tobytes() for sample in order]
    await engine.aclose()
    await scorer.aclose()


async def test_the_fingerprint_sees_what_a_bfloat16_export_hides(tmp_path: Path) -> None:
    source = build_tiny_model(tmp_path)
    async with open_engine(source, export_dtype="bfloat16") as engine, open_engine(source) as other:
        before, exported = await engine.fingerprint(), await engine.export_weights()
        assert before == await other.fingerprint()
        assert before == (await other.export_weights()).version.fingerprint
        weight = next(iter(engine._parameters.values()))
        with torch.no_grad():
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
        assert await engine.fingerprint() != before
        assert (await engine.export_weights()).version.fingerprint == exported.version.fingerprint
