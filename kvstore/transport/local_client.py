"""The client's end of the local socket: many calls in flight, and the memory that came with their replies."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import socket  # noqa: TID251 - the real socket
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError, Message

from kvstore.errors import BadRequest, Corrupt, DeadlineExceeded, KVStoreError, Unavailable
from kvstore.transport import local_frames as frames
from kvstore.transport.base import Credentials, MappedSegment, Meanwhile, Method
from kvstore.transport.local_frames import Frame, LocalLimits
from kvstore.transport.local_link import Link, close_all
from kvstore.transport.methods import CAPABILITIES, PROTOCOL_VERSION, WORKER_LOCAL
from kvstore.wire import common_pb2, worker_pb2

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""Without them the peer could truncate the memory under us, and reading it would kill the process (SIGBUS)."""


class MappedMemory:
    """`kvstore.transport.base.MappedSegment`: a peer's memory, read-only unless it passed it as writable."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory: mmap.mmap | None = memory
        self.view = memoryview(memory)

    def close(self) -> None:
        """Unmap. While slices or arrays of `view` live, the memory stays mapped and goes with the last of them."""
        memory, self._memory = self._memory, None
        if memory is None:
            return
        try:
            self.view.release()
            memory.close()
        except BufferError:
            self.view = memoryview(b"")


def map_descriptor(descriptor: int, *, writable: bool) -> MappedMemory:
    """Map memory that a peer passed, and close `descriptor`. Corrupt unless it is sealed against resizing."""
    try:
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError:
            seals = 0  # no memfd
        if seals & SEALS != SEALS:
            raise Corrupt("the peer passed memory that is not sealed against resizing")
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size, mmap.MAP_SHARED, protection)
    except (OSError, ValueError) as error:
        raise Corrupt(f"the memory a peer passed cannot be mapped: {error}") from None
    finally:
        os.close(descriptor)
    return MappedMemory(memory)


class LocalClient:
    """`kvstore.transport.base.LocalChannel`. `hello`: the worker's answer to the greeting.

    A reply that comes after its caller has gone is given to `on_late(method, reply, segments)`, so that a hold can
    be released. Without it, it is dropped; one that carried memory then ends the connection, because the worker
    believes that memory known here from now on.
    """

    def __init__(self, sock: socket.socket, path: str, limits: LocalLimits) -> None:
        self.hello = common_pb2.HelloReply()
        self.on_late: Callable[[Method, Any, list[MappedSegment]], None] | None = None
        self._path = path
        self._limits = limits
        self._link = Link(
            sock,
            frames.Decoder(limits.message_bytes_max, (frames.REPLY, frames.ERROR)),
            on_frame=self._on_frame,
            on_end=self._on_end,
            descriptors_max=frames.DESCRIPTORS_MAX,
            send_bytes_max=2 * limits.message_bytes_max,
            on_room=self._on_room,
        )
        self._link.resume()
        self._ended: KVStoreError | None = None
        self._last_call = 0
        self._pending: dict[int, tuple[Method, asyncio.Future[tuple[Frame, list[int]]]]] = {}
        self._late: dict[int, Method] = {}  # calls whose caller has gone
        self._places = asyncio.Semaphore(limits.inflight_max)
        self._room = asyncio.Event()
        self._room.set()

    @property
    def closed(self) -> bool:
        return self._link.closed

    async def call(
        self, method: Method, request: Message, *, timeout_s: float, meanwhile: Meanwhile | None = None
    ) -> tuple[Any, list[MappedSegment]]:
        """The reply and the memory passed with it, in the order of the worker's `attach`."""
        number = frames.number(method)
        message = request.SerializeToString()
        if len(message) > self._limits.message_bytes_max:
            raise BadRequest(f"a request of {len(message)} bytes: at most {self._limits.message_bytes_max}")
        try:
            async with asyncio.timeout(timeout_s), self._places:
                while self._link.full:
                    self._room.clear()
                    await self._room.wait()
                frame, descriptors = await self._exchange(method, number, message, meanwhile)
        except TimeoutError:
            raise DeadlineExceeded(f"{self._path}: no answer to {method.name} within {timeout_s} s") from None
        return self._open(method, frame, descriptors)

    async def close(self) -> None:
        """Calls in flight end with Unavailable."""
        self._link.end(Unavailable(f"{self._path}: the connection was closed"))

    async def greet(self, credentials: Credentials) -> None:
        """Say Hello. Unauthenticated, NotGranted, Incompatible or Unavailable when it is not welcome."""
        hello = common_pb2.HelloRequest(protocol=PROTOCOL_VERSION, capabilities=CAPABILITIES, software="kvstore")
        request = worker_pb2.LocalHelloRequest(hello=hello, namespace=credentials.namespace, token=credentials.token)
        try:
            self.hello, _ = await self.call(WORKER_LOCAL["Hello"], request, timeout_s=self._limits.connect_timeout_s)
        except DeadlineExceeded as error:
            raise Unavailable(str(error)) from None

    async def _exchange(
        self, method: Method, number: int, message: bytes, meanwhile: Meanwhile | None
    ) -> tuple[Frame, list[int]]:
        if self._ended is not None:
            raise type(self._ended)(str(self._ended))
        self._last_call = call = (self._last_call + 1) & 0xFFFFFFFF
        future: asyncio.Future[tuple[Frame, list[int]]] = asyncio.get_running_loop().create_future()
        self._pending[call] = (method, future)
        self._link.send(frames.encode(frames.REQUEST, number, call, message))
        try:
            if meanwhile is not None:
                meanwhile()
            return await future
        except BaseException:
            if future.done() and not future.cancelled() and future.exception() is None:  # it came just now
                self._take_late(method, *future.result())
            elif self._pending.pop(call, None) is not None:  # nobody waits for it any more
                self._late[call] = method
                if len(self._late) > self._limits.inflight_max:
                    self._link.end(Unavailable(f"{self._path}: the worker answers too slowly"))
            raise

    def _on_frame(self, frame: Frame, descriptors: list[int]) -> None:
        if frame.kind == frames.ERROR and frame.call == 0:
            close_all(descriptors)
            raise frames.decode_error(frame.payload)  # the link ends with it
        entry = self._pending.pop(frame.call, None)
        if entry is not None and entry[1].done():  # cancelled, and its caller has not run yet
            self._take_late(entry[0], frame, descriptors)
        elif entry is not None:
            entry[1].set_result((frame, descriptors))
        elif frame.call in self._late:
            self._take_late(self._late.pop(frame.call), frame, descriptors)
        else:
            close_all(descriptors)
            raise BadRequest(f"{self._path}: an answer to call {frame.call}, which nobody made")

    def _take_late(self, method: Method, frame: Frame, descriptors: list[int]) -> None:
        if frame.kind == frames.ERROR:
            close_all(descriptors)
        elif self.on_late is not None:
            self.on_late(method, *self._open(method, frame, descriptors))
        else:
            close_all(descriptors)
            if descriptors:
                self._link.end(Unavailable(f"{self._path}: memory came after its caller had gone"))

    def _open(self, method: Method, frame: Frame, descriptors: list[int]) -> tuple[Any, list[MappedSegment]]:
        """Parse the reply and map what came with it; owns the descriptors."""
        assert method.reply is not None
        try:
            if frame.kind == frames.ERROR:
                raise frames.decode_error(frame.payload)
            flags, message = frame.payload[: frame.descriptors], frame.payload[frame.descriptors :]
            reply = method.reply.FromString(message)
            segments: list[MappedSegment] = []
            while descriptors:
                writable = bool(flags[len(segments)] & frames.WRITABLE)
                segments.append(map_descriptor(descriptors.pop(0), writable=writable))
        except DecodeError:
            error = Corrupt(f"{self._path}: the reply to {method.name} is not a {method.reply.DESCRIPTOR.name}")
            self._link.end(error)
            raise error from None
        except Corrupt as error:
            if frame.kind != frames.ERROR:  # the worker and this side no longer agree on what is mapped
                self._link.end(error)
            raise
        finally:
            close_all(descriptors)
        return reply, segments

    def _on_end(self, error: KVStoreError) -> None:
        self._ended = error
        pending, self._pending = self._pending, {}
        self._late.clear()
        for _, future in pending.values():
            if not future.done():
                future.set_exception(type(error)(str(error)))  # one each: a raised error collects its own traceback
        self._room.set()

    def _on_room(self) -> None:
        self._room.set()
