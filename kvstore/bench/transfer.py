"""`kvstore bench transfer`: gets and puts between processes beside memcpy and a raw socket that move the same bytes.

A coordinator and a worker are child processes; this process is the client. The raw socket's other end is a process too.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import replace

from kvstore.bench.baselines import memcpy
from kvstore.bench.data_baselines import Child, RawSocket
from kvstore.bench.report import Report
from kvstore.bench.tiers_blocks import COLD_BYTES
from kvstore.bench.transfer_blocks import (
    DEEP,
    LARGE,
    SMALL,
    Memory,
    Shape,
    client,
    cold_bytes,
    incomplete,
    plan_of,
    prompts,
    put_slice,
    rates,
    take_turns,
)
from kvstore.client.getting import GetResult
from kvstore.client.kv_client import KVClient
from kvstore.client.plan import HitPlan
from kvstore.config import Config, override
from kvstore.fleet.local_cluster import LocalCluster
from kvstore.keys import Chain
from kvstore.machine.system import RealClock
from kvstore.transport.base import Credentials
from kvstore.transport.malloc import keep_freed_memory
from kvstore.transport.methods import PROTOCOL_VERSION, WORKER
from kvstore.transport.rpc import GrpcTransport
from kvstore.wire import common_pb2

ROUNDS, ROUNDS_LONG = 8, 48
PARTS = ("large", "small", "tcp", "layers")
SHAPES = {"large": LARGE, "small": SMALL, "tcp": LARGE, "layers": DEEP}


def main(argv: Sequence[str]) -> Report:
    """`kvstore bench transfer`'s own flags."""
    parser = argparse.ArgumentParser(prog="kvstore bench transfer", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, within 40 s")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part; may be given again")
    arguments = parser.parse_args(argv)
    report = Report("transfer")
    cold = COLD_BYTES if arguments.quick else cold_bytes()
    report.result("working_set", [float(cold >> 20)], "MiB")
    asyncio.run(_run(report, ROUNDS if arguments.quick else ROUNDS_LONG, arguments.only or PARTS, cold))
    report.target("wrong_blocks", at_most=0)
    return report


def config(cold: int = COLD_BYTES) -> Config:
    store = {"host_bytes": 3 * cold + (256 << 20), "hot_bytes": 3 * cold, "high_watermark": 0.98}
    return override(Config(), {"store": {**store, "low_watermark": 0.97}})


async def _run(report: Report, rounds: int, parts: Sequence[str], cold: int) -> None:
    wrong = 0
    async with LocalCluster(config(cold), workers=1, redis=False) as cluster:
        for part in parts:
            bench = Bench(cluster, replace(SHAPES[part], cold=cold), part)
            try:
                if part == "tcp":
                    await bench.tcp(report, rounds)
                elif part == "layers":
                    await bench.layers(report, rounds)
                else:
                    await bench.host(report, rounds)
            finally:
                await bench.close()
            wrong += bench.wrong
    report.result("wrong_blocks", [float(wrong)], "blocks")


