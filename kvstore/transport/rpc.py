"""gRPC, the transport between hosts, with the raw data channel beside it. `kvstore.transport.rpc_server` is its other
half.

Messages are serialised here, not by gRPC, so that streams without a message type carry raw frames (bytes) and a
malformed message is an error of ours. Every error that leaves this module is a `kvstore.errors` one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import grpc  # noqa: TID251 - the real transport
import grpc.aio  # noqa: TID251
from google.protobuf.message import DecodeError, Message

from kvstore.config import MIB
from kvstore.errors import BadRequest, Corrupt, DeadlineExceeded, Incompatible, KVStoreError, Unavailable, from_code
from kvstore.seams import Clock, Pool
from kvstore.transport import data_client, local
from kvstore.transport.base import (
    Authenticator,
    Channel,
    Credentials,
    DataChannel,
    DataService,
    LocalChannel,
    Method,
    Server,
)
from kvstore.transport.data_server import DataServer
from kvstore.transport.malloc import keep_freed_memory
from kvstore.transport.rpc_server import RpcServer
from kvstore.transport.tls import (
    PLAIN,
    Tls,
    channel_context,
    channel_credentials,
    server_context,
    server_credentials,
)

COMMON_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.http2.bdp_probe", 0),  # the probe shrinks the window of bursty streams
    ("grpc.http2.lookahead_bytes", 8 * MIB),
    ("grpc.http2.max_frame_size", 1 * MIB),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),  # a quiet announce stream is kept alive too
)
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.enable_retries", 0),  # retries have a budget, and it is the caller's
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # two channels to one address are two connections
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


class GrpcTransport:
    """`kvstore.transport.base.Transport`: gRPC between hosts, Unix sockets on this one.

    message_bytes_max: of one message in either direction. calls_max: served at a time, beyond it Overloaded;
    streams_max: the same for streams both ways, which live long. call_max_s: the longest a served call may take,
    streams both ways excepted. tune_malloc: set this process's malloc thresholds (`kvstore.transport.malloc`).
    tls: how it serves and calls; SetupError for a file that can't be read.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        message_bytes_max: int = 8 * MIB,
        calls_max: int = 256,
        streams_max: int = 4096,
        call_max_s: float = 300.0,
        local_connections_max: int = 256,
        connect_timeout_s: float = 2.0,
        tune_malloc: bool = True,
        tls: Tls = PLAIN,
    ) -> None:
        if tune_malloc:
            keep_freed_memory()
        self._serving = None if tls.serving is None else server_credentials(tls.serving)
        self._calling = None if tls.calling is None else channel_credentials(tls.calling)
        self._data_serving = None if tls.serving is None else server_context(tls.serving)
        self._data_calling = None if tls.calling is None else channel_context(tls.calling)
        self._clock = clock
        self._message_bytes_max = message_bytes_max
        self._calls_max = calls_max
        self._streams_max = streams_max
        self._call_max_s = call_max_s
        self._local = local.LocalLimits(
            message_bytes_max=message_bytes_max,
            connections_max=local_connections_max,
            connect_timeout_s=connect_timeout_s,
            call_max_s=call_max_s,
        )

    async def connect(self, address: str, credentials: Credentials) -> Channel:
        """Lazy: fails on the first call, not here. Unavailable in a process forked from one that used gRPC."""
        _used_here()
        return RpcChannel(address, credentials, [*self._options(), *CHANNEL_OPTIONS], self._calling)

    async def serve(self, address: str, services: Mapping[str, object], auth: Authenticator) -> Server:
        """Listening when it returns. SetupError when the address can't be bound."""
        server = RpcServer(
            self._clock,
            auth,
            calls_max=self._calls_max,
            streams_max=self._streams_max,
            call_max_s=self._call_max_s,
            options=self._options(),
            tls=self._serving,
        )
        await server.start(address, services)
        return server

    async def connect_local(self, path: str, credentials: Credentials) -> LocalChannel:
        """Connected and greeted."""
        return await local.connect(path, credentials, self._local)

    async def serve_local(self, path: str, service: object, auth: Authenticator) -> Server:
        """Listening when it returns. SetupError when the path can't be bound or a live server has it."""
        return await local.serve(path, service, auth, self._local)

    async def connect_data(self, address: str, ticket: bytes, pool: Pool, *, timeout_s: float) -> DataChannel:
        """Connected and let in."""
        return await data_client.connect(
            address,
            ticket,
            pool,
            self._data_calling,
            timeout_s=timeout_s,
            message_bytes_max=self._message_bytes_max,
        )

    async def serve_data(
        self, address: str, service: DataService, pool: Pool, *, connections_max: int, idle_s: float
    ) -> Server:
        """Listening when it returns. SetupError when the address can't be bound."""
        server = DataServer(
            service,
            pool,
            self._clock,
            tls=self._data_serving,
            connections_max=connections_max,
            idle_s=idle_s,
            call_max_s=self._call_max_s,
            message_bytes_max=self._message_bytes_max,
        )
        server.start(address)
        return server

    def _options(self) -> list[tuple[str, int]]:
        return [
            *COMMON_OPTIONS,
            ("grpc.max_send_message_length", self._message_bytes_max),
            ("grpc.max_receive_message_length", self._message_bytes_max),
        ]


_USED: list[int] = []  # the process that first used gRPC


