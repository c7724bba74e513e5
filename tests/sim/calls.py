"""One call of the simulated network: two ordered, bounded, delayed pipes and the handler between them."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from kvstore.errors import BadRequest, Incompatible, KVStoreError, Overloaded, ServiceError, Unavailable, from_code
from kvstore.transport.base import Credentials, Method
from tests.sim.damage import Unruly, damaged
from tests.sim.loop import SimProcess
from tests.sim.network import MemoryNetwork

if TYPE_CHECKING:
    from tests.sim.transport import MemoryServer

WINDOW = 8  # messages on the way in one direction of a stream: flow control
CALLS_MAX = 1_024
STALLED_S = 0.05  # until a cut link is looked at again


class Pipe:
    """One direction of a call: ordered, bounded, delayed."""

    def __init__(self, network: MemoryNetwork) -> None:
        self._network = network
        self._items: deque[tuple[float, bytes | None]] = deque()  # (when it arrives, item); None: the end
        self._arrives = 0.0  # the last one: no overtaking within a stream
        self._error: KVStoreError | None = None
        self._changed = asyncio.Event()
        self.stalled: Callable[[], bool] = lambda: False  # whether the link is cut just now

    async def put(self, item: bytes) -> None:
        """Waits for room. Raises what broke the pipe."""
        while len(self._items) >= WINDOW and self._error is None:
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None:
            raise self._error
        self.put_now(item)

    def put_now(self, item: bytes | None) -> None:
        self._arrives = max(self._arrives, asyncio.get_running_loop().time() + self._network.delay())
        self._items.append((self._arrives, item))
        self._changed.set()

    def postpone(self, seconds: float) -> None:
        """What is on its way arrives later."""
        self._items = deque((arrives + seconds, item) for arrives, item in self._items)
        self._arrives += seconds

    def finish(self) -> None:
        """No item comes after this."""
        self.put_now(None)

    def fail(self, error: KVStoreError) -> None:
        """Both ends see `error` from now on; what is on the way is lost."""
        if self._error is None:
            self._error = error
            self._items.clear()
            self._changed.set()

    async def get(self) -> bytes | None:
        """The next item when it has arrived, None at the end."""
        while True:
            if self._error is not None:
                raise type(self._error)(str(self._error))
            loop = asyncio.get_running_loop()
            now, stalled = loop.time(), self.stalled()
            if self._items and self._items[0][0] <= now and not stalled:
                _, item = self._items[0]
                if item is not None:
                    self._items.popleft()
                self._changed.set()
                return item
            self._changed.clear()
            wait = STALLED_S if stalled else self._items[0][0] - now if self._items else None
            timer = (
                None if wait is None else loop.call_later(wait, self._changed.set)
            )  # less than a timeout and its exception
            try:
                await self._changed.wait()
            finally:
                if timer is not None:
                    timer.cancel()

    async def only(self) -> bytes:
        """The single item of this direction."""
        item = await self.get()
        if item is None:
            raise BadRequest("one message was expected, none came")
        return item


class Call:
    """One call from a client's process to whoever listens at an address."""

    def __init__(
        self,
        network: MemoryNetwork,
        client: SimProcess,
        address: str,
        credentials: Credentials,
        method: Method,
        timeout_s: float | None,
    ) -> None:
        self.network = network
        self.client = client
        self.address = address
        self.credentials = credentials
        self.method = method
        self.timeout_s = timeout_s
        self.up = Pipe(network)
        self.down = Pipe(network)
        self.server: MemoryServer | None = None
        self.unruly, self.unruly_replies = Unruly(network, method), Unruly(network, method)
        self._handler: asyncio.Task[Any] | None = None
        self._over = False
        self._seems_ended = False
        self._breaker = self._broken

    def connect(self, twice: bool = False) -> None:
        """Reach the server after the delay of a link."""
        self.network.later(self.network.delay(), lambda: self._arrive(twice))

    def _arrive(self, twice: bool) -> None:
        network, name = self.network, self.method.name
        if self._over:
            return
        server = network.listeners.get(self.address)
        node = self.address.rpartition(":")[0]
        if network.is_cut(self.client.name, node) or network.lost():
            network.note("lost", self.client.name, self.address, name)
            if network.rng.random() < 0.5:  # else nobody says anything, and the deadline ends it
                network.later(network.delay(), lambda: self.fail(Unavailable(f"{self.address}: no route")))
            return
        if server is None:
            network.later(network.delay(), lambda: self.fail(Unavailable(f"{self.address}: connection refused")))
            return
        if len(server.tasks) >= CALLS_MAX:
            self.fail(Overloaded("too many calls at a time: try again"))
            return
        network.note("call", self.client.name, self.address, name)
        self.server = server
        for pipe in (self.up, self.down):
            pipe.stalled = lambda: network.is_cut(self.client.name, server.process.name)
        network.watch(self._breaker, self.client, server.process, self.up.postpone)
        if self.client.crashed:  # what it sent before arrives; that it is gone shows later
            network.later(network.keepalive(), self._breaker)
        if twice:
            network.note("twice", self.client.name, self.address, name)
            copy = Call(network, self.client, self.address, self.credentials, self.method, self.timeout_s)
            copy.up._items.extend(self.up._items)
            server.start(copy.handle(server), self.method)
        self._handler = server.start(self.handle(server), self.method)

    async def handle(self, server: MemoryServer) -> None:
        """Runs in the server's process."""
        method = self.method
        try:
            service = server.services.get(method.service)
            handler = getattr(service, method.attribute, None)
            context = server.context(method, self.credentials, self.client, self.timeout_s)
            if handler is None:
                raise Incompatible(f"{self.address} does not know {method.path}")
            requests: Any = self._requests()
            if not method.client_stream:
                requests = await anext(requests, None)
            if method.server_stream:
                replies = handler(requests, context)
                if inspect.isawaitable(replies):
                    replies = await replies
                try:
                    async for reply in replies:
                        await self._send(encode_reply(method, reply))
                finally:
                    if hasattr(replies, "aclose"):
                        await replies.aclose()
            elif not await self._send(encode_reply(method, await handler(requests, context))):
                return
            self.down.finish()
        except KVStoreError as error:
            self.network.note("error", self.address, method.name, error.code)
            self._tell(from_code(error.code, str(error)))
        except asyncio.CancelledError:
            self._tell(Unavailable(f"{self.address}: the call was cancelled"))
            raise
        except Exception as error:  # a bug: the client learns what gRPC would tell it, the scenario fails at its end
            self._tell(ServiceError(f"INTERNAL: {method.name} failed in the server: {type(error).__name__}"))
            raise

    def _tell(self, error: KVStoreError) -> None:
        self.network.later(self.network.delay(), lambda: self.down.fail(error))

    async def _requests(self) -> AsyncGenerator[Any, None]:
        while True:
            try:
                item = await self.up.get()
            except KVStoreError:
                if self._seems_ended:
                    return
                await asyncio.Event().wait()  # until the cancellation
            if item is None:
                return
            if self.method.client_stream and self.network.lost():
                self.network.later(0.0, self._broken)
                await asyncio.Event().wait()
            for arrived in self.unruly.pass_on(item):
                yield arrived if self.method.request is None else self.method.request.FromString(arrived)

    async def _send(self, reply: bytes) -> bool:
        """Whether it is on its way; a stream that loses a message breaks instead."""
        if self.network.lost():
            self.network.note("lost", self.address, self.client.name, self.method.name)
            if self.method.server_stream:
                self.network.later(0.0, self._broken)
                await asyncio.Event().wait()
            if self.network.rng.random() < 0.5:  # else the deadline ends it
                self._tell(Unavailable(f"{self.address}: the connection broke"))
            return False
        if self.method.reply is None:
            reply = damaged(self.network, reply)
        for sent in self.unruly_replies.pass_on(reply):
            await self.down.put(sent)
        return True

    def fail(self, error: KVStoreError) -> None:
        """The client sees `error`; the handler is cancelled.

        As in gRPC, a stream of requests that breaks may look to its handler like one that ends, for a moment.
        """
        self._seems_ended = self.method.client_stream and self.network.rng.random() < 0.5
        self.up.fail(error)
        self.down.fail(error)
        self.network.unwatch(self._breaker)
        if self._seems_ended:
            self.network.later(self.network.delay(), self._cancel)
        else:
            self._cancel()

    def _broken(self) -> None:
        self.network.note("broken", self.client.name, self.address, self.method.name)
        self.fail(Unavailable(f"{self.address}: the connection broke"))

    def over(self) -> None:
        """The client wants no more: it has its reply, or has given up."""
        self._over = True
        self.network.unwatch(self._breaker)
        if self._handler is not None and not self._handler.done():
            self.network.later(self.network.delay(), lambda: self.fail(Unavailable("the client has gone")))

    def _cancel(self) -> None:
        if self._handler is not None and not self._handler.done():
            self._handler.cancel()


def encode_reply(method: Method, reply: Any) -> bytes:
    """Bytes of a reply: nothing is shared between two processes."""
    return bytes(reply) if method.reply is None else reply.SerializeToString()


def parse(method: Method, data: bytes) -> Any:
    return data if method.reply is None else method.reply.FromString(data)


async def pump(call: Call, method: Method, requests: AsyncIterator[Any]) -> None:
    count = 0
    try:
        async for request in requests:
            count += 1
            await call.up.put(request if method.request is None else request.SerializeToString())
            if not method.client_stream:
                break
            if method.name == "Announce" and call.client.on_announce is not None:
                call.network.later(0.0, call.client.on_announce)
                call.client.on_announce = None
        if not method.client_stream and not count:
            raise BadRequest(f"{method.name} needs one request")
        call.up.finish()
    except KVStoreError as error:
        call.fail(Unavailable("the requests failed"))
        if error is not call.up._error:
            raise
    except Exception:
        call.fail(Unavailable("the requests failed"))
        raise
