"""The rollout engine as the run sees it: a `RolloutEngine` whose work is done by a child process.

The engine has no task of its own: the event loop calls it when bytes arrive, when the child
ends, and when it is time to ask whether the child still answers, so there is nothing to
supervise and nothing can leak. When the child dies, every waiting call raises
`EngineLostError`, and so does every later one; a child that lives but has stopped answering is
killed, so that this is the only way to lose it. Opening the model is not timed: it may have to
be downloaded. Whoever must not go on without the engine, even while nothing waits for it, runs
`watch` beside its work.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from asyncflow.core.config import RolloutConfig
from asyncflow.core.errors import ConfigError, EngineLostError, NonFiniteError, RolloutError, WeightSyncError
from asyncflow.core.metrics import NullObserver, Observer
from asyncflow.core.ports import OnTokens
from asyncflow.core.types import Completion, IntArray, PolicyVersion, SamplingParams, TokenChunk, WeightsRef
from asyncflow.core.world import World
from asyncflow.engines.channel import MemoryChannel
from asyncflow.engines.cores import rollout_threads
from asyncflow.engines.rollout.messages import (
    Abort,
    Alive,
    Busy,
    Chunk,
    Close,
    Failed,
    Finished,
    FromWorker,
    Generate,
    LoadWeights,
    Ping,
    Ready,
    Refused,
    Start,
    WeightsLive,
    completion,
    floats,
    ints,
)
from asyncflow.engines.rollout.process import ChildProcess, Connection, start_child
from asyncflow.engines.rollout.pulse import Pulse

WORKER = "asyncflow.engines.rollout.worker"
ROLE = "rollout"
CLOSE_LIMIT_S = 3.0
SILENCE_LIMIT_S = 300.0
"""How long the child may say nothing, although asked, before it is taken for lost.

