"""The queue's server: the control plane for other processes on this machine, over a local socket.

It listens on a socket without a name in any file system, which ends with the process, and
serves only processes of the same user. A client's end is the end of its session: what it had
taken is offered again.

`asyncflow.data.serve` runs it in a process of its own.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Callable, Sequence

from asyncflow.core.errors import AsyncFlowError, LedgerError, QueueError, QueueLostError
from asyncflow.core.types import PolicyVersion, Ticket
from asyncflow.data.arena import Arena
from asyncflow.data.control import ControlPlane
from asyncflow.data.directory import Extent, Source
from asyncflow.data.leases import EXPIRED
from asyncflow.data.messages import (
    PROTOCOL,
    Accounts,
    Acknowledge,
    Advance,
    AnyReply,
    AnyRequest,
    ArenaIs,
    Attach,
    BeginStep,
    Cancel,
    Clear,
    Counts,
    Dispatch,
    Done,
    Drop,
    Failed,
    Fetch,
    Finish,
    Frames,
    Given,
    Hello,
    NotUnderstoodError,
    Ping,
    Put,
    Release,
    Reserve,
    Room,
    Settled,
    Take,
    Welcome,
    Write,
    frame,
    request_decoder,
)
from asyncflow.data.records import read_rows, read_tickets, row_bytes, ticket_bytes
from asyncflow.data.server_process import peer
from asyncflow.data.sessions import ParkedReserve, ParkedTake, Taken

RECEIVE_BYTES = 1 << 16
MAX_OUTBOX_BYTES = 1 << 26
MAX_FDS = 4
BACKLOG = 128
ACCEPT_AGAIN_S = 0.5
"""After it had no descriptor for a new client."""


class Server:
    """Accepts clients and answers them from a control plane. Lives on the running event loop."""

    def __init__(self, control: ControlPlane, *, name: str = "") -> None:
        self.control = control
        self.address = f"@asyncflow-{name or secrets.token_hex(12)}"
        self._loop = asyncio.get_running_loop()
        self._clients: set[Client] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._listener.bind("\0" + self.address[1:])
        self._listener.listen(BACKLOG)
        self._pause: asyncio.TimerHandle | None = None
        self._listen()

    def close(self) -> None:
        """End every connection. May be called twice."""
        if self._listener.fileno() >= 0:
            if self._pause is not None:
                self._pause.cancel()
            self._loop.remove_reader(self._listener)
            self._listener.close()
        for client in list(self._clients):
            client.close()

    def _listen(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # gone again
            return
        except OSError:  # out of descriptors or memory: who waits there would be announced without end
            self._loop.remove_reader(self._listener)
            self._pause = self._loop.call_later(ACCEPT_AGAIN_S, self._listen)
            return
        if peer(connection).user not in (os.getuid(), 0):
            connection.close()
            return
        self._clients.add(Client(self.control, connection, self._loop, self._clients.discard))


class Client:
    """One connection, which is one session."""

    def __init__(
        self,
        control: ControlPlane,
        connection: socket.socket,
        loop: asyncio.AbstractEventLoop,
        on_closed: Callable[[Client], None],
    ) -> None:
        connection.setblocking(False)
        self._control = control
        self._socket = connection
        self._loop = loop
        self._on_closed = on_closed
        self._frames = Frames(request_decoder)
        self._session = control.open_session(f"process {peer(connection).pid}", self._free)
        self._outbox = bytearray()
        self._is_open = True
        self._is_busy = self._is_writing = self._has_greeted = False
        self._fds: list[int] = []
        self._freed: list[tuple[int, int]] = []
        self._rooms: list[int] = []
        self._parked: dict[int, ParkedTake | ParkedReserve] = {}
        self._known_arenas: set[int] = set()
        loop.add_reader(connection, self._read)

    def close(self) -> None:
        """End it: the session with it. May be called twice."""
        if not self._is_open:
            return
        self._is_open = False
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        for fd in self._fds:
            os.close(fd)
        self._control.close_session(self._session)
        self._on_closed(self)

    # -- bytes -------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            if self._session.arena is None:  # which may be about to come
                data, fds, _, _ = socket.recv_fds(self._socket, RECEIVE_BYTES, MAX_FDS)
            else:
                data, fds = self._socket.recv(RECEIVE_BYTES), []
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        self._fds += fds
        if not data or len(self._fds) > MAX_FDS:
            self.close()
            return
        self._is_busy = True  # replies are gathered and sent together
        try:
            for message in self._frames.feed(data):
                self._handle(message)
        except QueueLostError as error:
            if isinstance(error, NotUnderstoodError) and error.request >= 0:
                self._fail(error.request, QueueError(f"{error}"))
            self._flush()
            self.close()
            return
        finally:
            self._is_busy = False
        self._flush()

    def _send(self, message: AnyReply) -> None:
        if self._is_open:
            self._outbox += frame(message)
            if not self._is_busy:
                self._flush()

    def _flush(self) -> None:
        if not self._outbox or not self._is_open:
            return
        try:
            sent = self._socket.send(self._outbox)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._loop.call_soon(self.close)
            return
        del self._outbox[:sent]
        if len(self._outbox) > MAX_OUTBOX_BYTES:  # it does not read its answers
            self._loop.call_soon(self.close)
        elif self._outbox and not self._is_writing:
            self._loop.add_writer(self._socket, self._flush)
            self._is_writing = True
        elif self._is_writing and not self._outbox:
            self._loop.remove_writer(self._socket)
            self._is_writing = False

    def _send_arenas(self, sources: Sequence[Source]) -> None:
        """Hand over the arenas in which rows lie, each once."""
        numbers = {piece.extent.arena for source in sources for piece in source.pieces} - self._known_arenas
        for number in sorted(numbers):
            self._flush()
            if self._outbox:
                raise QueueError("the client does not read its answers")
            self._known_arenas.add(number)
            socket.send_fds(self._socket, [frame(ArenaIs(0, number))], [self._control.memory.arena(number).fd])

    # -- messages ----------------------------------------------------------------------------

    def _handle(self, message: AnyRequest) -> None:
        if not self._has_greeted and not isinstance(message, Hello):
            raise QueueLostError("the first message must be a greeting")
        try:
            self._answer(message)
        except (QueueError, LedgerError) as error:
            self._fail(message.request, error)
        except ValueError as error:  # arrays that do not belong together
            self._fail(message.request, QueueError(str(error)))
        except Exception as error:  # noqa: BLE001 - one client's message must not end the others
            what = f"the queue's server failed at {type(message).__name__}"
            self._loop.call_exception_handler({"message": what, "exception": error})
            self._fail(message.request, QueueError(f"{what}: {type(error).__name__}: {error}"))
            self._loop.call_soon(self.close)

    def _fail(self, request: int, error: AsyncFlowError) -> None:
        self._send(Failed(request, type(error).__name__, str(error)))

    def _answer(self, message: AnyRequest) -> None:
        control, session, request = self._control, self._session, message.request
        match message:
            case Put(_, ticket, count, group_size, extent, columns):
                reserved = None if ticket < 0 else ticket
                control.put(
                    session, reserved, count, group_size, extent, columns, lambda first: self._done(request, first)
                )
            case Take(_, task, max_groups, at_least):
                self._take(message, task, max(1, max_groups), max(1, at_least))
            case Acknowledge(_, lease, step, batches, threads):
                rows = [read_rows(batch, control.generation) for batch in batches]
                control.acknowledge(
                    session, lease, lambda: self._done(request), step=step, batches=rows, threads=threads
                )
            case Write(_, rows, generation, extent, columns, missing_ok):
                handle = read_rows(rows, generation)
                control.write(session, handle, extent, columns, lambda n: self._done(request, n), missing_ok=missing_ok)
            case Fetch(_, rows, generation, names):
                sources = control.locate(read_rows(rows, generation), names)
                self._send_arenas(sources)
                self._send(Given(request, 0, 0, 1, b"", b"", sources))
            case Reserve():
                parked = control.reserve(session, lambda ticket: self._granted(request, ticket))
                self._parked[request] = parked
            case Room():
                self._rooms.append(request)
                self._grant_room()
            case Release(_, lease):
                control.release(session, lease)
                self._done_when_safe(request)
            case Drop(_, tickets, reason):
                control.drop(session, read_tickets(tickets), reason)
                self._done_when_safe(request)
            case _:
                self._answer_rare(message)

    def _answer_rare(self, message: AnyRequest) -> None:
        control, request = self._control, message.request
        match message:
            case Hello(_, protocol, _):
                self._greet(request, protocol)
            case Attach():
                self._attach(request)
            case Settled():
                control.when_settled(lambda: self._done(request))
            case Counts():
                counts = control.counts()
                self._send(Accounts(request, counts.admitted, counts.trained, dict(counts.dropped), counts.pending))
            case Ping():
                self._done(request)
            case Cancel(_, other):
                self._done(request, int(self._cancel(other)))
            case _:
                self._note(message)
                self._done_when_safe(request)

    def _note(self, message: AnyRequest) -> None:
        """What is answered as soon as it is safe."""
        control = self._control
        match message:
            case Dispatch(_, ticket, prompt, num_tokens):
                control.dispatch(ticket, prompt, num_tokens)
            case Advance(_, step, lineage, fingerprint):
                control.advance(PolicyVersion(step=step, lineage=lineage, fingerprint=fingerprint))
            case BeginStep(_, step):
                control.begin_step(step)
            case Finish():
                control.finish()
            case Clear():
                control.clear()
            case _:
                raise QueueError(f"{type(message).__name__} is not understood here")

    def _greet(self, request: int, protocol: int) -> None:
        if protocol != PROTOCOL:
            raise QueueError(f"this server speaks protocol {PROTOCOL}, the client {protocol}: use the same asyncflow")
        self._has_greeted = True
        trains = next((name for name, task in self._control.ledger.tasks.items() if task.trains), "")
        self._send(Welcome(request, self._control.generation, dict(self._control.tasks()), trains, os.getpid()))

    def _attach(self, request: int) -> None:
        if not self._fds:
            raise QueueError("an arena was announced and did not come")
        fd = self._fds.pop(0)
        if self._session.arena is not None:
            os.close(fd)
        arena = self._control.memory.attach(self._session, lambda number: Arena.attach(fd, number))
        self._known_arenas.add(arena.number)
        self._done(request, arena.number)

    def _take(self, message: Take, task: str, max_groups: int, at_least: int) -> None:
        request = message.request
        lease = self._control.leases.open(self._session, task, request)
        parked = self._control.leases.take(
            self._session, lease, lambda taken: self._given(message, taken), max_groups=max_groups, at_least=at_least
        )
        if parked is not None:
            self._parked[request] = parked

    def _given(self, message: Take, taken: Taken) -> None:
        request = message.request
        self._parked.pop(request, None)
        if not self._is_open:
            return
        try:
            self._send_arenas(taken.sources)
        except (QueueError, OSError):
            self._loop.call_soon(self.close)
            return
        tickets, size = taken.tickets, taken.group_size
        if isinstance(tickets, range):
            self._send(Given(request, tickets.start, len(tickets), size, b"", b"", taken.sources))
        elif size:
            self._send(Given(request, 0, len(tickets), size, ticket_bytes(tickets), b"", taken.sources))
        else:
            rows = row_bytes(self._control.rows_of(tickets))
            self._send(Given(request, 0, len(tickets), 0, rows.tickets, rows.indices, taken.sources))
        if not len(tickets):
            self._session.leases.pop(request, None)
        elif message.lease_s > 0:
            self._loop.call_later(message.lease_s, self._expire, request)

    def _expire(self, lease: int) -> None:
        """Its time is up: unless it is over already, others are offered what it holds."""
        if self._is_open and lease in self._session.leases:
            self._control.release(self._session, lease, EXPIRED)

    def _granted(self, request: int, ticket: Ticket) -> None:
        self._parked.pop(request, None)
        self._done(request, ticket)

    def _cancel(self, other: int) -> bool:
        """Whether it was still parked; if not, its answer was sent or is under way."""
        if other in self._rooms:
            self._rooms.remove(other)
            return True
        parked = self._parked.get(other)
        if parked is None or not self._control.cancel(parked):
            return False
        del self._parked[other]
        if isinstance(parked, ParkedTake):
            self._session.leases.pop(other, None)
        return True

    def _done_when_safe(self, request: int) -> None:
        self._control.journal.when_safe(lambda: self._done(request))

    def _done(self, request: int, value: int = 0) -> None:
        freed, self._freed = tuple(self._freed), []
        self._send(Done(request, value, freed))

    def _free(self, extent: Extent) -> None:
        self._freed.append((extent.offset, extent.num_bytes))
        self._grant_room()

    def _grant_room(self) -> None:
        if self._rooms and self._freed:
            self._done(self._rooms.pop(0))
