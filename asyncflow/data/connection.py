"""A client's connection to the queue's server: requests out, answers in, over one socket, blocking.

Answers come in any order, each with the number of its request. One that nobody waits for any
more, because the caller was interrupted, is taken back: rows that it brings are released.
"""

from __future__ import annotations

import array
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import TypeVar

from asyncflow.core import errors
from asyncflow.core.errors import AsyncFlowError, QueueError, QueueLostError
from asyncflow.data.messages import (
    PROTOCOL,
    AnyReply,
    AnyRequest,
    ArenaIs,
    Attach,
    Cancel,
    Done,
    Failed,
    Frames,
    Given,
    Hello,
    Ping,
    Release,
    Welcome,
    frame,
    reply_decoder,
)

PATIENCE_S = 10.0
"""How long a server may say nothing, although asked, before it is taken for lost."""
RECEIVE_BYTES = 1 << 16
MAX_FDS = 4
FDS_BYTES = socket.CMSG_LEN(MAX_FDS * array.array("i").itemsize)

ReplyT = TypeVar("ReplyT", bound=AnyReply)


class Connection:
    """Talks to one server. `on_freed` gets offsets and sizes that may be written over, `on_arena` descriptors."""

    def __init__(
        self,
        address: str,
        name: str,
        *,
        on_freed: Callable[[int, int], None],
        on_arena: Callable[[int, int], None],
    ) -> None:
        self.address = address
        self._on_freed = on_freed
        self._on_arena = on_arena
        self._frames = Frames(reply_decoder)
        self._replies: dict[int, AnyReply] = {}
        self._under_way: dict[int, Callable[[], None]] = {}
        self._abandoned: set[int] = set()
        self._failure: Failed | None = None
        self._num_requests = 0
        self._fds: list[int] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(f"\0{address[1:]}" if address.startswith("@") else address)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _time_value(PATIENCE_S))
            self.welcome = self.ask(Hello(self.next(), PROTOCOL, name), Welcome)
        except OSError as error:
            self._socket.close()
            raise QueueLostError(f"no transfer queue answers at {address}: {error}. Has it ended?") from error
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Hang up: the session is over. May be called twice."""
        self._socket.close()

    def next(self) -> int:
        """The number of a new request."""
        self._num_requests += 1
        return self._num_requests

    def ask(self, message: AnyRequest, kind: type[ReplyT]) -> ReplyT:
        """Send a request that is answered at once, or as soon as the log allows it. Raises what the server says."""
        self._send(message)
        return self._wait(message.request, kind)

    def ask_parked(self, message: AnyRequest, kind: type[ReplyT], timeout_s: float | None) -> ReplyT | None:
        """The answer to a request that may wait; None when it took longer than `timeout_s`."""
        self.post(message)
        return self.wait_parked(message.request, kind, timeout_s)

    def post(self, message: AnyRequest, *, after: AnyRequest | None = None) -> None:
        """Send a request that may wait, to be waited for later.

        One to be done before it, `after` which it comes, travels with it; what that fails for, a later call raises.
        """
        if after is None:
            self._send(message)
        else:
            self._under_way[after.request] = _nothing
            self._send(after, message)

    def wait_parked(self, request: int, kind: type[ReplyT], timeout_s: float | None) -> ReplyT | None:
        """The answer to what was posted; None when it took longer than `timeout_s`, and the request is taken back."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            while request not in self._replies:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    if self.ask(Cancel(self.next(), request), Done).value:
                        return None
                    break  # it was granted: the answer is there, or comes once it is on the disk
                self._receive_or_ping(left)
        except KeyboardInterrupt:
            self.withdraw(request)
            raise
        self._raise_failure()
        return self._wait(request, kind)

    def withdraw(self, request: int) -> None:
        """Take back what was posted: rows that were given to it meanwhile are released."""
        reply = self._replies.pop(request, None)
        if reply is None:
            self._abandoned.add(request)
            self._send(Cancel(self.next(), request))
        else:
            self._refuse(reply)

    def begin(self, message: AnyRequest, on_failure: Callable[[], None], *, window: int) -> None:
        """Send a request whose answer is not waited for, unless `window` of them are under way.

        Raises what an earlier one failed for.
        """
        self._under_way[message.request] = on_failure
        self._send(message)
        while len(self._under_way) >= window:
            self._receive_answer()
        self._raise_failure()

    def flush(self) -> None:
        """Wait for the answers of all that `begin` sent. Raises what one failed for."""
        while self._under_way:
            self._receive_answer()
        self._raise_failure()

    def attach(self, fd: int) -> int:
        """Hand over an arena; its number."""
        request = self.next()
        try:
            socket.send_fds(self._socket, [frame(Attach(request))], [fd])
        except OSError as error:
            raise self._lost(error) from error
        return self._wait(request, Done).value

    # -- inside ------------------------------------------------------------------------------

    def _send(self, *messages: AnyRequest) -> None:
        try:
            self._socket.sendall(b"".join(map(frame, messages)))
        except OSError as error:
            raise self._lost(error) from error

    def _wait(self, request: int, kind: type[ReplyT]) -> ReplyT:
        while request not in self._replies:
            self._receive_answer()
        reply = self._replies.pop(request)
        if isinstance(reply, Failed):
            raise _error(reply)
        if not isinstance(reply, kind):
            raise QueueLostError(f"the server answered {type(reply).__name__} where {kind.__name__} was expected")
        return reply

    def _receive_or_ping(self, limit_s: float | None) -> None:
        """Take in what comes, within a limit; when nothing came for long, ask whether the server is still there."""
        if limit_s is not None and not select.select([self._socket], [], [], min(limit_s, PATIENCE_S))[0]:
            return
        if not self._receive():
            self.ask(Ping(self.next()), Done)

    def _receive_answer(self) -> None:
        """Take in what comes. Raises `QueueLostError` when nothing does for long."""
        if not self._receive():
            raise QueueLostError(
                f"the transfer queue's server (process {self.welcome.pid}) has not answered "
                f"for {PATIENCE_S:g} s: is it stopped, or its disk?"
            )

    def _receive(self) -> bool:
        """Take in what comes within the system's time limit for this socket; false when nothing did."""
        try:
            data, ancillary, _, _ = self._socket.recvmsg(RECEIVE_BYTES, FDS_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._lost(error) from error
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds += array.array("i", content)
        if not data:
            raise self._lost(None)
        for reply in self._frames.feed(data):
            self._accept(reply)
        return True

    def _accept(self, reply: AnyReply) -> None:
        request = reply.request
        if isinstance(reply, ArenaIs):
            self._on_arena(reply.number, self._fds.pop(0))
            return
        if isinstance(reply, Done):
            for offset, num_bytes in reply.freed:
                self._on_freed(offset, num_bytes)
        on_failure = self._under_way.pop(request, None)
        if on_failure is not None:
            if isinstance(reply, Failed):
                on_failure()
                self._failure = self._failure or reply
        elif request in self._abandoned:
            self._abandoned.discard(request)
            self._refuse(reply)
        else:
            self._replies[request] = reply

    def _refuse(self, reply: AnyReply) -> None:
        if isinstance(reply, Given) and reply.count:
            self._send(Release(self.next(), reply.request))

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise _error(failure)

    def _lost(self, error: OSError | None) -> QueueLostError:
        reason = f": {error}" if error else ""
        return QueueLostError(
            f"the transfer queue at {self.address} has ended{reason}. What was put and not taken is in its log, where "
            "it has one"
        )


def _time_value(seconds: float) -> bytes:
    """A `struct timeval`."""
    whole = int(seconds)
    return struct.pack("ll", whole, int(1e6 * (seconds - whole)))


def _nothing() -> None:
    """Nothing is to be undone."""


def _error(failure: Failed) -> Exception:
    """The error that the server names, of the same kind."""
    kind = getattr(errors, failure.kind, QueueError)
    return kind(failure.reason) if issubclass(kind, AsyncFlowError) else QueueError(failure.reason)
