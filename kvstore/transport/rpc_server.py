"""The server half of `kvstore.transport.rpc`: one gate in front of every handler.

The gate authenticates, bounds the calls at a time, and turns errors into gRPC status codes; only health passes
without it. Handlers see messages and a `CallContext`, never gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import logging
import socket  # noqa: TID251 - to say why a bind failed
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any

import grpc  # noqa: TID251 - the real transport
import grpc.aio  # noqa: TID251
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from kvstore.errors import BadRequest, DeadlineExceeded, KVStoreError, Overloaded, SetupError
from kvstore.seams import Clock
from kvstore.transport.base import Authenticator, CallContext, Credentials, Method
from kvstore.transport.methods import SERVICES

HEALTH = "/grpc.health.v1.Health/"
LOG = logging.getLogger("kvstore")


class RpcServer:
    """`kvstore.transport.base.Server` on one port."""

    def __init__(
        self,
        clock: Clock,
        auth: Authenticator,
        *,
        calls_max: int,
        streams_max: int,
        call_max_s: float,
        options: list[tuple[str, int]],
        tls: Any = None,
    ) -> None:
        """`tls`: gRPC's server credentials; None: plain text."""
        self.address = ""
        self._tls = tls
        self._gate = Gate(clock, auth, calls_max=calls_max, streams_max=streams_max, call_max_s=call_max_s)
        self._health = health_aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[self._gate],
            options=[*options, ("grpc.so_reuseport", 0), ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000)],
            maximum_concurrent_rpcs=calls_max + streams_max + 64,  # the gate refuses first, and says why
        )

    async def start(self, address: str, services: Mapping[str, object]) -> None:
        """Listening and healthy when it returns. SetupError when the address can't be bound."""
        names = []
        for name, service in services.items():
            self._server.add_generic_rpc_handlers((_handlers(name, service, self._gate),))
            names.append(f"tiered_kvstore.v1.{name}")
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*names, "grpc.health.v1.Health", reflection.SERVICE_NAME), self._server)
        self.address = self._bind(address)
        await self._server.start()
        for name in ("", *names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def close(self, grace_s: float) -> None:
        """Refuse new calls, end streams both ways at once, give the others `grace_s`."""
        await self._health.enter_graceful_shutdown()
        stopping = asyncio.create_task(self._server.stop(grace_s))
        await asyncio.sleep(0)  # let it stop listening first
        self._gate.end_streams()
        await stopping

    def _bind(self, address: str) -> str:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise SetupError(f"cannot listen on {address}: write it as HOST:PORT")
        try:
            if self._tls is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, self._tls)
        except RuntimeError:
            bound = 0  # older gRPC answers 0 instead
        if not bound:
            raise SetupError(_bind_problem(host.strip("[]"), int(port)))
        return f"{host}:{bound}"


