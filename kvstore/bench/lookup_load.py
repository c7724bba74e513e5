"""Load on a coordinator, or on the echo beside it: processes that ask, and one that announces.

`python -m kvstore.bench.lookup_load ask|announce ADDRESS...` obeys lines of JSON: {"at": an address, "seconds": s}.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.convert import delta_to_wire, spec_to_wire
from kvstore.directory.announce import Delta
from kvstore.directory.runs import RemovedRun, Run
from kvstore.machine.system import RealClock
from kvstore.spec import Group, ModelSpec, Shard
from kvstore.transport.base import Channel, Credentials
from kvstore.transport.methods import COORDINATOR
from kvstore.transport.rpc import GrpcTransport
from kvstore.types import KEY_BYTES, Fidelity, Keys, Tier
from kvstore.wire import common_pb2, coordinator_pb2
from kvstore.wireform import shard_to_wire

SPEC = ModelSpec(model="bench/lookup", groups=(Group(layers=1, kv_heads=1, k_dim=4, v_dim=4),), block_tokens=64)
WHOLE = Shard.whole(SPEC)
RUN_BLOCKS, MESSAGE_RUNS = 32, 32
POOL_RUNS = 4096  # announced and removed again, over and over
TIMEOUT_S = 10.0
START_S = 60.0
BEAT_S = 0.3


class LoadChild:
    """One process of this module. `close` it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, role: str, *rest: str) -> LoadChild:
        argv = [sys.executable, "-m", "kvstore.bench.lookup_load", role, *rest]
        pipe = asyncio.subprocess.PIPE
        made = cls(await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe, limit=1 << 24))
        await made.answer()
        return made

    def tell(self, **order: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")

    async def answer(self) -> Any:
        assert self._process.stdout is not None
        async with asyncio.timeout(START_S):
            line = await self._process.stdout.readline()
        assert line, "a process of the load has ended"
        return json.loads(line)

    async def close(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


async def _orders() -> AsyncIterator[dict[str, Any]]:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    _say({})
    while line := await reader.readline():
        yield json.loads(line)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


async def ask(request_file: str, addresses: Sequence[str]) -> None:
    """The same Match, again and again, one at a time."""
    request = common_pb2.MatchRequest.FromString(Path(request_file).read_bytes())
    transport, now = GrpcTransport(RealClock()), RealClock().monotonic
    channels = [await transport.connect(address, Credentials()) for address in addresses]
    expected = len(request.keys) // KEY_BYTES
    async for order in _orders():
        channel, end = channels[order["at"]], now() + order["seconds"]
        took = []
        while (begin := now()) < end:
            reply = await channel.unary(COORDINATOR["Match"], request, timeout_s=TIMEOUT_S)
            took.append(now() - begin)
            assert reply.blocks == expected, f"{reply.blocks} of {expected} blocks"
        _say({"took": took})


class Announced:
    """A worker that announces a pool of runs and takes them back, over and over. Numbers never repeat."""

    def __init__(self) -> None:
        rng = np.random.Generator(np.random.PCG64(9))
        self._pool = [Keys(rng.bytes(RUN_BLOCKS * KEY_BYTES)) for _ in range(POOL_RUNS)]
        self._turn, self.seq = 0, 0

    def delta(self) -> coordinator_pb2.AnnounceRequest:
        """The next message: `MESSAGE_RUNS` runs. Mutates."""
        changes: list[Run | RemovedRun] = []
        for _ in range(MESSAGE_RUNS):
            round_, at = divmod(self._turn, POOL_RUNS)
            self._turn += 1
            keys = self._pool[at]
            if round_ % 2:
                changes.append(RemovedRun(WHOLE.digest, keys))
            else:
                root = SPEC.root
                changes.append(Run(root, WHOLE.digest, Tier.HOT, Fidelity.EXACT, root, 0, keys, keys[0], 1 << 16))
        first, self.seq = self.seq + 1, self.seq + RUN_BLOCKS * MESSAGE_RUNS
        shard = common_pb2.DictionaryEntry(shard=shard_to_wire(WHOLE))
        message = delta_to_wire("default", Delta(first, self.seq, tuple(changes)), [spec_to_wire(SPEC), shard])
        return coordinator_pb2.AnnounceRequest(delta=message)


async def announce(rate: float, addresses: Sequence[str]) -> None:
    """`rate` block updates a second to the address of an order, for its time."""
    transport, clock = GrpcTransport(RealClock()), RealClock()
    streams = []
    for address in addresses:
        streams.append(Stream(await transport.connect(address, Credentials()), rate, clock))
    for stream in streams:
        await stream.begun()
    async for order in _orders():
        _say({"sent": await streams[order["at"]].send(order["seconds"])})


class Stream:
    """One Announce stream, and what is put into it."""

    def __init__(self, channel: Channel, rate: float, clock: RealClock) -> None:
        self._announced, self._rate, self._now = Announced(), rate, clock.monotonic
        self._queue: asyncio.Queue[coordinator_pb2.AnnounceRequest] = asyncio.Queue(4)
        self._welcome = asyncio.Event()
        self._reading = asyncio.ensure_future(self._read(channel))

    async def _requests(self) -> AsyncIterator[coordinator_pb2.AnnounceRequest]:
        member = common_pb2.Member(id="bench-updates", epoch=1, address="127.0.0.1:1", host="nowhere")
        yield coordinator_pb2.AnnounceRequest(register=coordinator_pb2.Register(member=member, heads={"default": 0}))
        sent, beat_at = 0, 0.0
        while True:
            message = None if self._now() >= beat_at else await self._next(beat_at - self._now())
            if message is None:
                message = coordinator_pb2.AnnounceRequest(heartbeat=coordinator_pb2.Heartbeat(heads={"default": sent}))
                beat_at = self._now() + BEAT_S
            else:
                sent = message.delta.last_seq
            yield message

    async def _next(self, wait_s: float) -> coordinator_pb2.AnnounceRequest | None:
        try:
            async with asyncio.timeout(wait_s):
                return await self._queue.get()
        except TimeoutError:
            return None

    async def _read(self, channel: Channel) -> None:
        stream = channel.stream(COORDINATOR["Announce"], self._requests(), timeout_s=None)
        async with aclosing(stream) as replies:
            async for reply in replies:
                assert not reply.HasField("snapshot_request"), "an announced block was lost"
                self._welcome.set()

    async def begun(self) -> None:
        """Registered (an echo says nothing to that before the first heartbeat)."""
        await self._while_read(self._welcome.wait())

    async def _while_read(self, waiting: Coroutine[Any, Any, Any]) -> None:
        """Wait for it, unless the stream ends first: AssertionError, or what it has failed with."""
        task = asyncio.ensure_future(waiting)
        await asyncio.wait((task, self._reading), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await self._reading
            raise AssertionError("the stream of announcements has ended")

    async def send(self, seconds: float) -> int:
        """Block updates that were taken: fewer than asked for where the server is too slow."""
        begin, sent = self._now(), 0
        while (passed := self._now() - begin) < seconds:
            due = int(passed * self._rate)
            if sent < due:
                await self._while_read(self._queue.put(self._announced.delta()))
                sent += RUN_BLOCKS * MESSAGE_RUNS
            else:
                await asyncio.sleep((sent - due) / self._rate + 0.001)
        return sent


def main(argv: Sequence[str]) -> None:
    role, first, *addresses = argv
    asyncio.run(ask(first, addresses) if role == "ask" else announce(float(first), addresses))


if __name__ == "__main__":
    main(sys.argv[1:])
