"""A program: a warm-up, then reinforcement learning, whole or up to a checkpoint or from one on; prints the weights.

`python -m tests.engines.train.deterministic_run MODEL BEGIN END CHECKPOINT`: steps BEGIN up to END of 6. From step 0
on it begins with the model, later with the checkpoint; it writes the checkpoint unless END is 6.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from pathlib import Path

from asyncflow.algo.algorithms import make_warmup_loss
from asyncflow.core.config import TrainConfig, WarmupConfig
from asyncflow.engines.channel import fingerprint
from asyncflow.engines.train.export import to_bits
from asyncflow.engines.train.optimizer import Phase
from asyncflow.engines.train.torch_engine import TorchTrainEngine
from tests.engines.train.tiny import PHASE, make_batch, make_loss

NUM_WARM = 3
NUM_STEPS = 6
CONFIG = TrainConfig(device="cpu")
WARM = Phase.supervised(WarmupConfig(steps=NUM_WARM), CONFIG)


async def train(engine: TorchTrainEngine, step: int) -> str:
    """One step of several micro-batches; what it reports, exactly."""
    loss = make_warmup_loss() if step < NUM_WARM else make_loss()
    batches = [make_batch([4, 3], seed=10 * step + index) for index in range(3)]
    for batch in batches:
        await engine.accumulate(batch, loss)
    report = await engine.apply(sum(loss.denominator(batch) for batch in batches))
    return f"{step} {report.loss.hex()} {report.grad_norm.hex()} on {engine.last_num_threads}"


async def main(source: str, begin: int, end: int, checkpoint: Path) -> None:
    """The steps; the threads offered change all the time, as they do in a run."""
    offers = itertools.cycle([2, 1])
    engine = await TorchTrainEngine.open(
        source, CONFIG, phase=WARM, num_threads=lambda: next(offers), deterministic=True
    )
    if begin > 0:
        await engine.load(checkpoint)
    for step in range(begin, end):
        if step == NUM_WARM:
            await engine.begin_phase(PHASE)
        print(await train(engine, step))
    state = engine._optimizer.state()
    moments = {name: ("float32", tensor.numpy()) for name, tensor in state.items()}
    print("weights", await engine.fingerprint(), "moments", fingerprint(moments))
    if end < NUM_STEPS:
        await engine.save(checkpoint)
    else:
        named = {name: ("float32", to_bits(parameter, "float32")) for name, parameter in engine._parameters.items()}
        assert await engine.fingerprint() == fingerprint(named)
    await engine.aclose()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