def _bind_problem(host: str, port: int) -> str:
    """Why gRPC could not bind, found by trying it plainly: gRPC itself only logs it."""
    try:
        family, kind, proto, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
            probe.listen()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return f"cannot listen on {host}:{port}: {error.strerror}: choose another with --bind"
    return f"port {port} is in use: choose another with --bind"


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """The one place where calls are let in. Health needs nothing; everything else is authenticated here."""

    def __init__(
        self, clock: Clock, auth: Authenticator, *, calls_max: int, streams_max: int, call_max_s: float
    ) -> None:
        self._clock = clock
        self._auth = auth
        self._call_max_s = call_max_s
        self._room = {False: calls_max, True: streams_max}
        self._methods: dict[str, Method] = {}
        self._streams: dict[asyncio.Task[Any], None] = {}
        self._closing = False

    def learn(self, method: Method) -> None:
        """`method` is served by a handler that takes (request, CallContext)."""
        self._methods[method.path] = method

    def end_streams(self) -> None:
        """Streams both ways end with UNAVAILABLE, now and from now on."""
        self._closing = True
        for task in list(self._streams):
            task.cancel()

    async def intercept_service(self, continuation: Callable[..., Any], details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or details.method.startswith(HEALTH):
            return handler
        method = self._methods.get(details.method) or _foreign(details.method, handler)
        if handler.response_streaming:
            inner = handler.stream_stream or handler.unary_stream
            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            behaviour: Any = self._streamed(method, inner)
        else:
            inner = handler.stream_unary or handler.unary_unary
            make = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            behaviour = self._single(method, inner)
        return make(behaviour, handler.request_deserializer, handler.response_serializer)

    def _single(self, method: Method, inner: Any) -> Any:
        async def behaviour(request: Any, context: Any) -> Any:
            async with self._admitted(method, context) as call:
                return await inner(request, call)

        return behaviour

    def _streamed(self, method: Method, inner: Any) -> Any:
        async def behaviour(request: Any, context: Any) -> AsyncGenerator[Any, None]:
            async with self._admitted(method, context) as call, contextlib.aclosing(inner(request, call)) as replies:
                async for reply in replies:
                    yield reply

        return behaviour

    @contextlib.asynccontextmanager
    async def _admitted(self, method: Method, context: Any) -> AsyncGenerator[CallContext, None]:
        """Errors of the gate and of the handler both leave as a status."""
        long = method.lasting
        task = asyncio.current_task()
        assert task is not None
        admitted = False
        try:
            call = self._authenticate(method, context)
            if self._room[long] <= 0:
                raise Overloaded("too many calls at a time: try again")
            self._room[long] -= 1
            admitted = True
            if long:
                self._streams[task] = None
            async with asyncio.timeout(None if long else self._call_max_s):
                yield call
        except KVStoreError as error:
            await _abort(context, error.code, str(error))
        except TimeoutError:
            await _abort(context, DeadlineExceeded.code, f"{method.name} took longer than {self._call_max_s} s")
        except asyncio.CancelledError:
            if not (self._closing and long):
                raise
            task.uncancel()
            await _abort(context, "UNAVAILABLE", "the server is stopping")
        except (grpc.aio.AbortError, GeneratorExit):
            raise
        except Exception as error:
            LOG.exception("%s.%s failed", method.service, method.name)
            await _abort(context, "INTERNAL", f"{method.name} failed in the server: {type(error).__name__}")
        finally:
            if admitted:
                self._room[long] += 1
            self._streams.pop(task, None)

    def _authenticate(self, method: Method, context: Any) -> CallContext:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        scheme, _, token = metadata.get("authorization", "").partition(" ")
        credentials = Credentials(
            namespace=metadata.get("kvstore-namespace", "default"), token=token if scheme.lower() == "bearer" else ""
        )
        call = self._auth.authenticate(credentials, peer=context.peer(), method=method)
        remaining = context.time_remaining()
        if remaining is not None and remaining < 10 * 365 * 86400:  # gRPC's "never" is centuries away
            call.deadline = self._clock.monotonic() + remaining
        return call


async def _abort(context: Any, code: str, message: str) -> None:
    await context.abort(getattr(grpc.StatusCode, code), message)


def _foreign(path: str, handler: Any) -> Method:
    """A service of gRPC's own, such as reflection, as a method the authenticator can judge."""
    _, service, name = path.split("/", 2)
    return Method(service, name, None, None, bool(handler.request_streaming), bool(handler.response_streaming))


def _handlers(service_name: str, service: object, gate: Gate) -> Any:
    """Serialisers stay out of gRPC: handlers take and return bytes, and a malformed request is INVALID_ARGUMENT."""
    table: dict[str, Any] = {}
    for method in SERVICES[service_name].values():
        handler = getattr(service, method.attribute, None)
        if handler is None:
            continue
        gate.learn(method)
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[method.client_stream, method.server_stream]
        behaviour = _streaming(method, handler) if method.server_stream else _single(method, handler)
        table[method.name] = make(behaviour)
    return grpc.method_handlers_generic_handler(f"tiered_kvstore.v1.{service_name}", table)


def _single(method: Method, handler: Any) -> Any:
    async def behaviour(request: Any, call: CallContext) -> bytes:
        return encode_reply(method, await handler(_incoming(method, request), call))

    return behaviour


def _streaming(method: Method, handler: Any) -> Any:
    async def behaviour(request: Any, call: CallContext) -> AsyncGenerator[bytes, None]:
        replies = handler(_incoming(method, request), call)
        if inspect.isawaitable(replies):
            replies = await replies
        try:
            async for reply in replies:
                yield encode_reply(method, reply)
        finally:
            if hasattr(replies, "aclose"):
                await replies.aclose()

    return behaviour


def encode_reply(method: Method, reply: Any) -> bytes:
    """A message or a raw frame as the bytes of the wire."""
    data: bytes = reply if method.reply is None else reply.SerializeToString()
    return data


def _incoming(method: Method, request: Any) -> Any:
    if not method.client_stream:
        return parse_request(method, request)
    return _parsed(method, request)


async def _parsed(method: Method, requests: AsyncIterator[bytes]) -> AsyncGenerator[Any, None]:
    async for request in requests:
        yield parse_request(method, request)


def parse_request(method: Method, data: bytes) -> Any:
    """The message of a request, BadRequest when it is none."""
    if method.request is None:
        return data
    try:
        return method.request.FromString(data)
    except DecodeError:
        raise BadRequest(f"the request to {method.name} is not a {method.request.DESCRIPTOR.name}") from None
