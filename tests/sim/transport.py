"""The simulator's `Transport`: messages pass as bytes, at the mercy of `MemoryNetwork`.

The twin of kvstore/transport/rpc.py, with the same errors for the same reasons.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from google.protobuf.message import Message

from kvstore.errors import DeadlineExceeded, SetupError, Unavailable
from kvstore.seams import Pool
from kvstore.transport.base import Authenticator, CallContext, Credentials, DataService, Method
from kvstore.transport.methods import SERVICES
from tests.sim.calls import Call, parse, pump
from tests.sim.loop import SimProcess
from tests.sim.network import MemoryNetwork


class MemoryServer:
    """`kvstore.transport.base.Server`: what one process serves at one address."""

    def __init__(
        self,
        network: MemoryNetwork,
        process: SimProcess,
        address: str,
        services: Mapping[str, object],
        auth: Authenticator,
    ) -> None:
        self.network = network
        self.process = process
        self.address = address
        self.services = services
        self.auth = auth
        self.tasks: dict[asyncio.Task[Any], Method] = {}

    def start(self, coro: Any, method: Method) -> asyncio.Task[Any]:
        """Run a handler in the server's process."""
        task: asyncio.Task[Any] = self.process.spawn(coro)
        self.tasks[task] = method
        task.add_done_callback(lambda done: self.tasks.pop(done, None))
        return task

    async def close(self, grace_s: float) -> None:
        """As gRPC: no new calls, streams both ways end at once, the others after `grace_s`."""
        if self.network.listeners.get(self.address) is self:
            del self.network.listeners[self.address]
        for task, method in list(self.tasks.items()):
            if method.lasting:
                task.cancel()
        if self.tasks:
            await asyncio.wait(list(self.tasks), timeout=grace_s)
        for task in list(self.tasks):
            task.cancel()

    def context(
        self, method: Method, credentials: Credentials, client: SimProcess, timeout_s: float | None
    ) -> CallContext:
        context = self.auth.authenticate(credentials, peer=f"sim:{client.name}", method=method)
        if timeout_s is not None:
            context.deadline = self.process.monotonic() + timeout_s
        return context


class MemoryTransport:
    """`kvstore.transport.base.Transport` of one process."""

    def __init__(self, network: MemoryNetwork, process: SimProcess) -> None:
        self.network = network
        self.process = process

    async def connect(self, address: str, credentials: Credentials) -> MemoryChannel:
        return MemoryChannel(self.network, self.process, address, credentials)

    async def serve(self, address: str, services: Mapping[str, object], auth: Authenticator) -> MemoryServer:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise SetupError(f"cannot listen on {address}: write it as HOST:PORT")
        bound = f"{self.process.name}:{int(port) or self.network.port()}"
        if bound in self.network.listeners:
            raise SetupError(f"port {port} is in use: choose another with --bind")
        for name in services:
            assert name in SERVICES, name
        server = MemoryServer(self.network, self.process, bound, services, auth)
        self.network.listeners[bound] = server
        return server

    async def connect_local(self, path: str, credentials: Credentials) -> Any:
        from tests.sim.local import connect

        return await connect(self.network, self.process, path, credentials)

    async def serve_local(self, path: str, service: object, auth: Authenticator) -> MemoryServer:
        from tests.sim.local import serve

        return await serve(self.network, self.process, path, service, auth)

    async def connect_data(self, address: str, ticket: bytes, pool: Pool, *, timeout_s: float) -> Any:
        from tests.sim.data import MemoryDataChannel

        channel = MemoryDataChannel(self.network, self.process, address, ticket, pool)
        await channel.admit(timeout_s)
        return channel

    async def serve_data(
        self, address: str, service: DataService, pool: Pool, *, connections_max: int, idle_s: float
    ) -> MemoryServer:
        from tests.sim.data import MemoryDataServer

        port = int(address.rpartition(":")[2]) or self.network.port()
        server = MemoryDataServer(self.network, self.process, f"{self.process.name}:{port}", service, pool)
        self.network.listeners[server.address] = server
        return server


class MemoryChannel:
    """`kvstore.transport.base.Channel`."""

    def __init__(self, network: MemoryNetwork, process: SimProcess, address: str, credentials: Credentials) -> None:
        self._network = network
        self._process = process
        self._address = address
        self._credentials = credentials
        self._calls: dict[Call, None] = {}
        self._closed = False

    async def unary(self, method: Method, request: Message, *, timeout_s: float) -> Any:
        call = self._begin(method, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                call.up.put_now(request.SerializeToString())
                call.up.finish()
                call.connect(twice=self._network.doubled())
                return parse(method, await call.down.only())
        except TimeoutError:
            raise DeadlineExceeded(f"{self._address}: no answer to {method.name} within {timeout_s} s") from None
        finally:
            self._end(call)

    async def stream(
        self, method: Method, requests: AsyncIterator[Any], *, timeout_s: float | None
    ) -> AsyncGenerator[Any, None]:
        call = self._begin(method, timeout_s)
        pumping = asyncio.create_task(pump(call, method, requests))
        call.connect()
        deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    item = await call.down.get()
                if item is None:
                    break
                yield parse(method, item)
        except TimeoutError:
            raise DeadlineExceeded(f"{self._address}: no answer to {method.name} within {timeout_s} s") from None
        except Unavailable:
            failure = pumping.exception() if pumping.done() and not pumping.cancelled() else None
            if failure is not None:
                raise failure from None
            raise
        finally:
            self._end(call)
            pumping.cancel()
            await asyncio.gather(pumping, return_exceptions=True)

    async def close(self) -> None:
        self._closed = True
        for call in list(self._calls):
            call.fail(Unavailable(f"{self._address}: the connection was closed"))

    def _begin(self, method: Method, timeout_s: float | None) -> Call:
        if self._closed:
            raise Unavailable(f"{self._address}: the connection was closed")
        if self._process.crashed:
            raise Unavailable("this process has crashed")
        call = Call(self._network, self._process, self._address, self._credentials, method, timeout_s)
        self._calls[call] = None
        return call

    def _end(self, call: Call) -> None:
        self._calls.pop(call, None)
        call.over()
