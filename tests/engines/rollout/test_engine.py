"""The engine in its own process: the contract, and every way in which the process can end."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from transformers import PreTrainedModel

from asyncflow.core.config import RolloutConfig
from asyncflow.core.errors import ConfigError, EngineLostError, WeightSyncError
from asyncflow.core.metrics import NullObserver
from asyncflow.core.types import FloatArray, IntArray, SamplingParams, WeightsRef
from asyncflow.core.world import World
from asyncflow.engines.channel import MemoryChannel
from asyncflow.engines.rollout.client import SILENCE_LIMIT_S, TorchRolloutEngine, start_rollout_engine
from tests.contracts.rollout_engine import SUITE, Subject, cancelling_frees_the_slots, closing_is_final
from tests.engines.rollout.tiny import CONTEXT, VOCABULARY, build, parameters, save, score, shapes

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

CONFIG = RolloutConfig(device="cpu", threads=1, max_running=4)
FOREVER = SamplingParams(max_tokens=100_000)
PROMPT = np.array([1, 2, 3], np.int32)


class Spans(NullObserver):
    """Keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str, float, float]] = []

    def span(self, role: str, name: str, start_s: float, end_s: float) -> None:
        self.spans.append((role, name, start_s, end_s))


@dataclass(slots=True)
class Publisher:
    """Publishes a new model each time; step s holds the model of seed s."""

    channel: MemoryChannel
    step: int = 0
    models: dict[int, PreTrainedModel] = field(default_factory=dict)

    def publish(self) -> WeightsRef:
        self.step += 1
        self.models[self.step] = build(seed=self.step)
        return self.channel.write(parameters(self.models[self.step]), self.step, "test")

    def score(self, sequence: IntArray, step: int) -> FloatArray:
        return score(self.models[step], sequence)


@dataclass(frozen=True, slots=True)
class Running:
    """A started engine and everything around it."""

    engine: TorchRolloutEngine
    subject: Subject
    channel: MemoryChannel
    observer: Spans
    log: Path


@asynccontextmanager
async def running(folder: Path, *, silence_limit_s: float = SILENCE_LIMIT_S) -> AsyncIterator[Running]:
    model = build()
    channel, observer, log = MemoryChannel.create(shapes(model)), Spans(), folder / "logs" / "rollout.log"
    publisher = Publisher(channel)
    async with start_rollout_engine(
        model=save(model, folder / "model"),
        config=CONFIG,
        world=World(),
        channel=channel,
        log=log,
        observer=observer,
        silence_limit_s=silence_limit_s,
    ) as engine:
        subject = Subject(
            engine=engine, vocabulary=VOCABULARY, num_slots=4, publish=publisher.publish, score=publisher.score
        )
        yield Running(engine, subject, channel, observer, log)
    channel.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with running(tmp_path_factory.mktemp("engine")) as started:
        yield started


@pytest.mark.parametrize("check", SUITE, ids=lambda check: check.__name__)
async def test_contract(check: object, shared: Running) -> None:
    assert callable(check)
    await check(shared.subject)


async def test_weights_damaged_on_the_way_are_noticed(shared: Running) -> None:
    ref = shared.subject.publish()
    next(iter(shared.channel.read(ref).values()))[0, 0] += 1
    with pytest.raises(WeightSyncError, match=f"was sent weights {ref.version.fingerprint}, its model now holds"):
        await shared.engine.load_weights(ref)


async def test_busy_spans_are_ordered_and_their_tokens_counted(shared: Running) -> None:
    shared.observer.spans.clear()
    before, loop = shared.engine.num_tokens, asyncio.get_running_loop()
    start_s = loop.time()
    for _ in range(2):
        await shared.engine.generate(PROMPT, SamplingParams(max_tokens=20), session="")
    await shared.engine.load_weights(shared.subject.publish())
    spans = [(name, start, end) for _, name, start, end in shared.observer.spans]
    assert [name for name, _, _ in spans] == ["decode", "decode", "load_weights"]
    times = [start_s, *(time for _, *both in spans for time in both), loop.time()]
    assert times == sorted(times)
    assert shared.engine.num_tokens - before == 40


async def test_a_cancelled_request_is_not_computed_any_further(shared: Running) -> None:
    before = shared.engine.num_tokens
    await cancelling_frees_the_slots(shared.subject)
    await shared.engine.generate(PROMPT, SamplingParams(max_tokens=1), session="")
    assert shared.engine.num_tokens - before < CONTEXT, "else those cancelled went on to the end of their context"