def _used_here() -> None:
    """gRPC does not live through a fork: calls of the child would wait for threads that it does not have."""
    if not _USED:
        _USED.append(os.getpid())
    elif _USED[0] != os.getpid():
        raise Unavailable("gRPC was in use before this process was forked: spawn it instead, or fork before any client")


class RpcChannel:
    """`kvstore.transport.base.Channel` over one HTTP/2 connection."""

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        options: list[tuple[str, int]],
        tls: tuple[Any, list[tuple[str, str]]] | None = None,
    ) -> None:
        self._address = address
        if tls is None:
            self._channel = grpc.aio.insecure_channel(address, options=options)
        else:
            self._channel = grpc.aio.secure_channel(address, tls[0], options=[*options, *tls[1]])
        self._callables: dict[str, Any] = {}
        self._calls: dict[Any, None] = {}  # in flight
        self._over = False
        metadata = [("kvstore-namespace", credentials.namespace)]
        if credentials.token:
            metadata.append(("authorization", f"Bearer {credentials.token}"))
        self._metadata = tuple(metadata)

    async def unary(self, method: Method, request: Message, *, timeout_s: float) -> Any:
        """The reply. The deadline travels with the call: the server stops working when it has passed."""
        call = self._callable(method)(request.SerializeToString(), timeout=timeout_s, metadata=self._metadata)
        self._calls[call] = None
        try:
            reply = await call
        except grpc.aio.AioRpcError as error:
            raise self._error(method, error, timeout_s) from None
        except asyncio.CancelledError:
            if not _cancelling():
                raise self._closed(method) from None
            raise
        finally:
            del self._calls[call]
        return _parse(method, reply)

    async def stream(
        self, method: Method, requests: AsyncIterator[Any], *, timeout_s: float | None
    ) -> AsyncGenerator[Any, None]:
        """Messages, or frames (bytes) where the method has no reply type. What `requests` raises is raised here."""
        pump: asyncio.Task[None] | None = None
        if method.client_stream:
            call = self._callable(method)(timeout=timeout_s, metadata=self._metadata)
            pump = asyncio.create_task(_pump(call, method, requests))
        else:
            first = _encode(method, await _only(method, requests))
            call = self._callable(method)(first, timeout=timeout_s, metadata=self._metadata)
        self._calls[call] = None
        try:
            if method.server_stream:
                async for reply in call:
                    yield _parse(method, reply)
            else:
                yield _parse(method, await call)
        except grpc.aio.AioRpcError as error:
            _raise_failure(pump)
            raise self._error(method, error, timeout_s) from None
        except asyncio.CancelledError:
            if not _cancelling():
                _raise_failure(pump)
                raise self._closed(method) from None
            raise
        finally:
            del self._calls[call]
            call.cancel()
            if pump is not None:
                pump.cancel()
                await asyncio.gather(pump, return_exceptions=True)

    async def close(self) -> None:
        """Calls in flight end with Unavailable."""
        self._over = True
        for call in list(self._calls):  # older gRPC forgets some of them
            call.cancel()
        await self._channel.close(None)

    def _callable(self, method: Method) -> Any:
        if self._over:
            raise self._closed(method)
        if method.path not in self._callables:
            make = {
                (False, False): self._channel.unary_unary,
                (False, True): self._channel.unary_stream,
                (True, False): self._channel.stream_unary,
                (True, True): self._channel.stream_stream,
            }[method.client_stream, method.server_stream]
            self._callables[method.path] = make(method.path)
        return self._callables[method.path]

    def _closed(self, method: Method) -> Unavailable:
        return Unavailable(f"{self._address}: the connection was closed during {method.name}")

    def _error(self, method: Method, error: Any, timeout_s: float | None) -> KVStoreError:
        code = error.code().name
        lines = (error.details() or code).splitlines()
        message = lines[0] if lines else code
        if code == "DEADLINE_EXCEEDED":
            return DeadlineExceeded(f"{self._address}: no answer to {method.name} within {timeout_s} s")
        if code in ("UNAVAILABLE", "CANCELLED"):
            return Unavailable(f"{self._address}: {message}")
        if code == "UNIMPLEMENTED":
            return Incompatible(f"{self._address} does not know {method.path}: {message}")
        return from_code(code, message)


def _cancelling() -> bool:
    """Whether this task itself is being cancelled: gRPC cancels the waiters of a closed channel, too."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _encode(method: Method, message: Any) -> bytes:
    data: bytes = message if method.request is None else message.SerializeToString()
    return data


def _parse(method: Method, data: bytes) -> Any:
    if method.reply is None:
        return data
    try:
        return method.reply.FromString(data)
    except DecodeError:
        raise Corrupt(f"the reply to {method.name} is not a {method.reply.DESCRIPTOR.name}") from None


async def _only(method: Method, requests: AsyncIterator[Any]) -> Any:
    async for request in requests:
        return request
    raise BadRequest(f"{method.name} needs one request")


async def _pump(call: Any, method: Method, requests: AsyncIterator[Any]) -> None:
    """Write requests until they end or the call does. A failure of `requests` cancels the call and is kept."""
    try:
        async for request in requests:
            await call.write(_encode(method, request))
        await call.done_writing()
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        return  # the call ended first; whoever reads it learns why
    except Exception:
        call.cancel()
        raise


def _raise_failure(pump: asyncio.Task[None] | None) -> None:
    if pump is not None and pump.done() and not pump.cancelled():
        failure = pump.exception()
        if failure is not None:
            raise failure
