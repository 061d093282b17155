"""The process that decodes: `python -m asyncflow.engines.rollout.worker SOCKET_FD PARENT_PID`.

One thread, one loop: take messages, do one decode step, send what finished. It blocks on
the socket while there is nothing to decode, and ends when the other side closes it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from asyncflow.core.errors import AsyncFlowError, ConfigError, WeightSyncError
from asyncflow.engines.bit_equal import bit_equal
from asyncflow.engines.channel import Manifest, MemoryChannel
from asyncflow.engines.devices import pick_device
from asyncflow.engines.rollout.decoder import Decoder
from asyncflow.engines.rollout.messages import (
    Abort,
    Alive,
    Busy,
    Close,
    Failed,
    Frames,
    FromWorker,
    Generate,
    LoadWeights,
    Ping,
    Ready,
    Refused,
    Start,
    ToWorker,
    WeightsLive,
    encode,
)
from asyncflow.engines.rollout.model import Weights, check_decoding, context_limit, open_model
from asyncflow.engines.rollout.scheduler import Limits

RECEIVE_BYTES = 1 << 20
PREFILL_TOKENS = 8192
GPU_CACHE_SHARE = 0.5
"""Part of a GPU's memory free at the start that keys and values may take, growth included."""
HOST_CACHE_SHARE = 0.2
"""Part of all the memory of the machine; what is free there changes from moment to moment."""
BUSY_REPORT_S = 0.25
LIFE_SIGN_S = 1.0
"""How often a long step says that it goes on."""
PR_SET_PDEATHSIG = 1


class Link:
    """The worker's end of the socket pair."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._frames = Frames.to_worker()

    def receive(self, *, block: bool) -> list[ToWorker]:
        """Messages that have come; waits for some if `block`. Raises `EOFError` when the other side is gone."""
        try:
            data = self._connection.recv(RECEIVE_BYTES, 0 if block else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        if not data:
            raise EOFError
        return list(self._frames.feed(data))

    def send(self, messages: Sequence[FromWorker]) -> None:
        """Send one frame; waits while the other side does not read."""
        if messages:
            self._connection.sendall(encode(messages))


class LifeSigns:
    """Called in the middle of a long step, when no message can be answered: says now and then that it goes on."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._last_s = 0.0

    def __call__(self) -> None:
        """Work goes on."""
        now_s = time.monotonic()
        if now_s - self._last_s >= LIFE_SIGN_S:
            self._last_s = now_s
            self._link.send([Alive()])


class BusyMeter:
    """Turns decode steps into few, long busy intervals."""

    def __init__(self) -> None:
        self._start_s = 0.0
        self._end_s = 0.0
        self._num_tokens = 0

    def add(self, start_s: float, end_s: float, num_tokens: int) -> None:
        """A step took place."""
        self._start_s = self._start_s or start_s
        self._end_s = end_s
        self._num_tokens += num_tokens

    def report(self, *, is_idle: bool) -> list[Busy]:
        """The interval since the last report, once it is long enough or work has run out."""
        if not self._start_s or not (is_idle or self._end_s - self._start_s >= BUSY_REPORT_S):
            return []
        busy = Busy(start_s=self._start_s, end_s=self._end_s, num_tokens=self._num_tokens)
        self._start_s, self._num_tokens = 0.0, 0
        return [busy]


class Worker:
    """Serves one model over one link."""

    def __init__(self, link: Link, decoder: Decoder, weights: Weights) -> None:
        self._link = link
        self._decoder = decoder
        self._weights = weights
        self._busy = BusyMeter()

    def run(self) -> None:
        """Until `Close`. Raises `EOFError` when the other side is gone."""
        while True:
            for message in self._link.receive(block=self._decoder.is_idle):
                if isinstance(message, Close):
                    return
                self._handle(message)
            if not self._decoder.is_idle:
                self._step()
            self._link.send(self._busy.report(is_idle=self._decoder.is_idle))

    def _step(self) -> None:
        start_s = time.monotonic()
        progress = self._decoder.step()
        self._busy.add(start_s, time.monotonic(), progress.num_tokens)
        self._link.send([*progress.chunks, *progress.finished, *progress.failed])

    def _handle(self, message: ToWorker) -> None:
        match message:
            case Generate():
                self._decoder.submit(message)
            case Abort():
                self._decoder.abort(message.request)
            case LoadWeights():
                self._link.send([self._load(message)])
            case Ping():
                self._link.send([Alive()])
            case _:
                raise ValueError(f"unexpected message {message!r}")

    def _load(self, message: LoadWeights) -> FromWorker:
        start_s = time.monotonic()
        try:
            served = self._weights.load(message.weights)
        except WeightSyncError as error:
            return Failed(request=message.request, kind="weights", reason=str(error))
        self._decoder.change_version(message.weights.version.step)
        return WeightsLive(request=message.request, fingerprint=served, start_s=start_s, end_s=time.monotonic())


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        raise SystemExit(1)


def build(start: Start, link: Link) -> tuple[Worker, Ready]:
    """Open the model and everything around it. Raises `ConfigError`."""
    torch.set_num_threads(start.threads)
    transformers_logging.disable_progress_bar()
    device = pick_device(start.device, "rollout")
    model = open_model(start.model, device, start.dtype)
    check_decoding(model)
    channel = MemoryChannel.attach(start.channel_fd, Manifest.decode(start.manifest)) if start.manifest else None
    limits = Limits(
        max_running=start.max_running, prefill_tokens=PREFILL_TOKENS, cache_tokens=cache_tokens(model, device)
    )
    decoder = Decoder(model, limits, LifeSigns(link), alone=start.deterministic)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return Worker(link, decoder, Weights(model, channel)), Ready(
        device=device, vocabulary=vocabulary, context=context_limit(model)
    )


def cache_tokens(model: PreTrainedModel, device: str) -> int:
    """Tokens whose keys and values fit into the memory set aside for them."""
    if device.startswith("cuda"):
        budget_bytes = torch.cuda.mem_get_info(device)[0] * GPU_CACHE_SHARE
    else:
        budget_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * HOST_CACHE_SHARE
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes: int = 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize
    return int(budget_bytes) // token_bytes


def main(arguments: Sequence[str]) -> int:
    """Serve until told to end; the exit code."""
    connection_fd, parent = map(int, arguments)
    die_with_parent(parent)
    link = Link(socket.socket(fileno=connection_fd))
    try:
        start = link.receive(block=True)[0]
        if not isinstance(start, Start):
            raise AsyncFlowError(f"the first message must be a start, not {start!r}")
        with bit_equal() if start.deterministic else nullcontext():
            worker, ready = build(start, link)
            link.send([ready])
            worker.run()
    except ConfigError as error:
        link.send([Refused(problems=error.problems)])
        return 2
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the engine is gone, so nobody is left to serve
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
