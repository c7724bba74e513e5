"""The real transport and the simulator's twin pass one suite: what the simulation proves holds on real sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvstore.machine.memory import MemfdMemory
from kvstore.seams import Memory
from kvstore.transport.base import Transport
from kvstore.transport.rpc import GrpcTransport
from tests.contracts.transport_suite import TransportSuite
from tests.contracts.transport_world import TOKEN, Case
from tests.net_service import Clock
from tests.sim.loop import run
from tests.sim.memory import SimMemory
from tests.sim.network import MemoryNetwork


class RealWorld:
    def __init__(self, folder: Path) -> None:
        self.server: Transport = GrpcTransport(Clock())
        self.client: Transport = GrpcTransport(Clock())
        self.memory: Memory = MemfdMemory()
        self.socket = str(folder / "w.sock")
        self.token_file = str(folder / "token")


class SimWorld:
    def __init__(self, network: MemoryNetwork, token_file: str) -> None:
        self.server: Transport = network.transport(network.boot("w", "host"))
        self.client: Transport = network.transport(network.boot("c", "host"))
        self.memory: Memory = SimMemory()
        self.socket = "/w.sock"
        self.token_file = token_file


@pytest.fixture(autouse=True)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    request.instance.folder = tmp_path


class TestReal(TransportSuite):
    folder: Path

    def play(self, case: Case) -> None:
        async def main() -> None:
            await case(RealWorld(self.folder))

        asyncio.run(main())


class TestSimulated(TransportSuite):
    folder: Path

    def play(self, case: Case) -> None:
        network = MemoryNetwork(1)

        async def main() -> None:
            await case(SimWorld(network, str(self.folder / "token")))

        run(main(), processes=network.processes)
