"""vLLM's own publisher over real ZMQ: what it says is read, what was missed is asked for again, and its end is seen."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from vllm.distributed import kv_events

from kvstore.directory.kv_events import Cleared, Dropped, Stored, parse
from kvstore.transport.zmq_events import LOST, batches

pytestmark = pytest.mark.quick


@pytest.fixture
def publisher(tmp_path: Path) -> Iterator[kv_events.ZmqEventPublisher]:
    made = kv_events.ZmqEventPublisher(0, endpoint(tmp_path, "pub"), endpoint(tmp_path, "replay"), buffer_steps=100)
    yield made
    made.shutdown()


def endpoint(folder: Path, name: str) -> str:
    return f"ipc://{folder}/{name}"


def say(publisher: object, *events: object) -> None:
    publisher.publish(kv_events.KVEventBatch(ts=1.0, events=list(events)))  # type: ignore[attr-defined]


def stored(hashes: list[object], parent: object = None) -> object:
    return kv_events.BlockStored(
        block_hashes=hashes,
        parent_block_hash=parent,
        token_ids=list(range(2 * len(hashes))),
        block_size=2,
        lora_id=None,
        medium="GPU",
        lora_name=None,
    )


async def test_what_the_engine_says_is_read_from_the_start_and_its_end_is_seen(
    tmp_path: Path, publisher: object
) -> None:
    say(publisher, stored([b"a" * 32, 7]))
    say(publisher, kv_events.BlockRemoved(block_hashes=[7], medium="GPU"))
    while len(publisher._buffer) < 2:  # type: ignore[attr-defined]
        await asyncio.sleep(0.01)  # both were said before anybody listened
    async with aclosing(batches(endpoint(tmp_path, "pub"), endpoint(tmp_path, "replay"))) as coming:
        async with asyncio.timeout(20):
            early = [await anext(coming), await anext(coming)]
            live: list[tuple[int, bytes]] = []
            while not live:
                say(publisher, kv_events.AllBlocksCleared())
                try:
                    async with asyncio.timeout(0.5):
                        live.append(await anext(coming))
                except TimeoutError:
                    break
        assert [number for number, _ in early] == [0, 1]
        assert parse(early[0][1]) == [Stored((b"a" * 32, 7), None, (0, 1, 2, 3), 2, "GPU", True)]
        assert parse(early[1][1]) == [Dropped((7,), "GPU")]
        assert live and live[0][0] == 2 and parse(live[0][1]) == [Cleared()]
        publisher._pub.close(linger=0)  # type: ignore[attr-defined]
        async with asyncio.timeout(20):
            while (await anext(coming)) != LOST:
                pass
