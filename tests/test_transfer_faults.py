"""Transfers while a process of theirs is killed, stopped and resumed, or its connections are cut, at random moments.

No wrong byte, no call past its deadline, no exception into the caller, nothing leaked. The seed is printed; the long
form does 1,000.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kvstore.config import MIB, Config, override
from kvstore.fleet.local_cluster import LocalCluster, Server
from kvstore.machine.system import RealClock
from kvstore.operations.observe import Observer
from kvstore.transport.base import Credentials
from kvstore.transport.methods import WORKER
from kvstore.transport.rpc import GrpcTransport
from kvstore.types import Tier
from kvstore.wire import common_pb2, worker_pb2
from tests.transfer_client import BLOCKS, TIMEOUT_S

PROMPTS = 10
SLACK_S = 2.0
"""A busy machine runs nobody for a while; a call that waits for ever is far beyond it."""

THREADS = 2
RAW = 4
POOLED = 3 * THREADS + RAW
"""Threads of a worker that start when first needed: byte movers, the SSD tier's for writing and for reading, and one
for each raw data connection."""

KINDS = ("put", "get", "get", "layers", "pinned", "prefetch")
FAULTS = {
    "none": 4, "cut": 4, "stop worker": 3, "stop coordinator": 2, "stop client": 2,
    "kill worker": 1, "kill coordinator": 1, "kill client": 1,
}  # fmt: skip


def config() -> Config:
    store = {
        "host_bytes": 24 * MIB, "hot_bytes": 8 * MIB, "segment_bytes": 4 * MIB, "staging_bytes": 8 * MIB,
        "staging_total_bytes": 64 * MIB, "ssd_bytes": 128 * MIB, "ssd_segment_bytes": 8 * MIB, "ssd_sync_s": 0.05,
        "hold_max_s": 3.0, "pin_max_s": 3.0, "threads": THREADS,
    }  # fmt: skip
    return override(
        Config(),
        {
            "store": store,
            "worker": {"data_connections_max": RAW},
            "coordinator": {"heartbeat_s": 0.1, "lease_s": 1.0},
            "server": {"stop_grace_s": 0.5},
        },
    )


class Client:
    """A child process that transfers."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, cluster: LocalCluster, where: str) -> Client:
        assert cluster.coordinator is not None
        path = str(cluster.workers[0].ready["socket"]) if where == "near" else ""
        argv = [sys.executable, "-m", "tests.transfer_client", cluster.coordinator.address, path, where]
        made = cls(
            await asyncio.create_subprocess_exec(
                *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parent.parent
            )
        )
        assert "ready" in await made.answer(30.0)
        return made

    def tell(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")

    async def answer(self, timeout_s: float) -> dict[str, Any]:
        """The next line; {} when the process is gone."""
        assert self.process.stdout is not None
        async with asyncio.timeout(timeout_s):
            line = await self.process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line else {}
        return found

    async def end(self) -> dict[str, Any]:
        """What it has left when its client is closed."""
        self.tell(kind="end")
        left = await self.answer(30.0)
        await self.process.wait()
        return left

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@dataclass(slots=True)
class Proof:
    """One run of many transfers."""

    cluster: LocalCluster
    rng: Random
    clients: dict[str, Client] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    delivered: int = 0
    killed: int = 0

    async def fill(self) -> None:
        """Every prompt is put once, in peace."""
        client = self.clients["near"] = await Client.start(self.cluster, "near")
        for seed in range(PROMPTS):
            client.tell(kind="put", seed=seed)
            assert "error" not in await client.answer(10.0)

    async def transfer(self, fault: str) -> None:
        where = self.rng.choice(("near", "far"))
        if where not in self.clients:
            self.clients[where] = await Client.start(self.cluster, where)
        client = self.clients[where]
        order = {"kind": self.rng.choice(KINDS), "seed": self.rng.randrange(PROMPTS)}
        moment_s = self.rng.choice((0.0, 0.001, 0.003, 0.01, 0.03))
        if fault == "cut":
            order["cut_after_s"] = moment_s
        client.tell(**order)
        stopped_s = await self._hurt(fault, client, moment_s)
        self.seen[fault] = self.seen.get(fault, 0) + 1
        if fault == "kill client":
            del self.clients[where]
            return
        done = await client.answer(4 * (TIMEOUT_S + SLACK_S) + stopped_s)
        name = f"{fault}, {where} {order}"
        if "error" in done or not done:
            self.problems.append(f"{name}: {done or 'the client is gone'}")
            return
        if done["wrong"]:
            self.problems.append(f"{name}: {done['wrong']} wrong blocks or layers")
        if done["seconds"] > TIMEOUT_S + SLACK_S + stopped_s:
            self.problems.append(f"{name}: took {done['seconds']:.2f} s")
        self.delivered += done["blocks"]

    async def _hurt(self, fault: str, client: Client, moment_s: float) -> float:
        """Seconds that the client itself stood still."""
        what, _, whom = fault.partition(" ")
        if what not in ("stop", "kill"):
            return 0.0
        await asyncio.sleep(moment_s)
        if what == "stop":
            pid = client.process.pid if whom == "client" else self._server(whom).process.pid
            still_s = self.rng.uniform(0.0, 0.7)
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(still_s)
            os.kill(pid, signal.SIGCONT)
            return still_s if whom == "client" else 0.0
        self.killed += 1
        if whom == "client":
            await client.kill()
        elif whom == "worker":
            await self.cluster.restart_worker(0)
        else:
            await self.cluster.restart_coordinator(0)
        return 0.0

    def _server(self, whom: str) -> Server:
        if whom == "worker":
            return self.cluster.workers[0]
        assert self.cluster.coordinator is not None
        return self.cluster.coordinator


def held_by(pid: int) -> dict[str, int]:
    """What a worker process has open, its arena's own segments apart."""
    found = {"staging": 0, "other": 0}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            if "staging" in target:
                found["staging"] += 1
            elif "memfd:" not in target and "/ssd" not in target and "/worker-" not in target:
                found["other"] += 1
    found["threads"] = len(os.listdir(f"/proc/{pid}/task"))
    return found


async def tiers_used(cluster: LocalCluster) -> dict[int, int]:
    observer = Observer(GrpcTransport(RealClock(), tune_malloc=False), Credentials(), 5.0)
    status = await observer.ask(cluster.workers[0].address, WORKER["Status"], common_pb2.StatusRequest())
    return {int(tier.tier): tier.used for tier in status.tiers}


async def prove(transfers: int, seed: int, kills_max: int) -> None:
    print(f"seed {seed}")
    rng = Random(seed)
    async with LocalCluster(config(), workers=1, redis=False) as cluster:
        proof = Proof(cluster, rng)
        fresh = held_by(cluster.workers[0].process.pid)
        await proof.fill()
        for _ in range(transfers):
            names = [name for name in FAULTS if proof.killed < kills_max or not name.startswith("kill")]
            [fault] = rng.choices(names, [FAULTS[name] for name in names])
            await proof.transfer(fault)
        for where, client in proof.clients.items():
            left = await client.end()
            proof.seen["raw"] = proof.seen.get("raw", 0) + left["counters"].get("raw_gets", 0)
            more = {what: left["after"][what] - count for what, count in left["before"].items()}
            assert max(more.values()) <= 0, f"the {where} client left {more} behind"
        assert proof.problems == []
        assert proof.delivered > transfers * BLOCKS // 8, f"so little came that nothing is proved: {proof.delivered}"
        observer = Observer(GrpcTransport(RealClock(), tune_malloc=False), Credentials(), 10.0)
        await observer.ask(cluster.workers[0].address, WORKER["Purge"], worker_pb2.PurgeRequest())
        await _nothing_is_left(cluster, fresh)
        print(f"{transfers} transfers, {proof.delivered} blocks delivered, faults {proof.seen}")


async def _nothing_is_left(cluster: LocalCluster, fresh: dict[str, int]) -> None:
    """Holds, pins and staging end with their owners or by age: then memory is empty, and descriptors are as before."""
    async with asyncio.timeout(15):
        while True:
            used, now = await tiers_used(cluster), held_by(cluster.workers[0].process.pid)
            memory = used.get(Tier.HOT, 0) + used.get(Tier.HOST, 0)
            more = {what: now[what] - fresh[what] for what in fresh}
            if memory == 0 and now["staging"] == 0 and more["other"] <= 2 and more["threads"] <= POOLED:
                return
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                raise AssertionError(
                    f"left in tiers: {used}; descriptors and threads more than at first: {more}"
                ) from None


async def test_transfers_survive_whatever_happens_to_whom() -> None:
    await prove(40, int.from_bytes(os.urandom(4), "little"), kills_max=3)


@pytest.mark.slow
@pytest.mark.timeout(7200)
async def test_a_thousand_transfers_survive() -> None:
    await prove(1000, int.from_bytes(os.urandom(4), "little"), kills_max=150)