def is_gone(pid: int) -> bool:
    """Whether no process has this id any more, not even a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def test_closing(tmp_path: Path) -> None:
    async with running(tmp_path) as started:
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            group.create_task(started.engine.watch(), name="watch")
            await closing_is_final(started.subject)
        assert is_gone(started.engine.pid)


async def test_a_killed_process_ends_every_call_and_says_how_it_died(tmp_path: Path) -> None:
    losses: list[str] = []

    async def expect_loss(engine: TorchRolloutEngine, began: asyncio.Event) -> None:
        with pytest.raises(EngineLostError) as caught:
            await engine.generate(PROMPT, FOREVER, session="", on_tokens=lambda _: began.set())
        losses.append(str(caught.value))

    async def expect_watch(engine: TorchRolloutEngine) -> None:
        with pytest.raises(EngineLostError, match="SIGKILL"):
            await engine.watch()

    async with running(tmp_path) as started:
        engine, began = started.engine, asyncio.Event()
        World().disk.append(started.log, b"its last words\n")
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            for number in range(2 * CONFIG.max_running):
                group.create_task(expect_loss(engine, began), name=f"call {number}")
            group.create_task(expect_watch(engine), name="watch")
            await began.wait()
            os.kill(engine.pid, signal.SIGKILL)
        assert is_gone(engine.pid)
        assert all("was killed by SIGKILL" in loss and "its last words" in loss for loss in losses)
        for call in (engine.generate(PROMPT, FOREVER, session=""), engine.load_weights(started.subject.publish())):
            with pytest.raises(EngineLostError, match="SIGKILL"):
                await call


@pytest.mark.parametrize("num_calls", [0, 2], ids=["idle", "busy"])
async def test_a_process_that_stopped_answering_is_lost(tmp_path: Path, num_calls: int) -> None:
    """Also while nothing waits for it: the run must not go on without it."""
    losses: list[str] = []

    async def expect_loss(call: Coroutine[None, None, object]) -> None:
        with pytest.raises(EngineLostError) as caught:
            await call
        losses.append(str(caught.value))

    async with running(tmp_path, silence_limit_s=1) as started:
        engine = started.engine
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            group.create_task(expect_loss(engine.watch()), name="watch")
            os.kill(engine.pid, signal.SIGSTOP)
            for number in range(num_calls):
                call = engine.generate(PROMPT, FOREVER, session="")
                group.create_task(expect_loss(call), name=f"call {number}")
        assert is_gone(engine.pid)
        expected = f"did not answer for 1 s (state: T (stopped), {num_calls} completions and 0 weight loads outstanding"
        assert len(losses) == 1 + num_calls
        assert all(expected in loss for loss in losses)
        with pytest.raises(EngineLostError, match="did not answer"):
            await engine.load_weights(started.subject.publish())


async def test_an_idle_process_answers(tmp_path: Path) -> None:
    async with running(tmp_path, silence_limit_s=1) as started:
        heard = asyncio.Event()
        pulse = started.engine._pulse
        pulse.hear = heard.set  # type: ignore[method-assign]
        async with asyncio.timeout(10):
            await heard.wait()


SCRIBBLER = """
import socket, sys
connection = socket.socket(fileno=int(sys.argv[1]))
connection.sendall(b"\\xff" * 8)
print("its last words", flush=True)
while connection.recv(1000):
    pass
sys.stdin.read()
"""


async def test_a_damaged_message_is_named_as_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scribbler.py").write_text(SCRIBBLER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("asyncflow.engines.rollout.client.WORKER", "scribbler")
    with pytest.raises(EngineLostError, match=r"a frame announces 4294967295 bytes, .* and was killed"):
        async with start_rollout_engine(model="x", config=CONFIG, world=World(), channel=None, log=tmp_path / "log"):
            pytest.fail("it started")


async def test_a_model_that_is_not_there_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be opened"):
        async with start_rollout_engine(
            model=str(tmp_path / "nothing"), config=CONFIG, world=World(), channel=None, log=tmp_path / "log"
        ):
            pytest.fail("it started")


async def test_a_cancelled_start_leaves_no_process(tmp_path: Path) -> None:
    engine = TorchRolloutEngine(NullObserver())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await engine.start(model="x", config=CONFIG, world=World(), channel=None, log=tmp_path / "log")
    pid = engine.pid
    await engine.aclose()
    assert is_gone(pid)


PARENT = """
import asyncio, sys
from pathlib import Path
from asyncflow.core.config import RolloutConfig
from asyncflow.core.world import World
from asyncflow.engines.rollout.client import start_rollout_engine

async def main() -> None:
    config = RolloutConfig(device="cpu", threads=1)
    log = Path(sys.argv[1]).with_name("log")
    async with start_rollout_engine(model=sys.argv[1], config=config, world=World(), channel=None, log=log) as engine:
        print(engine.pid, flush=True)
        await engine.watch()

asyncio.run(main())
"""


def engine_of_a_killed_parent(model: str) -> int:
    """The pidfd of an engine whose parent has just been killed."""
    with subprocess.Popen([sys.executable, "-c", PARENT, model], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    return pidfd


async def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    pidfd = engine_of_a_killed_parent(save(build(), tmp_path / "model"))
    ended, _, _ = select.select([pidfd], [], [], 10)
    os.close(pidfd)
    assert ended
