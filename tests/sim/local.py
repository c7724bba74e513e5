"""The simulator's local socket: the twin of kvstore/transport/local.py.

The kernel loses nothing, so links do no harm here; what goes wrong is that an end crashes.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message

from kvstore.errors import (
    DeadlineExceeded,
    Incompatible,
    KVStoreError,
    ServiceError,
    SetupError,
    Unavailable,
    from_code,
)
from kvstore.transport.base import (
    Authenticator,
    CallContext,
    Connection,
    Credentials,
    MappedSegment,
    Meanwhile,
    Method,
)
from kvstore.transport.local_frames import number
from kvstore.transport.methods import CAPABILITIES, PROTOCOL_VERSION, WORKER_LOCAL
from kvstore.wire import common_pb2, worker_pb2
from tests.sim.loop import SimProcess
from tests.sim.memory import Mapping
from tests.sim.network import MemoryNetwork
from tests.sim.transport import MemoryServer

DELAY_MAX_S = 0.0002
INFLIGHT_MAX = 64
_HELLO = WORKER_LOCAL["Hello"]


class MemoryLocalServer(MemoryServer):
    """`Server` of one path on one host."""

    def __init__(
        self, network: MemoryNetwork, process: SimProcess, path: str, service: object, auth: Authenticator
    ) -> None:
        super().__init__(network, process, path, {"WorkerLocal": service}, auth)
        self.channels: dict[MemoryLocalChannel, None] = {}

    async def close(self, grace_s: float) -> None:
        place = (self.process.host, self.address)
        if self.network.sockets.get(place) is self:
            del self.network.sockets[place]
        if self.tasks:
            await asyncio.wait(list(self.tasks), timeout=grace_s)
        for task in list(self.tasks):
            task.cancel()
        for channel in list(self.channels):
            channel.end(Unavailable("the server is stopping"))
        if self.tasks:
            await asyncio.wait(list(self.tasks))


class MemoryLocalChannel:
    """`LocalChannel`, with `hello` and `on_late` as `kvstore.transport.local_client.LocalClient` has them."""

    def __init__(
        self, network: MemoryNetwork, client: SimProcess, server: MemoryLocalServer, credentials: Credentials
    ) -> None:
        self.hello = common_pb2.HelloReply()
        self.on_late: Callable[[Method, Any, list[MappedSegment]], None] | None = None
        self._network = network
        self._client = client
        self._server = server
        self._credentials = credentials
        self._connection = Connection(peer=f"sim:{client.name}")
        self._ended: KVStoreError | None = None
        self._pending: dict[asyncio.Future[Any], None] = {}
        self._handlers: dict[asyncio.Task[None], None] = {}
        self._places = asyncio.Semaphore(INFLIGHT_MAX)
        self._cleaned = False
        self._breaker = lambda: self.end(Unavailable("the peer closed the local socket"))
        server.channels[self] = None
        network.watch(self._breaker, client, server.process)

    @property
    def closed(self) -> bool:
        return self._ended is not None

    async def call(
        self, method: Method, request: Message, *, timeout_s: float, meanwhile: Meanwhile | None = None
    ) -> tuple[Any, list[MappedSegment]]:
        number(method)
        data = request.SerializeToString()
        reply: asyncio.Future[tuple[bytes, list[MappedSegment]]] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s), self._places:
                if self._ended is not None:
                    raise type(self._ended)(str(self._ended))
                self._pending[reply] = None
                self._network.later(self._delay(), lambda: self._arrive(method, data, reply))
                if meanwhile is not None:
                    meanwhile()
                message, segments = await reply
        except TimeoutError:
            raise DeadlineExceeded(f"{self._server.address}: no answer to {method.name} within {timeout_s} s") from None
        except BaseException:
            reply.cancel()
            raise
        finally:
            self._pending.pop(reply, None)
        assert method.reply is not None
        return method.reply.FromString(message), segments

    async def close(self) -> None:
        self.end(Unavailable(f"{self._server.address}: the connection was closed"))

    async def greet(self, timeout_s: float) -> None:
        hello = common_pb2.HelloRequest(protocol=PROTOCOL_VERSION, capabilities=CAPABILITIES, software="kvstore")
        request = worker_pb2.LocalHelloRequest(
            hello=hello, namespace=self._credentials.namespace, token=self._credentials.token
        )
        self.hello, _ = await self.call(_HELLO, request, timeout_s=timeout_s)

    def end(self, error: KVStoreError) -> None:
        """The connection is over for both ends: calls fail, and the server cleans up when its handlers have ended."""
        if self._ended is not None:
            return
        self._ended = error
        self._network.unwatch(self._breaker)
        self._server.channels.pop(self, None)
        for reply in list(self._pending):
            if not reply.done():
                reply.set_exception(type(error)(str(error)))
        self._network.later(self._delay(), self._clean_when_idle)

    def _delay(self) -> float:
        return self._network.rng.uniform(0.00001, DELAY_MAX_S)

    def _arrive(self, method: Method, data: bytes, reply: asyncio.Future[Any]) -> None:
        if self._ended is None and not self._server.process.crashed:
            task = self._server.start(self._handle(method, data, reply), method)
            self._handlers[task] = None
            task.add_done_callback(self._handled)

    def _handled(self, task: asyncio.Task[None]) -> None:
        self._handlers.pop(task, None)
        if self._ended is not None:
            self._clean_when_idle()

    async def _handle(self, method: Method, data: bytes, reply: asyncio.Future[Any]) -> None:
        """Runs in the server's process."""
        context = CallContext("", "", "", self._connection.peer)
        error: KVStoreError
        try:
            assert method.request is not None
            request: Any = method.request.FromString(data)
            if method is _HELLO and request.hello.protocol != PROTOCOL_VERSION:
                raise Incompatible(f"protocol {request.hello.protocol}, here {PROTOCOL_VERSION}: update the older side")
            context = self._server.context(_HELLO, self._credentials, self._client, None)
            context.connection = self._connection
            handler = getattr(self._server.services["WorkerLocal"], method.attribute)
            answer = handler(request, context)
            message = (await answer if inspect.isawaitable(answer) else answer).SerializeToString()
            self._network.later(self._delay(), lambda: self._deliver(method, message, context, reply))
            for what in context.afterwards:
                what()
            return
        except KVStoreError as failure:
            error = from_code(failure.code, str(failure))
            if method is _HELLO:
                self._network.later(DELAY_MAX_S, lambda: self.end(error))
        except Exception as failure:
            error = ServiceError(f"INTERNAL: the call failed in the server: {type(failure).__name__}")
            self._network.later(self._delay(), lambda: _fail(reply, error))
            raise
        self._network.later(self._delay(), lambda: _fail(reply, error))

    def _deliver(self, method: Method, message: bytes, context: CallContext, reply: asyncio.Future[Any]) -> None:
        if self._ended is not None or self._client.crashed:
            return
        segments: list[MappedSegment] = [
            Mapping(segment, writable, self._client) for segment, writable in context.attachments
        ]
        if not reply.done():
            reply.set_result((message, segments))
        elif self.on_late is not None:
            assert method.reply is not None
            self._client.context().run(self.on_late, method, method.reply.FromString(message), segments)
        elif segments:
            self.end(Unavailable(f"{self._server.address}: memory came after its caller had gone"))

    def _clean_when_idle(self) -> None:
        if self._cleaned or self._handlers or self._server.process.crashed:
            return
        self._cleaned = True
        for callback in self._connection.on_close:
            self._server.process.context().run(callback)


def _fail(reply: asyncio.Future[Any], error: KVStoreError) -> None:
    if not reply.done():
        reply.set_exception(error)


async def connect(
    network: MemoryNetwork, client: SimProcess, path: str, credentials: Credentials, timeout_s: float = 2.0
) -> MemoryLocalChannel:
    """Connected and greeted. Only a server on the client's own host is there."""
    server = network.sockets.get((client.host, path))
    if not isinstance(server, MemoryLocalServer):
        raise Unavailable(f"no worker answers on {path}")
    channel = MemoryLocalChannel(network, client, server, credentials)
    try:
        await channel.greet(timeout_s)
    except DeadlineExceeded as error:
        await channel.close()
        raise Unavailable(str(error)) from None
    except BaseException:
        await channel.close()
        raise
    network.note("local", client.name, path)
    return channel


async def serve(
    network: MemoryNetwork, process: SimProcess, path: str, service: object, auth: Authenticator
) -> MemoryLocalServer:
    """Listening when it returns. SetupError when a live server has the path."""
    if (process.host, path) in network.sockets:
        raise SetupError(f"another process listens on {path}: stop it or choose another with --socket")
    server = MemoryLocalServer(network, process, path, service, auth)
    network.sockets[process.host, path] = server
    return server
