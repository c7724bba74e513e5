"""A worker met on both of its sockets by peers that need not be honest."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from kvstore.keys import Chain
from kvstore.layout import block_bytes
from kvstore.spec import Shard
from kvstore.transport import frames
from kvstore.transport.base import Channel, Credentials, LocalChannel, MappedSegment
from kvstore.transport.methods import WORKER, WORKER_LOCAL
from kvstore.types import pack_keys
from kvstore.wire import worker_pb2
from kvstore.wireform import shard_to_wire
from tests.service_cluster import MiniCluster
from tests.service_helpers import FULL, payload, until
from workers.runtime import WorkerRuntime

WHOLE = Shard.whole(FULL)
SIZE = block_bytes(FULL, WHOLE)


class Met:
    """A worker and a raw channel of either kind to it."""

    def __init__(self, cluster: MiniCluster, worker: WorkerRuntime, channel: Channel, local: LocalChannel) -> None:
        self.cluster, self.worker, self.channel, self.local = cluster, worker, channel, local

    async def call(self, name: str, request: Any) -> Any:
        return await self.channel.unary(WORKER[name], request, timeout_s=5)

    async def locally(
        self, name: str, request: Any, channel: LocalChannel | None = None
    ) -> tuple[Any, list[MappedSegment]]:
        return await (channel or self.local).call(WORKER_LOCAL[name], request, timeout_s=5)

    async def another(self) -> LocalChannel:
        return await self.cluster.transport.connect_local(self.worker.socket, Credentials())

    async def get(self, request: worker_pb2.GetRequest) -> list[tuple[worker_pb2.GetHeader, bytes]]:
        async def one() -> AsyncIterator[worker_pb2.GetRequest]:
            yield request

        found = []
        async with aclosing(self.channel.stream(WORKER["Get"], one(), timeout_s=5)) as stream:
            async for frame in stream:
                packed, data = frames.decode(frame)
                found.append((worker_pb2.GetHeader.FromString(packed or b""), bytes(data)))
        return found

    async def put(self, *sent: bytes) -> worker_pb2.PutReply:
        async def all_() -> AsyncIterator[bytes]:
            for frame in sent:
                yield frame

        async with aclosing(self.channel.stream(WORKER["Put"], all_(), timeout_s=5)) as stream:
            async for reply in stream:
                assert isinstance(reply, worker_pb2.PutReply)
                return reply
        raise AssertionError("no reply")

    def holds(self) -> list[int]:
        return list(self.worker.store.opening.holds._held)

    def held(self) -> int:
        return self.worker.store.blocks("default")


@asynccontextmanager
async def meeting(tmp_path: Path) -> AsyncIterator[Met]:
    async with MiniCluster(tmp_path) as cluster:
        worker = await cluster.worker("a")
        channel = await cluster.transport.connect(worker.address, Credentials())
        local = await cluster.transport.connect_local(worker.socket, Credentials())
        yield Met(cluster, worker, channel, local)
        await channel.close()
        await local.close()
        await until(lambda: not len(worker.store.opening.holds), "every hold has ended")
        assert worker.node.sending.used == worker.node.receiving.used == 0
        await worker.store.idle()
        worker.store.validate()


def put_block(prefix: Chain, depth: int, shard: Shard = WHOLE, **changes: Any) -> worker_pb2.PutBlock:
    """What an honest client says of a block, but for the changes."""
    block = worker_pb2.PutBlock(
        shard=shard_to_wire(shard),
        key=prefix.keys[depth],
        parent=prefix.parent(depth),
        group=prefix.group(depth),
        depth=depth,
        computed_on=3,
        raw_bytes=SIZE,
    )
    for name, value in changes.items():
        setattr(block, name, value)
    return block


def put_header(*blocks: worker_pb2.PutBlock) -> bytes:
    return frames.encode(worker_pb2.PutHeader(spec_json=FULL.canonical_json(), blocks=blocks).SerializeToString(), ())


def get_request(prefix: Chain, count: int, **changes: Any) -> worker_pb2.GetRequest:
    keys = worker_pb2.ShardKeys(shard=shard_to_wire(Shard.whole(prefix.spec)), keys=pack_keys(prefix.keys[:count]))
    return worker_pb2.GetRequest(root=prefix.root, blocks=[keys], **changes)


def open_request(prefix: Chain, count: int, **changes: Any) -> worker_pb2.OpenRequest:
    keys = worker_pb2.ShardKeys(shard=shard_to_wire(WHOLE), keys=pack_keys(prefix.keys[:count]))
    return worker_pb2.OpenRequest(root=FULL.root, blocks=[keys], deadline_ms=2000, **changes)


def raw(prefix: Chain, depth: int) -> bytes:
    return payload(FULL, WHOLE, prefix.keys[depth]).tobytes()
