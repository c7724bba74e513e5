"""An engine's published events over ZMQ, in order: subscribed live, what was missed asked for again where it is kept.

pyzmq comes with the engines that publish; nothing else here needs it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from kvstore.errors import SetupError

Batch = tuple[int, bytes]
"""The engine's number, and the payload. (-1, b""): the connection to the engine is gone."""

LOST: Batch = (-1, b"")
END = (-1).to_bytes(8, "big", signed=True)
REPLAY_S = 5.0
QUEUE = 100_000  # batches the subscriber keeps for us, as many as the publisher


async def batches(endpoint: str, replay: str = "", topic: str = "") -> AsyncIterator[Batch]:
    """Batches from now on; with `replay`, first those that the engine still keeps, and what a gap left out. SetupError
    without pyzmq, or for an endpoint that is none."""
    try:
        import zmq
        import zmq.asyncio
        from zmq.utils.monitor import recv_monitor_message
    except ImportError:
        raise SetupError("pyzmq is not installed: pip install pyzmq, or run this with the engine's Python") from None
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.RCVHWM, QUEUE)
    socket.setsockopt(zmq.SUBSCRIBE, topic.encode())
    monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    poller = zmq.asyncio.Poller()
    poller.register(socket, zmq.POLLIN)
    poller.register(monitor, zmq.POLLIN)
    try:
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise SetupError(f"cannot subscribe to {endpoint}: {error}") from None
        awaited = 0
        for number, payload in await _replayed(zmq, context, replay, 0):
            yield number, payload
            awaited = number + 1
        while True:
            ready = dict(await poller.poll())
            if monitor in ready:
                await recv_monitor_message(monitor)
                awaited = 0
                yield LOST
            if socket not in ready:
                continue
            _, head, payload = await socket.recv_multipart()
            number = int.from_bytes(head, "big")
            if number > awaited:
                for missed in await _replayed(zmq, context, replay, awaited):
                    if awaited <= missed[0] < number:
                        yield missed
            if number >= awaited or number == 0:
                yield number, payload
                awaited = number + 1
    finally:
        socket.disable_monitor()
        context.destroy(linger=0)


async def _replayed(zmq: Any, context: Any, endpoint: str, first: int) -> list[Batch]:
    """What the engine keeps from a number on; nothing where it does not answer."""
    if not endpoint:
        return []
    socket = context.socket(zmq.DEALER)
    found: list[Batch] = []
    try:
        socket.connect(endpoint)
        await socket.send_multipart((b"", first.to_bytes(8, "big")))
        while await socket.poll(REPLAY_S * 1000):
            *_, head, payload = await socket.recv_multipart()
            if head == END:
                break
            found.append((int.from_bytes(head, "big"), payload))
    finally:
        socket.close(linger=0)
    return found
