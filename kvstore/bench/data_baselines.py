"""What the data plane is compared with: a raw socket that moves the same bytes, and a server that only answers.

`python -m kvstore.bench.data_baselines socket|echo READY ...` is the other process. It writes where it listens to the
file READY, and ends with its parent.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket  # noqa: TID251 - a baseline
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np

from kvstore.auth import Authenticator, load_policy
from kvstore.checksum import xxh3
from kvstore.machine.spawn import LocalProcess, LocalSpawner
from kvstore.machine.system import RealClock
from kvstore.transport.base import CallContext
from kvstore.transport.rpc import GrpcTransport
from kvstore.wire import common_pb2, coordinator_pb2

POLL_S = 0.02
START_S = 30.0
GET, PUT, CHECKED = b"G", b"P", b"C"


class Child:
    """This module as a child process. `close` it."""

    def __init__(self, process: LocalProcess, ready: Path) -> None:
        self._process, self._ready = process, ready
        self.address = ""

    @classmethod
    async def start(cls, folder: str, role: str, *flags: str) -> Child:
        """Listening when it returns. AssertionError with its log when it does not."""
        ready, log = Path(folder) / f"{role}.ready", str(Path(folder) / f"{role}.log")
        argv = [sys.executable, "-m", "kvstore.bench.data_baselines", role, str(ready), *flags]
        made = cls(LocalSpawner().spawn(argv, log=log, env=dict(os.environ)), ready)
        for _ in range(int(START_S / POLL_S)):
            if ready.exists():
                made.address = json.loads(ready.read_text())["address"]
                return made
            if not made._process.alive():
                break
            await asyncio.sleep(POLL_S)
        made.close()
        raise AssertionError(f"the baseline did not start: {Path(log).read_text()}")

    def close(self) -> None:
        self._process.terminate(1.0)
        self._ready.unlink(missing_ok=True)


def _say(ready: str, address: str) -> None:
    path = Path(ready)
    path.with_suffix(".new").write_text(json.dumps({"address": address}))
    path.with_suffix(".new").rename(path)


# --- a raw socket --------------------------------------------------------------------------------------------------


class RawSocket:
    """The client: whole slices of blocks, `recv_into` and `sendall`, nothing checked."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def get(self, first: int, targets: Sequence[memoryview]) -> None:
        """The server's blocks `first`.. into `targets`."""
        self._socket.sendall(GET + bytes([first // len(targets)]))
        for target in targets:
            _fill(self._socket, target)

    def get_checked(self, first: int, targets: Sequence[memoryview]) -> None:
        """`get` with a checksum before each block, verified here: as a data channel of our own beside gRPC would."""
        self._socket.sendall(CHECKED + bytes([first // len(targets)]))
        told = memoryview(bytearray(8))
        for target in targets:
            _fill(self._socket, told)
            _fill(self._socket, target)
            assert xxh3(target) == int.from_bytes(told, "little")

    def put(self, first: int, sources: Sequence[memoryview]) -> None:
        """Over the server's blocks `first`..; it says when it has them."""
        self._socket.sendall(PUT + bytes([first // len(sources)]))
        for source in sources:
            self._socket.sendall(source)
        answer = bytearray(1)
        _fill(self._socket, memoryview(answer))

    def close(self) -> None:
        self._socket.close()


def _fill(source: socket.socket, target: memoryview) -> bool:
    """Whether it was filled before the peer hung up."""
    done = 0
    while done < len(target):
        got = source.recv_into(target[done:])
        if not got:
            return False
        done += got
    return True


def serve_socket(ready: str, block_bytes: int, together: int, count: int) -> None:
    """`count` blocks, `together` at a time."""
    blocks = [memoryview(np.full(block_bytes, index % 251, np.uint8).data).cast("B") for index in range(count)]
    listener = socket.create_server(("127.0.0.1", 0))
    _say(ready, f"127.0.0.1:{listener.getsockname()[1]}")
    peer, _ = listener.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    order = bytearray(2)
    while _fill(peer, memoryview(order)):
        mine = blocks[order[1] * together : (order[1] + 1) * together]
        if order[:1] in (GET, CHECKED):
            for block in mine:
                if order[:1] == CHECKED:
                    peer.sendall(xxh3(block).to_bytes(8, "little"))
                peer.sendall(block)
        else:
            for block in mine:
                _fill(peer, block)
            peer.sendall(b".")


# --- a server that only answers ------------------------------------------------------------------------------------


class Echo:
    """The coordinator's calls on its own server stack: a fixed answer, and announcements that are dropped."""

    def __init__(self, reply: common_pb2.MatchReply) -> None:
        self._reply = reply

    async def match(self, request: common_pb2.MatchRequest, context: CallContext) -> common_pb2.MatchReply:
        return self._reply

    async def announce(
        self, requests: AsyncIterator[coordinator_pb2.AnnounceRequest], context: CallContext
    ) -> AsyncIterator[coordinator_pb2.AnnounceReply]:
        async for request in requests:
            if not request.HasField("delta"):  # as a coordinator, which answers registrations and heartbeats
                yield coordinator_pb2.AnnounceReply(ack=coordinator_pb2.Ack())


async def serve_echo(ready: str, reply_file: str) -> None:
    """Every Match is answered with the MatchReply of a file."""
    reply = common_pb2.MatchReply.FromString(Path(reply_file).read_bytes())
    auth = Authenticator(load_policy(), os.getuid())
    server = await GrpcTransport(RealClock()).serve("127.0.0.1:0", {"Coordinator": Echo(reply)}, auth)
    _say(ready, server.address)
    await asyncio.Event().wait()


def main(argv: Sequence[str]) -> None:
    role, ready, *rest = argv
    if role == "socket":
        serve_socket(ready, *map(int, rest))
    else:
        asyncio.run(serve_echo(ready, *rest))


if __name__ == "__main__":
    main(sys.argv[1:])
