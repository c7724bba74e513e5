"""The network as a port: calls with protobuf messages, streams, and calls on the same host that pass memory.

Implementations: `kvstore.transport.rpc` (gRPC), `kvstore.transport.local` (Unix socket), and the simulator's
in-memory twin (tests/sim/transport.py) which drops, delays, reorders and partitions.
A service is any object with one coroutine per `Method`, named by `Method.attribute`. A stream of requests that breaks
may look to its handler like one that ends, until the handler is cancelled: a handler knows from the messages
themselves whether it has them all.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

from google.protobuf.message import Message

from kvstore.seams import Pool, Segment
from kvstore.types import Buffer


@cache
def _attribute(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


@dataclass(frozen=True, slots=True)
class Method:
    """One call of the proto. `request` or `reply` None: raw frames (bytes) of that stream."""

    service: str  # "Coordinator" | "Worker" | "WorkerLocal"
    name: str
    request: type[Message] | None
    reply: type[Message] | None
    client_stream: bool = False
    server_stream: bool = False
    lasting: bool = False  # a stream without an end: no bound on its time, and places of its own at the server

    @property
    def path(self) -> str:
        return f"/tiered_kvstore.v1.{self.service}/{self.name}"

    @property
    def attribute(self) -> str:
        return _attribute(self.name)


@dataclass(slots=True)
class Connection:
    """One local-socket peer, as the server sees it. Its holds and staging end with it."""

    peer: str
    on_close: list[Callable[[], None]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class CallContext:
    """What a handler knows about its caller. Made by the interceptor, after authentication."""

    identity: str
    role: str  # "client" | "node"
    namespace: str
    peer: str
    deadline: float | None = None  # of the server's monotonic clock
    connection: Connection | None = None  # local socket only
    attachments: list[tuple[Segment, bool]] = field(default_factory=list)  # (segment, writable) passed with the reply
    afterwards: list[Callable[[], None]] = field(default_factory=list)  # done once the reply is on its way

    def attach(self, segment: Segment, *, writable: bool) -> None:
        """Pass memory along with the reply. Local socket only."""
        self.attachments.append((segment, writable))

    def after(self, what: Callable[[], None]) -> None:
        """What the caller need not wait for: done right after the reply, before anything else. Local socket only."""
        self.afterwards.append(what)


class MappedSegment(Protocol):
    """Memory a peer passed, mapped here. `view` is read-only unless passed as writable."""

    view: memoryview

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client shows on every call: in gRPC metadata `authorization: Bearer TOKEN` and
    `kvstore-namespace`, on the local socket in its Hello."""

    namespace: str = "default"
    token: str = field(default="", repr=False)


class Channel(Protocol):
    """A client's connection to one address. Errors are `kvstore.errors`, never the transport library's."""

    async def unary(self, method: Method, request: Message, *, timeout_s: float) -> Any: ...

    def stream(
        self, method: Method, requests: AsyncIterator[Any], *, timeout_s: float | None
    ) -> AsyncGenerator[Any, None]:
        """Any method with a stream; a side that is not a stream carries exactly one message.
        Closing the iterator (`aclose`) cancels the call."""

    async def close(self) -> None: ...


Meanwhile = Callable[[], None]
"""What a caller has to do before it can use the reply, and the peer need not wait for."""


class LocalChannel(Protocol):
    """A client's connection to a worker on its host.

    `on_late(method, reply, segments)` gets a reply whose caller has gone. Without it such a reply is dropped, and the
    connection ends if it carried memory.
    """

    on_late: Callable[[Method, Any, list[MappedSegment]], None] | None
    hello: Any  # HelloReply of the worker

    async def call(
        self, method: Method, request: Message, *, timeout_s: float, meanwhile: Meanwhile | None = None
    ) -> tuple[Any, list[MappedSegment]]:
        """`meanwhile` is called once, when the request has left; what it raises ends the call."""

    @property
    def closed(self) -> bool: ...

    async def close(self) -> None: ...


class Landing(Protocol):
    """Where the frames of a Get go. Called by whoever receives them, in a byte mover, in turns: places, landed, ..."""

    def places(self, header: bytes, nbytes: int) -> Sequence[memoryview]:
        """The header of a frame has come (a GetHeader), `nbytes` of data follow: writable memory for all of them, in
        order. Corrupt where the stream is none."""

    def landed(self) -> None:
        """The data of that frame is in its places. Corrupt where the stream is none."""


Begun = Callable[[], Awaitable[None]]
"""Called on the event loop when the first frame of a Get has landed, which says what will come: time to find room."""


class DataChannel(Protocol):
    """A raw connection to one worker, opened with a ticket; one call at a time. ServiceError, UsageError, Corrupt."""

    async def get(self, request: Any, landing: Landing, *, timeout_s: float, begun: Begun | None = None) -> None:
        """A GetRequest; its frames go to `landing`, those after the first once `begun` has returned. Cancelled: nobody
        touches the landing's memory any more."""

    async def put(self, header: Any, parts: Sequence[Buffer], *, timeout_s: float) -> Any:
        """A PutHeader, then the raw bytes of its blocks; the PutReply."""

    @property
    def usable(self) -> bool:
        """Whether another call may be made."""

    async def close(self) -> None: ...


OutgoingFrames = Iterator[tuple[bytes, Sequence[Buffer]]]
"""(serialised GetHeader, stored bytes where they lie) of each frame. Advanced in a byte mover, once the frame before
is sent."""


class Incoming(Protocol):
    """The raw bytes of a put, for a `DataService`."""

    async def begin(self) -> None:
        """The caller may send."""

    async def fill(self, target: memoryview) -> None:
        """The next bytes; Unavailable when the caller has gone. Cancelled: nobody writes to `target` any more."""


class DataService(Protocol):
    """What is served on raw connections (workers/data.py)."""

    def admit(self, ticket: bytes, host: str) -> CallContext:
        """The context of a connection from `host`. Unauthenticated for a ticket that is not good for it. Mutates: it
        is good only once."""

    def get(self, request: Any, context: CallContext) -> AbstractAsyncContextManager[OutgoingFrames]: ...

    async def put(self, header: Any, context: CallContext, incoming: Incoming) -> Message: ...


class Server(Protocol):
    address: str  # where it really listens (the port is known now)

    async def close(self, grace_s: float) -> None: ...


class Authenticator(Protocol):
    """The one interceptor of both servers: `kvstore.auth.Authenticator`."""

    def authenticate(self, credentials: Credentials, *, peer: str, method: Method) -> CallContext:
        """Raises Unauthenticated, or NotGranted. Pure."""


class Transport(Protocol):
    async def connect(self, address: str, credentials: Credentials) -> Channel:
        """Lazy: fails on the first call, not here."""

    async def serve(self, address: str, services: Mapping[str, object], auth: Authenticator) -> Server:
        """`services`: name -> object. SetupError when the address can't be bound."""

    async def connect_local(self, path: str, credentials: Credentials) -> LocalChannel:
        """Connected and greeted (WorkerLocal.Hello), or Unavailable / Unauthenticated / NotGranted / Incompatible."""

    async def serve_local(self, path: str, service: object, auth: Authenticator) -> Server: ...

    async def connect_data(self, address: str, ticket: bytes, pool: Pool, *, timeout_s: float) -> DataChannel:
        """A raw connection; `pool` has a thread for each. Unavailable when nobody is there, or the ticket is
        refused."""

    async def serve_data(
        self, address: str, service: DataService, pool: Pool, *, connections_max: int, idle_s: float
    ) -> Server:
        """Raw connections, at most so many; beyond it the longest idle one ends. SetupError."""
