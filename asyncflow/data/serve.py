"""The process of a queue's server: `python -m asyncflow.data.serve FD`.

Settings come over the descriptor as one line of JSON, the address goes back as another, and
when the owner closes its end, or ends, the server does too.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

import msgspec

from asyncflow.core.errors import AsyncFlowError
from asyncflow.data.ledger import QueueTask
from asyncflow.data.log import FileLog, Log, NoLog
from asyncflow.data.restore import open_control
from asyncflow.data.server import Server
from asyncflow.data.server_process import ServerSettings, Started, read_line


async def serve(settings: ServerSettings, link: socket.socket) -> None:
    """Serve until the owner's end of the link is closed, or the log can't be written."""
    over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(error: Exception) -> None:
        """Say so before the clients see an end: here, to the owner, and to who reads what this process says."""
        if not over.done():
            tell(link, Started(error=str(error)))
            with suppress(OSError):  # it may go to the disk that is full
                sys.stderr.write(f"the transfer queue's server ends: {error}\n")
            over.set_exception(error)

    def end() -> None:
        if not over.done():
            over.set_result(None)

    folder = Path(settings.log) if settings.log else None
    log: Log = FileLog.open(folder, mode=settings.log_mode, on_failure=fail) if folder else NoLog()
    tasks = [QueueTask(name=name, needs=need, trains=name == settings.trains) for name, need in settings.tasks.items()]
    server = Server(open_control(tasks, settings.gate, log, folder))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, end)
    loop.add_reader(link, end)
    link.sendall(msgspec.json.encode(Started(address=server.address)) + b"\n")
    try:
        await over
    finally:
        loop.remove_reader(link)
        server.close()
        await log.aclose()


def main() -> None:
    """Run a server."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's affair, whose end ends us
    link = socket.socket(fileno=int(sys.argv[1]))
    try:
        settings = msgspec.json.decode(read_line(link), type=ServerSettings)
        asyncio.run(serve(settings, link))
    except AsyncFlowError as error:
        tell(link, Started(error=str(error)))
        sys.exit(1)


def tell(link: socket.socket, news: Started) -> None:
    """Let the owner know, if there is one."""
    with suppress(OSError):
        link.sendall(msgspec.json.encode(news) + b"\n")


if __name__ == "__main__":
    main()
