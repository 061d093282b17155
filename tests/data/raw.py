"""A connection to a queue's server that says what it likes."""

from __future__ import annotations

import socket
from collections import deque

from asyncflow.data import messages
from asyncflow.data.arena import Arena
from asyncflow.data.messages import Attach, Frames, Hello, frame, reply_decoder
from tests.data.stores import ThreadServer

_open: list[socket.socket | Arena] = []


def close_all() -> None:
    """What a test left open."""
    while _open:
        _open.pop().close()


class Raw:
    """A connection that says what it likes."""

    def __init__(self, server: ThreadServer, *, greets: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        _open.append(self.socket)
        self.socket.settimeout(10)
        self.socket.connect("\0" + server.address[1:])
        self.frames = Frames(reply_decoder)
        self.replies: deque[messages.AnyReply] = deque()
        if greets:
            self.send(frame(Hello(0, messages.PROTOCOL, "raw")))
            assert isinstance(self.receive(), messages.Welcome)

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self) -> messages.AnyReply | None:
        """The next answer; None where the connection was ended."""
        while not self.replies:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionError:
                return None
            if not data:
                return None
            self.replies += self.frames.feed(data)
        return self.replies.popleft()

    def survives(self, data: bytes, *, is_whole: bool = True) -> bool:
        """Whether the connection is still there after this; if so, it answers."""
        try:
            self.send(data + frame(messages.Ping(-5)) if is_whole else data)
            reply = self.receive() if is_whole else None
            while reply is not None and reply.request != -5:
                reply = self.receive()
        except ConnectionError:
            return False
        return reply is not None

    def attach(self, num_bytes: int = 1 << 16) -> Arena:
        arena = Arena.create(num_bytes, 0)
        _open.append(arena)
        socket.send_fds(self.socket, [frame(Attach(1))], [arena.fd])
        reply = self.receive()
        assert isinstance(reply, messages.Done)
        arena.number = reply.value
        return arena

    def close(self) -> None:
        self.socket.close()
