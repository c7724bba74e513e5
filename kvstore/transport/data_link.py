"""One raw connection, plain or TLS: small frames on the event loop, bulk in a thread of its own.

Waiting in that thread has no bound of its own: whoever gives up shuts the connection down, which wakes it, and only
then lets go of the buffers.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket  # noqa: TID251 - the real socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from kvstore.errors import Unavailable
from kvstore.seams import Pool
from kvstore.transport import data_frames as frames
from kvstore.types import Buffer

T = TypeVar("T")

BUFFERS_AT_ONCE = 512
"""Of one sendmsg; the kernel takes 1,024 (IOV_MAX)."""


class DataLink:
    """A connected socket, which it owns. `message_bytes_max`: of a frame's header, and of its data in a Get."""

    def __init__(self, sock: socket.socket, pool: Pool, message_bytes_max: int) -> None:
        self._plain, self._pool = sock, pool
        self._socket: socket.socket | ssl.SSLSocket = sock
        self._message_bytes_max = message_bytes_max
        self.broken = False
        self._running = self._closing = False
        self._waiting: asyncio.Future[None] | None = None
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer_host = str(sock.getpeername()[0])

    async def secure(self, context: ssl.SSLContext, *, name: str | None = None) -> None:
        """TLS from here on: as a client that talks to `name`, or as a server. Unavailable where the two don't agree."""
        twin = self._plain.dup()  # wrapping takes it over; shutting down either ends the one connection
        try:
            secured = context.wrap_socket(
                twin, server_side=name is None, server_hostname=name, do_handshake_on_connect=False
            )
        except (OSError, ValueError) as error:
            twin.close()
            raise Unavailable(f"no TLS with {self.peer_host}: {error}") from None
        self._socket = secured
        await self._until(secured.do_handshake, writing=False)

    # --- small things, on the loop -----------------------------------------------------------------------------------

    async def send(self, data: bytes) -> None:
        """All of it. Unavailable when the peer has gone."""
        view = memoryview(data)
        while view:
            part = view
            view = view[await self._until(lambda part=part: self._socket.send(part), writing=True) :]  # type: ignore[misc]

    async def receive(self, nbytes: int) -> bytes:
        """Exactly so many. Unavailable at the end of the connection."""
        target = memoryview(bytearray(nbytes))
        done = 0
        while done < nbytes:
            rest = target[done:]
            got = await self._until(lambda rest=rest: self._socket.recv_into(rest), writing=False)  # type: ignore[misc]
            if not got:
                raise self._ended()
            done += got
        return bytes(target)

    async def receive_frame(self) -> tuple[int, bytes, int]:
        """(kind, header, data bytes that follow). Corrupt, Unavailable."""
        packed = await self.receive(frames.HEAD.size)
        kind, header_bytes, data_bytes = frames.parse(packed, self._message_bytes_max)
        return kind, await self.receive(header_bytes), data_bytes

    async def readable(self) -> None:
        """Until something comes, or the end does."""
        if isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            return
        await self._ready(writing=False)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """What is waited for within is given up, and the connection with it, when the peer goes or speaks: Unavailable.
        Looks from the first wait on: what is done at once costs no watch."""
        task = asyncio.current_task()
        assert task is not None
        loop, descriptor, before, gone = asyncio.get_running_loop(), self._plain.fileno(), task.cancelling(), False

        def went() -> None:
            nonlocal gone
            gone = True
            loop.remove_reader(descriptor)
            self.abort()
            task.cancel()

        def watch() -> None:
            if self.broken or (isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()):
                went()
            else:
                loop.add_reader(descriptor, went)

        watching = loop.call_soon(watch)
        try:
            yield
        except asyncio.CancelledError:
            if gone and task.cancelling() == before + 1:  # else somebody wanted its end, too
                raise Unavailable("the peer went, or spoke out of turn") from None
            raise
        finally:
            watching.cancel()
            loop.remove_reader(descriptor)
            if gone:
                task.uncancel()

    def quiet(self) -> bool:
        """Whether it stands and nothing has come, not even its end. Pure."""
        if self.broken:
            return False
        try:
            self._plain.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    async def _until(self, operation: Callable[[], T], *, writing: bool) -> T:
        while True:
            try:
                return operation()
            except ssl.SSLWantReadError:
                direction = False
            except ssl.SSLWantWriteError:
                direction = True
            except BlockingIOError:
                direction = writing
            except (OSError, ValueError) as error:
                raise self._ended(error) from None
            await self._ready(writing=direction)

    async def _ready(self, *, writing: bool) -> None:
        if self.broken:
            raise self._ended()
        loop, descriptor = asyncio.get_running_loop(), self._plain.fileno()
        waiting = self._waiting = loop.create_future()
        add, remove = (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
        add(descriptor, _wake, waiting)
        try:
            await waiting
        finally:
            self._waiting = None
            remove(descriptor)
        if self.broken:
            raise self._ended()

    # --- bulk, in a thread -------------------------------------------------------------------------------------------

    async def bulk(self, function: Callable[[], T]) -> T:
        """Run what sends and receives with `send_all`, `fill`, `take_frame`. Cancelled: the connection is shut down,
        and the function has returned, before this does."""
        self._running = True
        try:
            return await self._pool.run_abortable(self.abort, self._blocking, function)
        except asyncio.CancelledError:
            self.abort()  # also where it had not begun
            raise
        finally:
            self._running = False
            if self._closing:
                self.close()

    def _blocking(self, function: Callable[[], T]) -> T:
        self._block(True)
        try:
            return function()
        except (OSError, ValueError) as error:
            raise self._ended(error) from None
        finally:
            self._block(False)

    def _block(self, blocking: bool) -> None:
        for one in (self._plain, self._socket):
            if one.fileno() >= 0:
                one.setblocking(blocking)

    def send_all(self, parts: Sequence[Buffer]) -> None:
        """Thread."""
        if isinstance(self._socket, ssl.SSLSocket):
            for part in parts:
                self._socket.sendall(part)
            return
        views = [memoryview(part) for part in parts]
        at = 0
        while at < len(views):
            some = views[at : at + BUFFERS_AT_ONCE]
            sent = self._socket.sendmsg(some)
            for view in some:
                if sent < view.nbytes:
                    break
                sent -= view.nbytes
                at += 1
            if sent:
                views[at] = views[at][sent:]

    def fill(self, target: memoryview) -> None:
        """Thread. Unavailable at the end of the connection."""
        done, size = 0, len(target)
        while done < size:
            got = self._socket.recv_into(target[done:])
            if not got:
                raise self._ended()
            done += got

    def fill_all(self, targets: Sequence[memoryview]) -> None:
        """Thread. `fill` of one after the other, in few calls: between two, others take the interpreter."""
        if isinstance(self._socket, ssl.SSLSocket):
            for target in targets:
                self.fill(target)
            return
        at = 0
        while at < len(targets):
            some = targets[at : at + BUFFERS_AT_ONCE]
            size = sum(map(len, some))
            got = self._socket.recvmsg_into(some, 0, socket.MSG_WAITALL)[0] if size else 0
            if size and not got:
                raise self._ended()
            for target in some:
                at += 1
                if got < len(target):
                    self.fill(target[got:])  # a signal came: rarely, so the rest of one by itself
                    break
                got -= len(target)

    def take_frame(self) -> tuple[int, bytes, int]:
        """Thread. `receive_frame`."""
        packed = memoryview(bytearray(frames.HEAD.size))
        self.fill(packed)
        kind, header_bytes, data_bytes = frames.parse(bytes(packed), self._message_bytes_max)
        header = memoryview(bytearray(header_bytes))
        self.fill(header)
        return kind, bytes(header), data_bytes

    # --- the end -----------------------------------------------------------------------------------------------------

    def _ended(self, error: Exception | None = None) -> Unavailable:
        self.broken = True
        reason = "it was closed" if error is None else getattr(error, "strerror", None) or str(error)
        return Unavailable(f"the data connection with {self.peer_host} ended: {reason}")

    def abort(self) -> None:
        """Shut down, at once; whoever waits for it learns. Idempotent."""
        self.broken = True
        with contextlib.suppress(OSError):  # the peer was faster
            self._plain.shutdown(socket.SHUT_RDWR)
        if self._waiting is not None:
            _wake(self._waiting)

    def close(self) -> None:
        """At once, or as soon as what runs in `bulk` has ended, which it does now. Idempotent."""
        self.abort()
        self._closing = True
        if self._running:
            return
        if self._socket is not self._plain:
            self._socket.close()
        self._plain.close()


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)
