"""One end of a local socket on the event loop: whole frames, with descriptors, both ways.

Non-blocking sendmsg and recvmsg under `add_reader`/`add_writer`. Descriptors belong to the link until a frame that
announced them is handed on; whatever is left when it ends is closed.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket  # noqa: TID251 - the real socket
import struct
from collections import deque
from collections.abc import Callable, Sequence

from kvstore.config import KIB
from kvstore.errors import BadRequest, KVStoreError, Unavailable
from kvstore.transport.local_frames import DESCRIPTORS_AT_ONCE, Decoder, Frame

READ_BYTES = 256 * KIB
_INT = array.array("i").itemsize
_CREDENTIALS = struct.Struct("3i")


class Link:
    """Owns `sock`. `on_frame(frame, descriptors)`: the receiver owns the descriptors from then on.

    `on_end(error)` comes exactly once, whoever ends it. descriptors_max: 0 where the peer may send none.
    send_bytes_max: waiting to be sent; `full` says it is exceeded, `on_room` comes when it has halved. `farewell`
    makes the frame that a peer which broke the protocol is sent before the link ends.
    """

    def __init__(
        self,
        sock: socket.socket,
        decoder: Decoder,
        *,
        on_frame: Callable[[Frame, list[int]], None],
        on_end: Callable[[KVStoreError], None],
        descriptors_max: int,
        send_bytes_max: int,
        on_room: Callable[[], None] = lambda: None,
        farewell: Callable[[KVStoreError], bytes] | None = None,
    ) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._decoder = decoder
        self._on_frame = on_frame
        self._on_end = on_end
        self._on_room = on_room
        self._farewell = farewell
        self._descriptors_max = descriptors_max
        self._send_bytes_max = send_bytes_max
        self._queue: deque[tuple[memoryview, list[int]]] = deque()  # the descriptors in it are duplicates of ours
        self._queued = 0  # bytes
        self._received: list[int] = []  # descriptors not yet claimed by a frame
        self._reading = False
        self.closed = False

    @property
    def full(self) -> bool:
        """Whether the send queue is over its bound."""
        return self._queued > self._send_bytes_max

    def pause(self) -> None:
        """Read no more for now; frames that arrived already may still be handed on."""
        if self._reading:
            self._loop.remove_reader(self._sock.fileno())
            self._reading = False

    def resume(self) -> None:
        """Read, for the first time or again."""
        if not self._reading and not self.closed:
            self._loop.add_reader(self._sock.fileno(), self._readable)
            self._reading = True

    def send(self, frame: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send now as far as the socket takes it, the rest when it can. The caller keeps its descriptors.

        Nothing happens on a closed link: `on_end` has said so.
        """
        if self.closed:
            return
        view, left = memoryview(frame), list(descriptors)
        if not self._queue:
            try:
                view, left = self._write(view, left)
            except OSError as error:
                self.end(Unavailable(f"the local socket failed: {error.strerror}"))
                return
            if not view:
                return
            self._loop.add_writer(self._sock.fileno(), self._writable)
        # A queued descriptor is ours: the caller may close its own, and the number could mean another file by then.
        self._queue.append((view, [os.dup(fd) for fd in left]))
        self._queued += len(view)

    def refuse(self, error: KVStoreError) -> None:
        """The peer broke the protocol: tell it why, as far as the socket takes it at once, and end."""
        if self._farewell is not None:
            self.send(self._farewell(error))
        self.end(error)

    def end(self, error: KVStoreError) -> None:
        """Close and report `error`. What is queued gets one more chance to leave at once."""
        if self.closed:
            return
        self.pause()
        with contextlib.suppress(OSError):  # the peer may be gone: that is what `error` says
            self._flush()
        self.closed = True
        self._loop.remove_writer(self._sock.fileno())
        for _, descriptors in self._queue:
            close_all(descriptors)
        self._queue.clear()
        close_all(self._received)
        self._received.clear()
        self._sock.close()
        self._on_end(error)

    def _readable(self) -> None:
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                READ_BYTES, socket.CMSG_SPACE(DESCRIPTORS_AT_ONCE * _INT), socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.end(Unavailable(f"the local socket failed: {error.strerror}"))
            return
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._received.extend(array.array("i", content[: len(content) - len(content) % _INT]))
        if not data:
            self.end(Unavailable("the peer closed the local socket"))
            return
        try:
            self._take(data, truncated=bool(flags & socket.MSG_CTRUNC))
        except KVStoreError as error:
            self.refuse(error)

    def _take(self, data: bytes, *, truncated: bool) -> None:
        if truncated:
            raise BadRequest("descriptors were lost on the way: raise the limit of open files")
        if len(self._received) > self._descriptors_max:
            raise BadRequest(f"{len(self._received)} descriptors: at most {self._descriptors_max} may be sent here")
        for frame in self._decoder.feed(data):
            if frame.descriptors > len(self._received):
                raise BadRequest(f"{frame.descriptors} descriptors announced, {len(self._received)} came")
            mine, self._received = self._received[: frame.descriptors], self._received[frame.descriptors :]
            self._on_frame(frame, mine)
            if self.closed:
                return
        if self._decoder.idle and self._received:
            raise BadRequest("descriptors came that no frame announced")

    def _write(self, view: memoryview, descriptors: list[int]) -> tuple[memoryview, list[int]]:
        """What is left after as much as the socket takes. Descriptors go with the first bytes of their frame."""
        while view:
            now = descriptors[:DESCRIPTORS_AT_ONCE]
            part = view[:1] if len(descriptors) > len(now) else view  # a frame has more bytes than rights messages
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", now))] if now else []
            try:
                sent = self._sock.sendmsg([part], ancillary)
            except (BlockingIOError, InterruptedError):
                break
            view, descriptors = view[sent:], descriptors[len(now) :]
        return view, descriptors

    def _flush(self) -> None:
        while self._queue:
            view, descriptors = self._queue.popleft()
            try:
                rest, left = self._write(view, descriptors)
            except OSError:
                self._queue.appendleft((view, descriptors))  # `end` closes them
                raise
            close_all(descriptors[: len(descriptors) - len(left)])
            self._queued -= len(view) - len(rest)
            if rest:
                self._queue.appendleft((rest, left))
                return

    def _writable(self) -> None:
        was_full = self._queued > self._send_bytes_max // 2
        try:
            self._flush()
        except OSError as error:
            self.end(Unavailable(f"the local socket failed: {error.strerror}"))
            return
        if not self._queue:
            self._loop.remove_writer(self._sock.fileno())
        if was_full and self._queued <= self._send_bytes_max // 2:
            self._on_room()


def close_all(descriptors: Sequence[int]) -> None:
    """Close each of them."""
    for fd in descriptors:
        os.close(fd)


def peer_of(sock: socket.socket) -> str:
    """ "unix:uid=UID,pid=PID" of the process at the other end, from the kernel."""
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return f"unix:uid={uid},pid={pid}"
