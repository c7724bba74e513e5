"""The demo's cluster: a fleet of one coordinator and two workers on two Ray nodes of this machine, with small tiers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.auth import client_credentials
from kvstore.cli.fleet import LOG_FILE, PROGRESS_FILE, prepare
from kvstore.config import MIB, ClientConfig, Config, override
from kvstore.demo.tables import TIERS, TierRow
from kvstore.errors import SetupError, Unavailable
from kvstore.fleet.state import MARK, FleetState, fleet_folder
from kvstore.machine.processes import process_id
from kvstore.operations.observe import Observer, View, look
from kvstore.seams import Process, Spawner, System
from kvstore.transport.rpc import GrpcTransport
from kvstore.types import Tier
from kvstore.wire import common_pb2

POLL_S = 0.25
START_S = 120.0
SETTLE_S = 15.0
SETTLED_LOOKS = 4
"""So many equal looks in a row: longer than a heartbeat, which brings the numbers."""
RETURN_S = 60.0
STOP_S = 20.0
PATIENCE_S = 10.0
"""Of a client for an answer: replicas, workers and Redis share two cores with the model's arithmetic."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes of each tier of a worker, and of Redis for both. Small, so that a few conversations fill them all."""

    hot: int
    arena: int  # hot and host together
    ssd: int
    redis: int
    segment: int = 4 * MIB  # of the SSD log
    inflight: int = 32 * MIB  # of one client; one call asks for a quarter of it, which must fit the arena


FULL_LIMITS = Limits(hot=20 * MIB, arena=40 * MIB, ssd=32 * MIB, redis=160 * MIB)
QUICK_LIMITS = Limits(hot=12 * MIB, arena=24 * MIB, ssd=20 * MIB, redis=96 * MIB, inflight=16 * MIB)


def fleet_config(folder: Path, limits: Limits) -> Config:
    """Two Ray nodes with a worker each, everything in `folder`."""
    return override(
        Config(),
        {
            "fleet": {
                "name": "demo",
                "nodes": 2,
                "coordinators": 1,
                "state_folder": str(folder),
                "start_timeout_s": 90.0,
            },
            "worker": {"redis_lease_s": 2.0},  # when its announcer is killed, Redis is announced by the other worker
            "store": {
                "hot_bytes": limits.hot,
                "host_bytes": limits.arena,
                "ssd_bytes": limits.ssd,
                "ssd_folder": str(folder / "ssd"),
                "ssd_segment_bytes": limits.segment,
                "redis_bytes": limits.redis,
                "put_wait_s": 2.0,  # one prompt fills hot: what stores waits for a spill rather than being dropped
                "load_wait_s": 2.0,
                "threads": 2,
            },
        },
    )


