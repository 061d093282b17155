"""`TorchTrainEngine`: the training engine for one device.

Two threads, neither of them the event loop's. The compute thread owns model, gradients and
optimizer. The export thread only reads parameters, so weights travel while gradients are
computed.

On a CPU, processes that share cores must be started with `OMP_WAIT_POLICY=PASSIVE`, which has
to be in the environment before torch is imported: spinning OpenMP threads of two
processes on the same cores cost a factor of 30.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from asyncflow.core.config import TrainConfig
from asyncflow.core.metrics import NullObserver, Observer
from asyncflow.core.ports import Loss
from asyncflow.core.types import FloatArray, MicroBatch, PolicyVersion, StepReport, WeightsRef
from asyncflow.core.world import Disk, RealDisk
from asyncflow.engines.bit_equal import bit_equal, fixed
from asyncflow.engines.channel import MemoryChannel, fingerprint
from asyncflow.engines.train.checkpoint import TrainerState, read_state, read_weights, write_checkpoint
from asyncflow.engines.train.compute_thread import ComputeThread
from asyncflow.engines.train.export import channel_shapes, to_bits
from asyncflow.engines.train.optimizer import Optimizer, Phase
from asyncflow.engines.train.scoring import Scorer
from asyncflow.engines.train.source import LoadedModel, load_model
from asyncflow.engines.train.step_sums import StepSums
from asyncflow.engines.train.timed_calls import TimedCalls


class TorchTrainEngine:
    """Trains any Hugging Face causal language model: float32 weights, AdamW, no padding.

    The model is in evaluation mode throughout: dropout would make the ratio to the policy
    that sampled a random number. So nothing is random here, and equal calls give equal weights.

    The same calls give the same bits if each computes on as many threads as before: a
    `deterministic` engine asks for the number once, and any other can be told, through
    `num_threads`, the `last_num_threads` of the calls to be repeated. On a GPU, only a
    `deterministic` one does.

    `channel` is where `export_weights` writes; start readers with its descriptor.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        phase: Phase,
        *,
        half: bool,
        export_dtype: str,
        lineage: str,
        observer: Observer,
        num_threads: Callable[[], int],
        disk: Disk,
        deterministic: bool,
    ) -> None:
        self._held = ExitStack()
        num_threads = fixed(num_threads) if deterministic else num_threads
        self._deterministic = deterministic
        self._last_num_threads = 0
        self._disk = disk
        self._num_threads = num_threads
        self._loaded = loaded
        self._half = half
        self._parameters = dict(loaded.model.named_parameters())  # a tied parameter once
        self._version = PolicyVersion(step=0, lineage=lineage)
        self._begin(phase)
        self._export_dtype = export_dtype
        self.channel = MemoryChannel.create(channel_shapes(self._parameters, export_dtype))
        self._compute = ComputeThread("asyncflow-train")
        self._calls = TimedCalls(self._compute, "train", observer, num_threads)
        self._exports = ComputeThread("asyncflow-export")
        self._weights_lock = threading.Lock()  # the export thread reads parameters, the compute thread steps them
        self._is_open = True
        self._held.enter_context(bit_equal() if deterministic else nullcontext())

    @classmethod
    async def open(
        cls,
        source: str,
        config: TrainConfig,
        *,
        phase: Phase,
        export_dtype: str = "float32",
        lineage: str = "",
        observer: Observer | None = None,
        num_threads: Callable[[], int] | None = None,
        disk: Disk | None = None,
        deterministic: bool = False,
    ) -> TorchTrainEngine:
        """Load a model folder or hub name. `export_dtype` is the rollout engine's. Raises `ConfigError`.

        `num_threads` is asked before every call that computes, on how many CPU threads; 0 leaves
        the number as it is. Without it, `config.threads` holds. With `deterministic` it is asked
        once, 0 is 1, and torch uses nothing that depends on timing in this process until `aclose`.
        """
        loader = ComputeThread("asyncflow-load")
        try:
            loaded = await loader.run(partial(load_model, source, config.device))
        finally:
            loader.close()
        half = config.dtype == "bfloat16"
        return cls(
            loaded,
            phase,
            half=half,
            export_dtype=export_dtype,
            lineage=lineage,
            observer=observer or NullObserver(),
            num_threads=num_threads or (lambda: config.threads),
            disk=disk or RealDisk(),
            deterministic=deterministic,
        )

    @property
    def version(self) -> PolicyVersion:
        """The weights that the next gradient is taken at; without a fingerprint, which exporting computes."""
        return self._version

    @property
    def last_num_threads(self) -> int:
        """CPU threads that the last `accumulate` or `apply` computed on; 0 before the first.

        To repeat a call bit for bit, compute on as many. It is not exact while a `TorchScorer` of
        this process computes on another number at the same time: MKL knows one for the process.
        """
        return self._last_num_threads

    async def begin_phase(self, phase: Phase) -> None:
        """Go on with a fresh optimizer, no gradients, and version 0 of the same lineage."""

        def begin() -> None:
            with self._weights_lock:  # against an export, which reads the version
                self._version = PolicyVersion(step=0, lineage=self._version.lineage)
                self._begin(phase)

        await self._compute.run(begin)

    async def change_phase(self, phase: Phase) -> None:
        """Go on with other hyperparameters; moments, version and gradients stay as they are."""
        await self._compute.run(partial(self._change, phase))

    async def accumulate(self, batch: MicroBatch, loss: Loss[Tensor]) -> None:
        """Add the un-normalised gradient of `loss` on `batch`.

        A call that is cancelled still adds it, before the cancellation is raised. Raises
        `NonFiniteError`, with no gradient added, when the loss is not a number.
        """
        await self._calls.run("accumulate", partial(self._accumulate, batch, loss))

    async def apply(self, denominator: float) -> StepReport:
        """Divide the gradient by `denominator`, take one optimizer step; the version grows by 1.

        Raises `NonFiniteError`, with the weights untouched, when the gradient is not a number.
        """
        return await self._calls.run("apply", partial(self._apply, denominator))

    async def logprobs(self, batch: MicroBatch) -> FloatArray:
        """Log-probability of every token given those before it in its sample, `[T]`; 0 for the first."""
        return await self._calls.run("logprobs", lambda: self._scorer.logprobs(batch))

    async def export_weights(self) -> WeightsRef:
        """Write the current weights into the channel, in the rollout engine's dtype.

        Holds up an optimizer step only while they are copied, not while they are hashed.
        """
        threads = self._num_threads() or torch.get_num_threads()
        return await self._exports.run(partial(self._export, threads))

    async def fingerprint(self) -> str:
        """A hash of the float32 weights after all calls made so far; equal only if every bit is.

        Exports of another dtype hide small differences; a float32 export has this very fingerprint.
        Optimizer state and gradients do not count.
        """
        return await self._compute.run(self._fingerprint)

    async def save(self, folder: Path) -> None:
        """Write model, tokenizer, optimizer state and version into `folder`, which exists.

        Gradients that no step was taken with are not saved.
        """
        await self._compute.run(partial(self._save, folder))

    async def load(self, folder: Path) -> None:
        """Go back to what `save` wrote, phase included, under the lineage given to `open`.

        Raises `RunFolderError` when it is something else.
        """
        await self._compute.run(partial(self._load, folder))

    async def aclose(self) -> None:
        """Wait for what is being computed, then release threads and channel. May be called twice."""
        if self._is_open:
            self._is_open = False
            with ExitStack() as releases:  # also when this call is cancelled
                for release in (self._held.close, self.channel.close, self._exports.close, self._compute.close):
                    releases.callback(release)
                for thread in (self._compute, self._exports):
                    await thread.run(lambda: None)

    # -- in the compute thread ----------------------------------------------------------------

    def _begin(self, phase: Phase) -> None:
        self._optimizer = Optimizer(self._parameters, phase)
        self._optimizer.forget_gradients()
        self._sums = StepSums()
        self._scorer = self._make_scorer(phase)

    def _change(self, phase: Phase) -> None:
        self._optimizer.change_phase(phase)
        self._scorer = self._make_scorer(phase)

    def _make_scorer(self, phase: Phase) -> Scorer:
        loaded = self._loaded
        return Scorer(
            model=loaded.model,
            forward=loaded.forward,
            temperature=phase.temperature,
            half=self._half,
            alone=self._deterministic,
        )

    def _accumulate(self, batch: MicroBatch, loss: Loss[Tensor]) -> None:
        if batch.num_tokens == 0:  # ranks get equally many micro-batches, so some are empty
            return
        self._last_num_threads = torch.get_num_threads()
        output = loss(self._scorer.inputs(batch, loss))
        self._sums.add(batch, output)
        torch.autograd.backward(output.loss)

    def _apply(self, denominator: float) -> StepReport:
        self._last_num_threads = torch.get_num_threads()
        with self._weights_lock:
            grad_norm, rate = self._optimizer.step(denominator)
            self._version = PolicyVersion(step=self._version.step + 1, lineage=self._version.lineage)
        sums, self._sums = self._sums, StepSums()
        return sums.report(self._version, denominator, grad_norm, rate)

    def _fingerprint(self) -> str:
        bits = {name: ("float32", to_bits(parameter, "float32")) for name, parameter in self._parameters.items()}
        return fingerprint(bits, threads=torch.get_num_threads())

    def _save(self, folder: Path) -> None:
        self._loaded.save_tokenizer(folder)
        state = TrainerState(version=self._version, phase=self._optimizer.phase, phase_steps=self._optimizer.steps)
        write_checkpoint(folder, self._loaded.model, self._optimizer.state(), state, self._disk)

    def _load(self, folder: Path) -> None:
        state, optimizer_state = read_state(folder)
        with self._weights_lock:
            read_weights(folder, self._loaded.model)
            self._begin(state.phase)
            self._optimizer.restore(state.phase_steps, optimizer_state)
            # The lineage is this start's: versions from here on are not those that the saved run went on to.
            self._version = replace(state.version, lineage=self._version.lineage)

    # -- in the export thread -----------------------------------------------------------------

    def _export(self, threads: int) -> WeightsRef:
        with self._weights_lock:
            bits = ((name, to_bits(parameter, self._export_dtype)) for name, parameter in self._parameters.items())
            slot, lineage = self.channel.fill(bits, self._version.step), self._version.lineage
        return self.channel.attest(slot, lineage, threads=threads)
