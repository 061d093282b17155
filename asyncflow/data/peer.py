"""Who is at the other end of a local socket, as the system says."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple


class Peer(NamedTuple):
    """A process."""

    pid: int
    user: int


def peer(connection: socket.socket) -> Peer:
    """The process that connected."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, user, _ = struct.unpack("3i", data)
    return Peer(pid, user)
