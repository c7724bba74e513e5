"""What a worker says of the copies of one block, as a message."""

from __future__ import annotations

from kvstore.store.copies import Inspected
from kvstore.wire import worker_pb2
from kvstore.wireform import shard_to_wire


def inspected_to_wire(block: Inspected) -> worker_pb2.InspectedBlock:
    return worker_pb2.InspectedBlock(
        shard=shard_to_wire(block.shard),
        copies=[
            worker_pb2.InspectedCopy(
                tier=int(copy.tier),  # type: ignore[arg-type]
                raw=copy.raw,
                segment=copy.location.segment,
                offset=copy.location.offset,
                length=copy.location.length,
                header=copy.header.pack(),
                table=copy.table,
                error=copy.error,
            )
            for copy in block.copies
        ],
        pins=block.pins,
        secondary=block.secondary,
        moving=block.moving,
    )
