"""The deterministic engine: equal bits from other processes, in other company, from other files."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from asyncflow.core.config import RolloutConfig
from asyncflow.core.types import SamplingParams
from asyncflow.core.world import World
from asyncflow.engines.channel import MemoryChannel
from asyncflow.engines.rollout.client import TorchRolloutEngine, start_rollout_engine
from tests.engines.rollout.tiny import VOCABULARY, build, parameters, prompts, save, shapes

pytestmark = pytest.mark.slow

NUM_REQUESTS = 20
ASKED = prompts([1 + 7 * index % 30 for index in range(NUM_REQUESTS)])
Answers = dict[int, tuple[bytes, bytes]]


async def ask(engine: TorchRolloutEngine, order: Sequence[int]) -> Answers:
    """Ask for all at once, in this order."""
    async with asyncio.TaskGroup() as requests:
        tasks = {
            index: requests.create_task(
                engine.generate(ASKED[index], SamplingParams(max_tokens=3 + index, seed=index), session=""),
                name=f"request {index}",
            )
            for index in order
        }
    return {
        index: (task.result().token_ids.tobytes(), task.result().logprobs.tobytes()) for index, task in tasks.items()
    }


async def test_processes_orders_and_files_change_no_bit(tmp_path: Path) -> None:
    """The second process opens other weights, at other addresses of a file, and is sent those of the first."""
    model = build(seed=1)
    source, other = save(model, tmp_path / "one"), save(build(seed=2), tmp_path / "two")
    weights = Path(other) / "model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt", "more": "x" * 13})
    config = RolloutConfig(device="cpu", max_running=8)
    answers: list[Answers] = []
    for folder, order in ((source, range(NUM_REQUESTS)), (other, range(NUM_REQUESTS - 1, -1, -1))):
        channel = MemoryChannel.create(shapes(model))
        async with start_rollout_engine(
            model=folder, config=config, world=World(), channel=channel, log=tmp_path / "log", deterministic=True
        ) as engine:
            await engine.load_weights(channel.write(parameters(model), 1, "test"))
            answers.append(await ask(engine, order))
            answers.append({index: (await ask(engine, [index]))[index] for index in range(NUM_REQUESTS)})
        channel.close()
    assert all(one == answers[0] for one in answers)
    tokens = np.frombuffer(answers[0][19][0], np.int32)
    assert len(tokens) == 22
    assert tokens.max() < VOCABULARY