Generous, because it answers only between two pieces of work. The longest are a prefill of
8,192 tokens (80 to 160 s for half a billion parameters on one core) and copying and hashing
the weights (about a second per gigabyte). To wait some minutes for a child that is lost for
good costs little; to kill one that works costs the run.
"""
ENVIRONMENT: Mapping[str, str] = {
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads of two processes on few cores cost a factor of 30
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",  # last words must reach the log
}
ERRORS: Mapping[str, type[Exception]] = {"non_finite": NonFiniteError, "weights": WeightSyncError}


AnswerT = TypeVar("AnswerT")
Waiting = dict[int, asyncio.Future[AnswerT]]


class TorchRolloutEngine:
    """Samples completions in a child process. Made by `start_rollout_engine`."""

    def __init__(self, observer: Observer, *, silence_limit_s: float = SILENCE_LIMIT_S) -> None:
        self.num_tokens = 0
        """Tokens sampled since the start."""
        self._observer = observer
        self._connection = Connection(self._receive, self._condemn, self._hang_up)
        self._pulse = Pulse(silence_limit_s, lambda: self._connection.send(Ping()), self._give_up)
        self._child: ChildProcess | None = None
        self._completions: Waiting[Completion] = {}
        self._loads: Waiting[WeightsLive] = {}
        self._listeners: dict[int, OnTokens] = {}
        self._num_requests = 0
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._gone = asyncio.Event()
        self._is_closing = False
        self._loss = "the rollout engine was not started"

    @property
    def pid(self) -> int:
        """Id of the child process."""
        if self._child is None:
            raise EngineLostError(self._loss)
        return self._child.pid

    @property
    def num_running(self) -> int:
        """Completions asked for and not yet returned."""
        return len(self._completions)

    @property
    def limits(self) -> Ready:
        """What the engine serves: its vocabulary, context and device."""
        return self._ready.result()

    async def start(
        self,
        *,
        model: str,
        config: RolloutConfig,
        world: World,
        channel: MemoryChannel | None,
        log: Path,
        deterministic: bool = False,
    ) -> None:
        """Start the child; returns once it can serve. Raises `ConfigError`, or `EngineLostError` if it dies."""
        threads = rollout_threads(config, deterministic=deterministic)
        self._child = await start_child(
            world,
            WORKER,
            environment={**ENVIRONMENT, "OMP_NUM_THREADS": str(threads)},
            pass_fds=[channel.fd] if channel else [],
            log=log,
            connection=self._connection,
            on_exit=self._mourn,
        )
        settings = Start(
            model=model,
            device=config.device,
            dtype=config.dtype,
            max_running=config.max_running,
            threads=threads,
            channel_fd=channel.fd if channel else 0,
            manifest=channel.manifest.encode() if channel else b"",
            deterministic=deterministic,
        )
        self._connection.send(settings)
        await self._ready

    async def generate(
        self, token_ids: IntArray, params: SamplingParams, *, session: str, on_tokens: OnTokens | None = None
    ) -> Completion:
        """Sample a completion of at most `max_tokens` or as many as the context holds; higher priorities start first.

        Raises `RolloutError` for a prompt that can't be served and `NonFiniteError` when the
        weights give no distribution. The turns of a session share no cache yet.
        """
        message = Generate(
            request=self._next_request(),
            token_ids=token_ids.astype("<i4").tobytes(),
            params=self._check(token_ids, params),
            is_streamed=on_tokens is not None,
        )
        if on_tokens is not None:
            self._listeners[message.request] = on_tokens
        try:
            return await self._ask(self._completions, message)
        finally:
            self._listeners.pop(message.request, None)

    async def load_weights(self, weights: WeightsRef) -> PolicyVersion:
        """Serve these weights from the next token on. Running completions go on under them.

        The fingerprint returned is that of the parameters the child computes with. Raises
        `WeightSyncError` when it is not the one that was sent.
        """
        answer = await self._ask(self._loads, LoadWeights(request=self._next_request(), weights=weights))
        self._observer.span(ROLE, "load_weights", answer.start_s, answer.end_s)
        expected = weights.version.fingerprint
        if expected and answer.fingerprint != expected:
            raise WeightSyncError(
                f"step {weights.version.step}: the rollout engine was sent weights {expected}, "
                f"its model now holds {answer.fingerprint}"
            )
        return replace(weights.version, fingerprint=answer.fingerprint)

    async def watch(self) -> None:
        """Wait for the child's end. Raises `EngineLostError` if it died or stopped answering.

        Returns if the engine was closed.
        """
        await self._gone.wait()
        if not self._is_closing:
            raise EngineLostError(self._loss)

    async def aclose(self) -> None:
        """End the child; takes at most a few seconds, leaves no process. May be called twice."""
        self._is_closing = True
        is_listening = not self._ready.cancel()  # else it is still opening the model
        if self._child is not None:
            self._connection.send(Close())
            await self._child.stop(CLOSE_LIMIT_S if is_listening else 0)

    def _check(self, token_ids: IntArray, params: SamplingParams) -> SamplingParams:
        """The parameters, `max_tokens` cut to what fits into the context."""
        limits = self.limits
        room = limits.context - len(token_ids)
        if not len(token_ids) or room < 1:
            raise RolloutError(
                f"a prompt of {len(token_ids)} tokens can't be completed in a context of {limits.context}"
            )
        if token_ids.min() < 0 or token_ids.max() >= limits.vocabulary:
            raise RolloutError(
                f"prompt holds token ids from {token_ids.min()} to {token_ids.max()}, "
                f"the model knows 0 to {limits.vocabulary - 1}"
            )
        return replace(params, max_tokens=min(params.max_tokens, room))

    def _next_request(self) -> int:
        if self._gone.is_set():
            raise EngineLostError(self._loss)
        self._num_requests += 1
        return self._num_requests

    async def _ask(self, waiting: Waiting[AnswerT], message: Generate | LoadWeights) -> AnswerT:
        """Send a request and wait for its answer; when cancelled, tell the child to forget it."""
        answer: asyncio.Future[AnswerT] = asyncio.get_running_loop().create_future()
        waiting[message.request] = answer
        self._connection.send(message)
        try:
            return await answer
        finally:
            if waiting.pop(message.request, None) is not None:  # nothing has answered it
                self._connection.send(Abort(request=message.request))

    def _receive(self, message: FromWorker) -> None:
        self._pulse.hear()
        match message:
            case Alive():
                pass
            case Chunk():
                self._stream(message)
            case Finished():
                _answer(self._completions, message.request, completion(message))
            case WeightsLive():
                _answer(self._loads, message.request, message)
            case Failed():
                self._fail(message.request, ERRORS[message.kind](message.reason))
            case Busy():
                self.num_tokens += message.num_tokens
                self._observer.span(ROLE, "decode", message.start_s, message.end_s)
            case Ready() | Refused() if self._ready.done():
                pass  # closed meanwhile: nobody waits for it
            case Ready():
                self._ready.set_result(message)
                self._pulse.begin()
            case Refused():
                self._ready.set_exception(ConfigError(*message.problems))

    def _stream(self, chunk: Chunk) -> None:
        listener = self._listeners.get(chunk.request)
        if listener is None:
            return
        tokens = TokenChunk(token_ids=ints(chunk.token_ids), logprobs=floats(chunk.logprobs), step=chunk.step)
        try:
            listener(tokens)
        except Exception as error:  # noqa: BLE001 - a listener's error belongs to its own call
            self._connection.send(Abort(request=chunk.request))
            self._fail(chunk.request, error)

    def _fail(self, request: int, error: Exception) -> None:
        for waiting in (self._completions, self._loads):
            future = waiting.pop(request, None)
            if future is not None and not future.done():
                future.set_exception(error)

    def _give_up(self) -> None:
        if self._child is not None:
            self._condemn(
                f"did not answer for {self._pulse.limit_s:g} s (state: {self._child.kernel_state()}, "
                f"{len(self._completions)} completions and {len(self._loads)} weight loads outstanding)"
            )

    def _condemn(self, offence: str) -> None:
        if self._child is not None:
            self._child.condemn(offence)

    def _hang_up(self) -> None:
        if self._child is not None:
            self._child.expect_exit()

    def _mourn(self, obituary: str) -> None:
        """The child has ended: nobody waits for it any longer."""
        self._loss = "the rollout engine was closed" if self._is_closing else f"rollout {obituary}"
        self._gone.set()
        self._pulse.end()
        self._connection.close()
        for request in (*self._completions, *self._loads):
            self._fail(request, EngineLostError(self._loss))
        if not self._ready.done():
            self._ready.set_exception(EngineLostError(self._loss))


def _answer(waiting: Waiting[AnswerT], request: int, answer: AnswerT) -> None:
    """Resolve a request; one that was cancelled crossed its answer on the way and is gone."""
    future = waiting.pop(request, None)
    if future is not None and not future.done():
        future.set_result(answer)


@asynccontextmanager
async def start_rollout_engine(
    *,
    model: str,
    config: RolloutConfig,
    world: World,
    channel: MemoryChannel | None,
    log: Path,
    observer: Observer | None = None,
    silence_limit_s: float = SILENCE_LIMIT_S,
    deterministic: bool = False,
) -> AsyncIterator[TorchRolloutEngine]:
    """A running engine for `model`, a folder or hub name; its process ends with the block.

    The child's output goes to the end of the file `log`. A child that says nothing for
    `silence_limit_s`, although asked, is killed: choose more than the longest step. With `deterministic`, completions
    are sampled one after the other, and the bits of each follow from its prompt, parameters, seed and the weights,
    whatever else is asked for, in whatever order and process. Raises `ConfigError` when the model can't be served as
    configured.
    """
    engine = TorchRolloutEngine(observer or NullObserver(), silence_limit_s=silence_limit_s)
    try:
        await engine.start(
            model=model, config=config, world=world, channel=channel, log=log, deterministic=deterministic
        )
        yield engine
    finally:
        await engine.aclose()