class FleetCluster:
    """`kvstore.demo.scenario.Cluster` over a real fleet. `start` first; `stop` last, also after a failed start."""

    def __init__(
        self, folder: Path, system: System, spawner: Spawner, limits: Limits, say: Callable[[str], None]
    ) -> None:
        self._config, self._limits = fleet_config(folder, limits), limits
        self._folder = fleet_folder(self._config.fleet, os.environ)
        self._system, self._spawner, self._say = system, spawner, say
        self._supervisor: Process | None = None
        self._state: FleetState | None = None
        self._killed: common_pb2.WorkerStatus | None = None

    async def start(self) -> None:
        """Up and ready when it returns. SetupError with the reason otherwise."""
        Path(self._config.store.ssd_folder).mkdir(exist_ok=True)
        prepare(self._config, self._folder)
        argv = [sys.executable, "-m", "kvstore.cli.main", "fleet-supervisor", str(self._folder)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("KVSTORE_")}
        environment[MARK] = f"demo-{self._system.token_hex(8)}"
        self._supervisor = self._spawner.spawn(argv, env=environment, log=str(self._folder / LOG_FILE))
        try:
            async with asyncio.timeout(START_S):
                await self._follow(self._supervisor)
        except TimeoutError:
            raise SetupError(
                f"the cluster was not ready within {START_S:.0f} s: free the processor and try again"
            ) from None
        self._state = FleetState.load(self._folder)
        if self._state is None:
            raise SetupError("the cluster said that it was ready and left no state")
        await self._until(lambda view: len(alive(view)) == 2, START_S, "the workers did not announce themselves")

    async def _follow(self, supervisor: Process) -> None:
        """Show what the supervisor says until it is ready."""
        path, seen = self._folder / PROGRESS_FILE, 0
        while True:
            ended = not supervisor.alive()
            lines = path.read_text("utf-8").splitlines() if path.exists() else []
            for event in map(json.loads, lines[seen:]):
                if event.get("ready"):
                    return
                if "error" in event:
                    raise SetupError(event["error"])
                self._say(event["step"])
            if ended:
                words = (self._folder / LOG_FILE).read_text(errors="replace").strip().splitlines()
                raise SetupError(f"the cluster ended while starting: {words[-1] if words else 'no output'}")
            seen = len(lines)
            await asyncio.sleep(POLL_S)

    @property
    def state(self) -> FleetState:
        assert self._state is not None, "started before"
        return self._state

    async def client(self, worker: int) -> dict[str, Any]:
        """`ClientConfig` fields of a replica beside that worker: its own worker first."""
        workers = by_node(await self._look())
        own = workers[worker % len(workers)].member.socket
        return {
            "coordinators": list(self.state.coordinators),
            "workers": [own],
            "inflight_bytes_max": self._limits.inflight,
            "staging_bytes": 8 * MIB,  # a few blocks on their way at a time: all of hot is little more
            "match_timeout_s": PATIENCE_S,
            "get_timeout_s": 2 * PATIENCE_S,
            "put_timeout_s": 2 * PATIENCE_S,
        }

    async def _look(self) -> View:
        config = ClientConfig(coordinators=self.state.coordinators)
        transport = GrpcTransport(self._system.clock, connect_timeout_s=config.connect_timeout_s)
        return await look(Observer(transport, client_credentials(config)), self.state.coordinators)

    async def _until(self, holds: Callable[[View], bool], seconds: float, otherwise: str) -> View:
        """Look until it holds. Unavailable with `otherwise` when it does not in time."""
        try:
            async with asyncio.timeout(seconds):
                while True:
                    view = await self._look()
                    if holds(view):
                        return view
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise Unavailable(f"{otherwise} within {seconds:.0f} s") from None

    # --- what the scenario does ------------------------------------------------------------------------------------

    async def tiers(self) -> list[TierRow]:
        """Every tier of every living worker; Redis once, for it is shared."""
        rows: dict[tuple[str, str], TierRow] = {}
        for status in alive(await self._look()).values():
            for tier in status.tiers:
                name = Tier(tier.tier).name.lower()
                worker = "shared" if name == "redis" else status.member.node
                row = TierRow(worker, name, tier.blocks, tier.used, tier.capacity, tier.raw_bytes, tier.state)
                if (worker, name) not in rows or rows[worker, name].blocks < row.blocks:
                    rows[worker, name] = row
        return sorted(rows.values(), key=lambda row: (row.worker == "shared", row.worker, TIERS.index(row.tier)))

    async def counters(self) -> dict[str, dict[str, int]]:
        """What each living worker has counted since its last start, by the name of its node."""
        workers = by_node(await self._look())
        return {status.member.node: dict(sorted(status.counters.items())) for status in workers}

    async def settled(self) -> None:
        last: list[TierRow] = []
        equal = 0
        for _ in range(int(SETTLE_S / POLL_S)):
            rows = await self.tiers()
            equal = equal + 1 if rows == last else 0
            if equal == SETTLED_LOOKS:
                return
            last = rows
            await asyncio.sleep(POLL_S)

    async def kill(self) -> str:
        status = by_node(await self._look())[0]
        process = process_id(status.pid)
        if process is None or not process.signal(signal.SIGKILL):
            raise Unavailable(f"{status.member.node} has no process {status.pid} to kill")
        self._killed = status
        return f"SIGKILL to {status.member.node} (pid {status.pid}, epoch {status.member.epoch})"

    async def returned(self) -> str:
        killed = self._killed
        assert killed is not None, "killed before"

        def back(view: View) -> bool:
            status = alive(view).get(killed.member.id)
            return status is not None and status.member.epoch > killed.member.epoch and len(status.tiers) > 0

        view = await self._until(back, RETURN_S, f"{killed.member.node} did not come back")
        status = alive(view)[killed.member.id]
        on_ssd = blocks_in(status, Tier.SSD)
        in_redis = max(blocks_in(other, Tier.REDIS) for other in alive(view).values())
        return (
            f"{status.member.node} is back (pid {status.pid}, epoch {status.member.epoch}) and found "
            f"{on_ssd} blocks on its SSD; Redis has {in_redis}"
        )

    async def stop(self) -> None:
        """Take the cluster down. Idempotent; whoever does not leave in time is left to the guard."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None and supervisor.alive():
            await asyncio.to_thread(supervisor.terminate, STOP_S)


def alive(view: View) -> dict[str, common_pb2.WorkerStatus]:
    """Workers that coordinators count as living and that have reported their tiers, by id."""
    return {
        id: status for id, status in view.workers().items() if status.member.state == "alive" and len(status.tiers) > 0
    }


def by_node(view: View) -> list[common_pb2.WorkerStatus]:
    """The living workers in the order of their nodes' names."""
    return sorted(alive(view).values(), key=lambda status: status.member.node)


def blocks_in(status: common_pb2.WorkerStatus, wanted: Tier) -> int:
    """What a worker counts in one tier."""
    return sum(tier.blocks for tier in status.tiers if Tier(tier.tier) is wanted)
