"""The raw data channel: room for what comes is found between the first frame and the others."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.errors import DeadlineExceeded, Overloaded
from kvstore.wire import worker_pb2
from tests.data_net import PAYLOAD, Net, Sink, until


async def test_room_may_be_found_when_the_first_frame_has_come() -> None:
    async with Net() as net:
        client, sink = await net.client(), Sink()
        seen: list[int] = []

        async def begun() -> None:
            await asyncio.sleep(0)
            seen.append(sink.landings)

        for _ in range(2):
            sink.got.clear()
            sink.landings = 0
            await client.get(worker_pb2.GetRequest(), sink, timeout_s=5.0, begun=begun)
            assert b"".join(bytes(data) for _, data in sink.got) == PAYLOAD and client.usable
        assert seen == [1, 1]
        with pytest.raises(Overloaded, match="later"):
            await client.get(worker_pb2.GetRequest(planes=1), Sink(), timeout_s=5.0, begun=begun)
        assert client.usable and len(seen) == 2, "an answer without frames wants no room"


@pytest.mark.parametrize("end", ["cancelled", "late", "failed", "closed"])
async def test_whoever_gives_up_while_room_is_found_lets_go(end: str) -> None:
    async with Net() as net:
        client, sink, waiting, gate = await net.client(), Sink(), asyncio.Event(), asyncio.Event()

        async def begun() -> None:
            waiting.set()
            await gate.wait()
            raise Overloaded("no room")

        get = client.get(worker_pb2.GetRequest(planes=3), sink, timeout_s=0.2 if end == "late" else 60.0, begun=begun)
        call = asyncio.create_task(get)
        await waiting.wait()
        if end == "cancelled":
            call.cancel()
        elif end == "closed":
            await client.close()
        if end in ("failed", "closed"):
            gate.set()
        expected = {"cancelled": asyncio.CancelledError, "late": DeadlineExceeded}.get(end, Overloaded)
        with pytest.raises(expected):
            await call
        assert not client.usable and sink.landings == 1
        await client.close()
        await until(lambda: net.service.open == 0)
        await net.serves()
