"""`TorchScorer`: a policy that is only asked for log-probabilities, such as the one from which KL is measured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial

from asyncflow.core.config import TrainConfig
from asyncflow.core.metrics import NullObserver, Observer
from asyncflow.core.types import FloatArray, MicroBatch
from asyncflow.engines.bit_equal import bit_equal, fixed
from asyncflow.engines.train.compute_thread import ComputeThread
from asyncflow.engines.train.scoring import Scorer
from asyncflow.engines.train.source import load_model
from asyncflow.engines.train.timed_calls import TimedCalls


class TorchScorer:
    """Scores as `TorchTrainEngine` does, bit for bit; has no gradients, no optimizer and no weight channel."""

    def __init__(
        self,
        scorer: Scorer,
        thread: ComputeThread,
        *,
        observer: Observer,
        num_threads: Callable[[], int],
        rules: AbstractContextManager[None],
    ) -> None:
        self._is_open = True
        self._held = ExitStack()
        self._held.callback(thread.close)
        self._held.enter_context(rules)
        self._scorer = scorer
        self._thread = thread
        self._calls = TimedCalls(thread, "reference", observer, num_threads)

    @classmethod
    async def open(
        cls,
        source: str,
        config: TrainConfig,
        *,
        temperature: float,
        observer: Observer | None = None,
        num_threads: Callable[[], int] | None = None,
        deterministic: bool = False,
    ) -> TorchScorer:
        """Load a model folder or hub name; device and dtype are the trainer's. Raises `ConfigError`.

        `num_threads` is asked before every call on how many CPU threads; 0 leaves the number as
        it is. Without it, `config.threads` holds. With `deterministic`, the number is fixed now and
        each sample is scored by itself: its bits follow from its tokens and the weights.
        """
        thread = ComputeThread("asyncflow-reference")
        try:
            loaded = await thread.run(partial(load_model, source, config.device))
        except BaseException:
            thread.close()
            raise
        loaded.model.requires_grad_(requires_grad=False)
        half = config.dtype == "bfloat16"
        scorer = Scorer(
            model=loaded.model, forward=loaded.forward, temperature=temperature, half=half, alone=deterministic
        )
        num_threads = num_threads or (lambda: config.threads)
        return cls(
            scorer,
            thread,
            observer=observer or NullObserver(),
            num_threads=fixed(num_threads) if deterministic else num_threads,
            rules=bit_equal() if deterministic else nullcontext(),
        )

    async def logprobs(self, batch: MicroBatch) -> FloatArray:
        """Log-probability of every token given those before it in its sample, `[T]`; 0 for the first."""
        return await self._calls.run("logprobs", partial(self._scorer.logprobs, batch))

    async def aclose(self) -> None:
        """Wait for what is being computed, then end the thread. May be called twice."""
        if self._is_open:
            self._is_open = False
            try:
                await self._thread.run(lambda: None)  # off the event loop, which closing would hold up
            finally:
                self._held.close()
