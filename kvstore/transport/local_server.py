"""The worker's end of the local socket: greets peers, runs handlers, ends what belongs to a connection with it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import socket  # noqa: TID251 - the real socket
import stat
from collections import deque
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message

from kvstore.errors import (
    BadRequest,
    DeadlineExceeded,
    Incompatible,
    KVStoreError,
    Overloaded,
    SetupError,
    Unauthenticated,
    Unavailable,
)
from kvstore.transport import local_frames as frames
from kvstore.transport.base import Authenticator, CallContext, Connection, Credentials, Method
from kvstore.transport.local_frames import Frame, LocalLimits
from kvstore.transport.local_link import Link, close_all, peer_of
from kvstore.transport.methods import PROTOCOL_VERSION, WORKER_LOCAL

HELLO_MAX_S = 10.0  # a peer that says nothing does not keep a place
ACCEPT_PAUSE_S = 1.0  # after the system ran out of descriptors
LOG = logging.getLogger("kvstore")
_HELLO = WORKER_LOCAL["Hello"]


class LocalServer:
    """`kvstore.transport.base.Server` on one socket file. The service has one function per `WorkerLocal` method, which
    returns the reply, sent at once, or a coroutine that returns it."""

    def __init__(self, path: str, service: object, auth: Authenticator, limits: LocalLimits) -> None:
        self.address = path
        self.service = service
        self.auth = auth
        self.limits = limits
        self._peers: dict[Peer, None] = {}
        self._loop = asyncio.get_running_loop()
        self._sock = _listen(path)
        self._file = os.stat(path)
        self._loop.add_reader(self._sock.fileno(), self._accept)

    async def close(self, grace_s: float) -> None:
        """Stop listening, give calls `grace_s`, end every connection; their `on_close` have run when it returns.

        Idempotent.
        """
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(self.address)
                if (found.st_dev, found.st_ino) == (self._file.st_dev, self._file.st_ino):  # not a successor's
                    os.unlink(self.address)
        await asyncio.gather(*(peer.stop(grace_s) for peer in list(self._peers)))

    def forget(self, peer: Peer) -> None:
        """`peer` has ended and cleaned up."""
        self._peers.pop(peer, None)

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            LOG.warning("the local socket can't accept: %s", error.strerror)
            self._loop.remove_reader(self._sock.fileno())
            self._loop.call_later(ACCEPT_PAUSE_S, self._listen_again)
            return
        sock.setblocking(False)
        peer = Peer(self, sock)
        if len(self._peers) >= self.limits.connections_max:
            peer.link.refuse(Overloaded("too many local connections: close some or raise local_connections_max"))
            return
        self._peers[peer] = None
        peer.link.resume()

    def _listen_again(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock.fileno(), self._accept)


class Peer:
    """One accepted connection. Its handlers finish before its `on_close` callbacks run: they may use its staging."""

    def __init__(self, server: LocalServer, sock: socket.socket) -> None:
        self._server = server
        self._limits = server.limits
        self._loop = asyncio.get_running_loop()
        self.connection = Connection(peer=peer_of(sock))
        self.link = Link(
            sock,
            frames.Decoder(self._limits.message_bytes_max, (frames.REQUEST,)),
            on_frame=self._on_frame,
            on_end=self._on_end,
            descriptors_max=0,
            send_bytes_max=2 * self._limits.message_bytes_max,
            on_room=self._dispatch,
            farewell=lambda error: frames.encode_error(0, 0, error),
        )
        self._admitted: CallContext | None = None  # once greeted
        self._greeting = False
        self._backlog: deque[Frame] = deque()  # of one read at most: reading pauses while there is one
        self._tasks: dict[asyncio.Task[None], Coroutine[Any, Any, Any]] = {}
        self._cleaned = asyncio.Event()
        self._hello_timer = self._loop.call_later(HELLO_MAX_S, self._hello_missing)

    async def stop(self, grace_s: float) -> None:
        """End it; returns when the `on_close` callbacks have run."""
        self.link.pause()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=grace_s)
        for task in list(self._tasks):
            task.cancel()
        self.link.end(Unavailable("the server is stopping"))
        await self._cleaned.wait()

    def _hello_missing(self) -> None:
        if self._admitted is None:
            self.link.refuse(Unauthenticated("no Hello came"))

    def _on_frame(self, frame: Frame, descriptors: list[int]) -> None:
        close_all(descriptors)
        method = frames.METHODS.get(frame.method)
        if self._admitted is None and (method is not _HELLO or self._greeting):
            raise Unauthenticated("the first frame must be Hello, and its answer be awaited")
        self._greeting = True
        self._backlog.append(frame)
        self._dispatch()

    def _dispatch(self) -> None:
        """Start what may run; read only while nothing waits."""
        while self._backlog and len(self._tasks) < self._limits.inflight_max and not self.link.full:
            frame = self._backlog.popleft()
            context, answer = self._begin(frame)
            if answer is not None:
                task = self._loop.create_task(self._later(frame, answer, context))
                self._tasks[task] = answer
                task.add_done_callback(self._done)
        if self._backlog or self.link.full or len(self._tasks) >= self._limits.inflight_max:
            self.link.pause()
        else:
            self.link.resume()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task).close()  # if it was cancelled before it began
        if self.link.closed:
            self._clean_when_idle()
        else:
            self._dispatch()

    def _begin(self, frame: Frame) -> tuple[CallContext, Coroutine[Any, Any, Any] | None]:
        """Answer a call, or begin to: then the coroutine that has the answer."""
        context = self._admitted or CallContext("", "", "", self.connection.peer)
        try:
            method, request = _request(frame)
            context = self._greet(request) if method is _HELLO else self._context(context)
            answer = getattr(self._server.service, method.attribute)(request, context)
            if inspect.iscoroutine(answer):
                return context, answer
            self._reply(frame, answer, context)
        except KVStoreError as error:
            self._fail(frame, error)
        except Exception as error:
            LOG.exception("WorkerLocal.%s failed", _name(frame))
            self._fail(frame, _broken(error))
        return context, None

    async def _later(self, frame: Frame, answer: Coroutine[Any, Any, Any], context: CallContext) -> None:
        try:
            async with asyncio.timeout(self._limits.call_max_s):
                reply = await answer
            self._reply(frame, reply, context)
        except TimeoutError:
            self._fail(frame, DeadlineExceeded(f"the call took longer than {self._limits.call_max_s} s"))
        except KVStoreError as error:
            self._fail(frame, error)
        except Exception as error:
            LOG.exception("WorkerLocal.%s failed", _name(frame))
            self._fail(frame, _broken(error))

    def _reply(self, frame: Frame, reply: Message, context: CallContext) -> None:
        if self._admitted is None:  # only a Hello comes here then
            self._admitted = context
            self._hello_timer.cancel()
        message = reply.SerializeToString()
        if len(message) > self._limits.message_bytes_max:
            raise Overloaded(f"the reply to {_name(frame)} has {len(message)} bytes: ask for less")
        descriptors = [_descriptor(segment) for segment, _ in context.attachments]
        flags = bytes(frames.WRITABLE if writable else 0 for _, writable in context.attachments)
        self.link.send(frames.encode(frames.REPLY, frame.method, frame.call, message, flags), descriptors)
        for what in context.afterwards:
            what()

    def _greet(self, request: Any) -> CallContext:
        if self._admitted is not None:
            raise BadRequest("this connection has been greeted already")
        if request.hello.protocol != PROTOCOL_VERSION:
            raise Incompatible(f"protocol {request.hello.protocol}, here {PROTOCOL_VERSION}: update the older side")
        credentials = Credentials(namespace=request.namespace, token=request.token)
        return self._context(self._server.auth.authenticate(credentials, peer=self.connection.peer, method=_HELLO))

    def _context(self, base: CallContext) -> CallContext:
        return CallContext(base.identity, base.role, base.namespace, base.peer, None, self.connection)

    def _fail(self, frame: Frame, error: KVStoreError) -> None:
        self.link.send(frames.encode_error(frame.method, frame.call, error))
        if self._admitted is None:  # a Hello that failed is the end of it
            self.link.end(error)

    def _on_end(self, error: KVStoreError) -> None:
        self._hello_timer.cancel()
        self._backlog.clear()
        self._clean_when_idle()

    def _clean_when_idle(self) -> None:
        if self._tasks or self._cleaned.is_set():
            return
        self._cleaned.set()
        for callback in self.connection.on_close:
            try:
                callback()
            except Exception:
                LOG.exception("cleaning up after %s failed", self.connection.peer)
        self._server.forget(self)


def _name(frame: Frame) -> str:
    method = frames.METHODS.get(frame.method)
    return method.name if method else str(frame.method)


def _broken(error: Exception) -> KVStoreError:
    return KVStoreError(f"the call failed in the server: {type(error).__name__}")


def _request(frame: Frame) -> tuple[Method, Any]:
    """What is called, and with what. Incompatible, BadRequest."""
    method = frames.METHODS.get(frame.method)
    if method is None:
        raise Incompatible(f"method {frame.method} of the local socket is not known here")
    assert method.request is not None
    try:
        return method, method.request.FromString(frame.payload)
    except DecodeError:
        raise BadRequest(f"the request to {method.name} is not a {method.request.DESCRIPTOR.name}") from None


def _descriptor(segment: Any) -> int:
    if segment.fd is None:
        raise ValueError("a segment without a descriptor cannot be passed to another process")
    descriptor: int = segment.fd
    return descriptor


def _listen(path: str) -> socket.socket:
    """A socket file of mode 0600, in a folder made with 0700 where there was none."""
    folder = Path(path).parent
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_stale(path)
        sock.bind(path)
        os.chmod(path, 0o600)  # before anyone can connect: nobody listens yet
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise SetupError(f"cannot listen on {path}: {error.strerror or error}: choose another with --socket") from None
    except SetupError:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    """Remove the socket file of a dead process. SetupError for a live one's, or for a file that is no socket."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SetupError(f"{path} is not a socket: choose another with --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # alive, and busy
    raise SetupError(f"another process listens on {path}: stop it or choose another with --socket")
