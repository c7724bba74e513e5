"""What the parts of `bench recovery` share: a cluster with copies, prompts, a load that checks every byte."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import numpy as np

from kvstore.client.kv_client import KVClient
from kvstore.client.plan import is_redis
from kvstore.config import ClientConfig, Config, override
from kvstore.errors import KVStoreError, SetupError
from kvstore.fleet.local_cluster import LocalCluster
from kvstore.keys import Chain, chain
from kvstore.machine.system import RealClock, real_system
from kvstore.operations.payload import Payload, replay_spec, tokens_of
from kvstore.spec import ModelSpec
from kvstore.transport.base import Channel, Credentials
from kvstore.transport.methods import WORKER
from kvstore.transport.rpc import GrpcTransport
from kvstore.wire import common_pb2

LEASE_S, HEARTBEAT_S = 1.5, 0.25
WAIT_S = 30.0
GET_S = 1.0  # deadline of a get: a holder that stands still costs a share of it
POLL_S = 0.005
now = RealClock().monotonic


@dataclass(slots=True)
class Work:
    """Prompts of blocks of one size, whose bytes are a function of their key."""

    spec: ModelSpec
    payload: Payload
    prompts: list[Chain]

    @classmethod
    def of(cls, block_bytes: int, blocks: int, count: int, first: int = 0, revision: str = "") -> Work:
        """`revision` of the model: the same tokens have other blocks."""
        spec = replace(replay_spec(block_bytes), revision=revision)
        ids = [tuple(first + number * blocks + depth for depth in range(blocks)) for number in range(count)]
        return cls(spec, Payload(block_bytes), [chain(spec, tokens_of(prompt)) for prompt in ids])

    @property
    def nbytes(self) -> int:
        """Of one prompt."""
        return self.payload.block_bytes * len(self.prompts[0])

    async def put(self, by: KVClient) -> None:
        for prompt in self.prompts:
            states = (await by.put(self.spec, prompt, [self.payload.make(key) for key in prompt.keys])).states
            if set(states) - {"committed", "held"}:
                raise SetupError(f"blocks were not stored: {states}, {dict(by.counters)}")

    async def get(self, by: KVClient, prompt: Chain) -> tuple[int, Sequence[object]]:
        """Blocks that came, and their buffers."""
        plan = await by.match(self.spec, prompt)
        if not plan.blocks:
            return 0, ()
        got = await by.get(plan)
        return got.blocks, got.buffers[0]

    def wrong(self, prompt: Chain, blocks: int, buffers: Sequence[object]) -> int:
        """Blocks that are not what was put. Pure."""
        pairs = zip(prompt.keys[:blocks], buffers, strict=False)
        return sum(not self.payload.check(key, np.asarray(buffer).view(np.uint8)) for key, buffer in pairs)

    async def holders(self, by: KVClient, prompt: Chain) -> dict[str, int]:
        """Workers that a coordinator names, with the blocks each has."""
        found: dict[str, int] = {}
        for run in (await by.match(self.spec, prompt)).runs:
            if not is_redis(run.holder):
                found[run.holder] = found.get(run.holder, 0) + run.count
        return found


@dataclass(slots=True)
class Load:
    """Drivers that ask for prompts in turn, until `stop`: what each asked for, got, and when."""

    work: Work
    moments: list[tuple[float, int, int]] = field(default_factory=list)  # (when it ended, blocks asked for, got)
    wrong: int = 0
    _over: bool = False

    async def drive(self, by: KVClient, first: int) -> None:
        number = first
        while not self._over:
            prompt = self.work.prompts[number % len(self.work.prompts)]
            number += 1
            blocks, buffers = await self.work.get(by, prompt)
            self.moments.append((now(), len(prompt), blocks))
            self.wrong += self.work.wrong(prompt, blocks, buffers)
            await asyncio.sleep(0)

    def stop(self) -> None:
        self._over = True

    def hits(self, begin: float, end: float) -> float:
        """Share of the blocks asked for between the two moments that came."""
        found = [(asked, got) for at, asked, got in self.moments if begin <= at <= end]
        return sum(got for _, got in found) / max(1, sum(asked for asked, _ in found))


class RecoveryRig:
    """`async with RecoveryRig(...) as rig`: workers and coordinators, two copies of everything."""

    def __init__(
        self,
        config: Config,
        *,
        workers: int,
        coordinators: int = 1,
        copies: int = 2,
        heartbeat_s: float = HEARTBEAT_S,
        slow_start_s: float | None = None,
    ) -> None:
        self._folder = TemporaryDirectory(prefix="kvstore-bench-")
        namespaces = Path(self._folder.name) / "namespaces.toml"
        namespaces.write_text(f"[namespaces.default]\ncopies = {copies}\n")
        own: dict[str, dict[str, object]] = {
            "server": {"namespaces_file": str(namespaces), "stop_grace_s": 0.5},
            "coordinator": {"lease_s": LEASE_S, "heartbeat_s": heartbeat_s, "hint_again_s": 2.0},
        }
        if slow_start_s is not None:
            own["coordinator"]["slow_start_s"] = slow_start_s
        self.cluster = LocalCluster(override(config, own), workers=workers, coordinators=coordinators, redis=False)
        self._system = real_system()
        self._clients: list[KVClient] = []

    async def __aenter__(self) -> RecoveryRig:
        try:
            await self.cluster.start()
        except BaseException:
            self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients:
            await client.close()
        self._end()

    def _end(self) -> None:
        self.cluster.stop()
        self._system.pool.close()
        self._folder.cleanup()

    async def client(self) -> KVClient:
        """One that takes itself to be on another host."""
        config: ClientConfig = replace(
            self.cluster.client_config(), tune_malloc=True, negative_cache_s=0.5, get_timeout_s=GET_S
        )
        client = await KVClient.connect(config, replace(self._system, host="elsewhere"))
        self._clients.append(client)
        return client

    def index(self, worker: str) -> int:
        """Which of the cluster's workers has this id."""
        return next(i for i, server in enumerate(self.cluster.workers) if server.ready["id"] == worker)

    def signal(self, pid: int, number: int) -> None:
        os.kill(pid, number)

    @asynccontextmanager
    async def load(self, work: Work, drivers: int) -> AsyncIterator[Load]:
        """Under way when it is entered."""
        load = Load(work)
        tasks = [asyncio.create_task(load.drive(await self.client(), 7 * index)) for index in range(drivers)]
        try:
            await until(lambda: _ready(len(load.moments) >= drivers), "the load runs")
            yield load
        finally:
            load.stop()
            await asyncio.gather(*tasks)

    async def held(self, work: Work, by: KVClient, copies: int = 2) -> None:
        """Until every prompt lies whole on so many workers."""

        async def enough() -> bool:
            for prompt in work.prompts:
                held = await work.holders(by, prompt)
                if sum(count == len(prompt) for count in held.values()) < copies:
                    return False
            return True

        await until(enough, f"every prompt is held by {copies} workers")

    @asynccontextmanager
    async def channels(self, indices: Sequence[int]) -> AsyncIterator[list[Channel]]:
        """To some workers, for `blocks_on`."""
        transport = GrpcTransport(self._system.clock)
        made = [await transport.connect(self.cluster.workers[index].address, Credentials()) for index in indices]
        try:
            yield made
        finally:
            for channel in made:
                await channel.close()


async def blocks_on(channel: Channel) -> int:
    """Blocks that a worker has."""
    status = await channel.unary(WORKER["Status"], common_pb2.StatusRequest(), timeout_s=5.0)
    return int(sum(entry.blocks for entry in status.namespaces))


async def until(holds: Callable[[], Awaitable[bool]], what: str) -> float:
    """Seconds until it is so. SetupError when it does not come; an error of a peer means not yet."""
    begin = now()
    while now() - begin < WAIT_S:
        try:
            if await holds():
                return now() - begin
        except KVStoreError:
            pass  # whoever is asked is just starting, or was just killed
        await asyncio.sleep(POLL_S)
    raise SetupError(f"within {WAIT_S:g} s it did not come true that {what}")


async def _ready(value: bool) -> bool:
    return value