class Bench:
    """One shape of blocks, moved one way. `close` it."""

    def __init__(self, cluster: LocalCluster, shape: Shape, part: str) -> None:
        self.cluster, self.shape, self.part = cluster, shape, part
        self.memory = Memory(shape)
        self.wrong = 0
        self.nbytes = shape.nbytes * shape.together
        self.read, self.write = shape.spec(f"{part}-get"), shape.spec(f"{part}-put")
        self.plans: list[HitPlan] = []
        self._cycle = 0
        self._writes: list[Chain] = []
        self._clients: list[KVClient] = []

    async def connect(self, *, elsewhere: bool) -> KVClient:
        """A client, and blocks in the worker's memory for it to get."""
        made = await client(self.cluster.client_config(None if elsewhere else 0), elsewhere=elsewhere)
        self._clients.append(made)
        await made.purge()
        for number, prompt in enumerate(prompts(self.read, self.shape)):
            await put_slice(made, self.memory, prompt, number, again=True)
            self.plans.append(await plan_of(made, prompt))
        return made

    async def close(self) -> None:
        for made in self._clients:
            await made.purge()
            await made.close()
            made.system.pool.close()
        self.plans.clear()
        self.memory.close()

    async def get(self, by: KVClient, number: int) -> None:
        into = self.memory.slice_of(self.memory.targets, number)
        found = await by.get(self.plans[number], [into])
        self._all(found, by)

    async def put(self, by: KVClient, number: int) -> None:
        await put_slice(by, self.memory, self._writes[number], number)

    async def fresh(self, by: KVClient, number: int) -> None:
        """Before a cycle of puts: new keys, and the room of the old ones."""
        if number == 0 or not self._writes:
            await by.purge(self.write)
            self._cycle += 1
            self._writes = prompts(self.write, self.shape, self._cycle)

    async def check_put(self, by: KVClient, number: int) -> None:
        """What the worker holds now is what was put."""
        plan = await plan_of(by, self._writes[number])
        into = self.memory.slice_of(self.memory.copies, number)
        found = await by.get(plan, [into])
        self._all(found, by)
        self.wrong += self.memory.wrong(self.memory.copies, number)

    def _all(self, found: GetResult, by: KVClient) -> None:
        """Unavailable unless all of a slice came: its time would be that of something else."""
        if found.blocks != self.shape.together:
            raise incomplete(f"a get brought {found.blocks} of {self.shape.together} blocks", by)

    async def host(self, report: Report, rounds: int) -> None:
        """Gets and puts through shared memory."""
        by = await self.connect(elsewhere=False)
        memory = self.memory

        async def copy(number: int) -> None:
            memcpy(memory.slice_of(memory.sources, number), memory.slice_of(memory.copies, number))

        async def get(number: int) -> None:
            await self.get(by, number)

        async def put(number: int) -> None:
            await self.put(by, number)

        async def between(name: str, number: int) -> None:
            if name == "get":
                self.wrong += memory.wrong(memory.targets, number)
            elif name == "put":
                await self.check_put(by, number)
            if name == "memcpy" and "put" in turns:
                await self.fresh(by, (number + slices_apart) % self.shape.slices)

        turns = {"memcpy": copy, "put": put, "get": get} if self.part == "large" else {"memcpy": copy, "get": get}
        slices_apart = self.shape.slices // len(turns)
        seconds = await take_turns(turns, between, self.shape.slices, rounds)
        for name, values in seconds.items():
            report.result(f"{self.part}_{name}", rates(self.nbytes, values), "GB/s")
        report.ratio(
            f"{self.part}_get_vs_memcpy",
            f"{self.part}_get",
            f"{self.part}_memcpy",
            at_least=0.8 if self.part == "large" else 0.6,
        )
        if "put" in turns:
            report.ratio("large_put_vs_memcpy", "large_put", "large_memcpy", at_least=0.4)

    async def tcp(self, report: Report, rounds: int) -> None:
        """Gets and puts over loopback TCP."""
        by = await self.connect(elsewhere=True)
        shape = self.shape
        child = await Child.start(self.cluster.folder, "socket", *map(str, (shape.nbytes, shape.together, shape.count)))
        raw = RawSocket(child.address)
        try:
            await self._tcp_turns(report, by, raw, rounds, "")
            keep_freed_memory()
            await self._tcp_turns(report, by, raw, rounds, "_tuned")
        finally:
            raw.close()
            child.close()

    async def layers(self, report: Report, rounds: int) -> None:
        """Over loopback TCP, 32 layers: when the first one is there, and when all are. Both of the same get."""
        by = await self.connect(elsewhere=True)
        now = RealClock().monotonic
        first: list[float] = []
        whole: list[float] = []
        for turn in range(-self.shape.slices, rounds):
            number = turn % self.shape.slices
            into = self.memory.slice_of(self.memory.targets, number)
            seen: list[float] = []
            begin = now()
            found = await by.get(self.plans[number], [into], on_layer=lambda ready, seen=seen: seen.append(now()))  # type: ignore[misc]
            took = now() - begin
            self._all(found, by)
            assert len(seen) == self.shape.layers, "a layer was not told"
            self.wrong += self.memory.wrong(self.memory.targets, number)
            if turn >= 0:
                first.append((seen[0] - begin) * 1e3)
                whole.append(took * 1e3)
        report.result("first_layer", first, "ms")
        report.result("all_layers", whole, "ms")
        report.ratio("first_layer_vs_whole", "first_layer", "all_layers", at_most=0.15)

    async def _tcp_turns(self, report: Report, by: KVClient, raw: RawSocket, rounds: int, suffix: str) -> None:
        memory, together = self.memory, self.shape.together

        async def raw_get(number: int) -> None:
            raw.get(number * together, memory.slice_of(memory.copies, number))

        async def raw_put(number: int) -> None:
            raw.put(number * together, memory.slice_of(memory.sources, number))

        async def raw_checked(number: int) -> None:
            await channel.unary(WORKER["Hello"], hello, timeout_s=5.0)  # what would bring the ticket
            raw.get_checked(number * together, memory.slice_of(memory.copies, number))

        async def get(number: int) -> None:
            await self.get(by, number)

        async def put(number: int) -> None:
            await self.put(by, number)

        hello = common_pb2.HelloRequest(protocol=PROTOCOL_VERSION)
        channel = await GrpcTransport(RealClock(), tune_malloc=False).connect(
            self.cluster.workers[0].address, Credentials()
        )
        turns = {"socket_get": raw_get, "get": get, "raw_channel": raw_checked, "socket_put": raw_put, "put": put}
        apart = self.shape.slices // len(turns)

        async def between(name: str, number: int) -> None:
            if name == "get":
                self.wrong += memory.wrong(memory.targets, number)
            elif name == "put":
                await self.check_put(by, number)
            elif name == "socket_put":
                await self.fresh(by, (number + apart) % self.shape.slices)

        seconds = await take_turns(turns, between, self.shape.slices, rounds)
        await channel.close()
        for name, values in seconds.items():
            report.result(f"tcp_{name}{suffix}", rates(self.nbytes, values), "GB/s")
        for name, bar in (("get", 0.5), ("put", 0.4)):
            bars = {"at_least": bar} if suffix else {}
            ours, theirs = f"tcp_{name}{suffix}", f"tcp_socket_{name}{suffix}"
            report.ratio(f"tcp_{name}_vs_socket{suffix}", ours, theirs, **bars)
        report.ratio(f"tcp_raw_channel_vs_socket{suffix}", f"tcp_raw_channel{suffix}", f"tcp_socket_get{suffix}")
