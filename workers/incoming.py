"""The blocks of one put from another host, as their bytes come in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvstore.errors import BadRequest
from kvstore.spec import ModelSpec
from kvstore.wire import worker_pb2
from workers.node import Answer, Node


class PutBlocks:
    """The blocks of one Put stream; one of them at a time is in memory."""

    def __init__(self, node: Node, namespace: str, header: worker_pb2.PutHeader) -> None:
        self._node, self._namespace = node, namespace
        self._spec = ModelSpec.from_json(header.spec_json)
        if not 1 <= len(header.blocks) <= node.config.worker.keys_max:
            raise BadRequest(f"{len(header.blocks)} blocks in one Put: give 1 to {node.config.worker.keys_max}")
        self._blocks = node.put_blocks(namespace, self._spec, header.blocks)
        self._answer = Answer(node)
        self._index = 0  # of the block that is coming in
        self._buffer = memoryview(b"")
        self._filled = 0

    @property
    def nbytes(self) -> list[int]:
        """Of every block, in the order in which they come."""
        return [header.raw_length for _, header in self._blocks]

    async def store(self, raws: Sequence[memoryview]) -> None:
        """The next blocks, whole; mutates. Their memory may be reused when this returns."""
        mine = self._blocks[self._index : self._index + len(raws)]
        self._index += len(raws)
        offered = [(shard, header, raw) for (shard, header), raw in zip(mine, raws, strict=True)]
        await self._answer.take(self._namespace, self._spec, offered)

    @property
    def largest(self) -> int:
        """Bytes of the largest block."""
        return max(header.raw_length for _, header in self._blocks)

    async def take(self, data: memoryview) -> None:
        """Raw bytes, back to back; mutates. A block that lies whole in one message is stored from there."""
        while len(data):
            if self._index == len(self._blocks):
                raise BadRequest(f"{len(data)} bytes came after the last block")
            size = self._blocks[self._index][1].raw_length
            if not self._filled and len(data) >= size:
                await self.store([data[:size]])
                data = data[size:]
                continue
            if not self._buffer:
                self._buffer = memoryview(bytearray(self.largest))
            part = data[: size - self._filled]
            await self._node.system.pool.run(_copy, self._buffer[self._filled : self._filled + len(part)], part)
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == size:
                self._filled = 0
                await self.store([self._buffer[:size]])

    def reply(self) -> worker_pb2.PutReply:
        """BadRequest when the stream ended too soon; what was whole is stored all the same."""
        if self._index < len(self._blocks):
            raise BadRequest(f"the stream ended within block {self._index} of {len(self._blocks)}")
        return self._answer.message()


def _copy(target: memoryview, source: memoryview) -> None:
    """Runs in a byte mover; numpy lets others run meanwhile."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
