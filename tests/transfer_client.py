"""A client process of the transfer proof: does what it is told, line by line, and checks every byte it gets.

`python -m tests.transfer_client COORDINATOR SOCKET near|far`. SOCKET is empty for a client of another host.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import socket
import sys
import threading
from dataclasses import replace
from typing import Any

import numpy as np

from kvstore.client.kv_client import KVClient
from kvstore.client.needs import LayerReady
from kvstore.client.plan import HitPlan
from kvstore.config import ClientConfig
from kvstore.keys import Chain
from kvstore.machine.system import real_system
from kvstore.spec import Group, ModelSpec, Shard
from tests.service_helpers import payload, prompt

SPEC = ModelSpec("moved", (Group(layers=4, kv_heads=4, k_dim=128, v_dim=128),), dtype="float32", block_tokens=16)
WHOLE = Shard.whole(SPEC)
SIZE = SPEC.group_bytes(SPEC.groups[0])
BLOCKS = 12
TIMEOUT_S = 1.0


def chain_of(seed: int) -> Chain:
    return prompt(seed, BLOCKS, SPEC)


class Worker:
    """One client and what it knows of its own process."""

    def __init__(self, client: KVClient) -> None:
        self.client = client
        self.raws: dict[bytes, np.ndarray] = {}

    def raw(self, key: bytes) -> np.ndarray:
        found = self.raws.get(key)
        if found is None:
            found = self.raws[key] = payload(SPEC, WHOLE, key)
        return found

    async def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """What came of one transfer."""
        loop = asyncio.get_running_loop()
        if "cut_after_s" in order:
            loop.call_later(order["cut_after_s"], cut)
        prefix = chain_of(order["seed"])
        begun = loop.time()
        kind = order["kind"]
        if kind == "put":
            raws = [self.raw(key) for key in prefix.keys]
            done = await self.client.put(SPEC, prefix, raws, timeout_s=TIMEOUT_S)
            return {"blocks": sum(s in ("committed", "held") for s in done.states), "seconds": loop.time() - begun}
        plan = await self.client.match(SPEC, prefix, timeout_s=TIMEOUT_S)
        matched = loop.time() - begun
        pin = await self.client.pin(plan, ttl_s=2.0, timeout_s=TIMEOUT_S) if kind == "pinned" else None
        if kind == "prefetch":
            await self.client.prefetch(plan, timeout_s=TIMEOUT_S)
        begun = loop.time()
        blocks, wrong = await self._get(plan, layerwise=kind == "layers")
        seconds = max(matched, loop.time() - begun)
        if pin is not None:
            await self.client.unpin(pin, timeout_s=TIMEOUT_S)
        return {"blocks": blocks, "wrong": wrong, "seconds": seconds}

    async def _get(self, plan: HitPlan, *, layerwise: bool) -> tuple[int, int]:
        """(blocks delivered, blocks or layers of other bytes)."""
        into = [np.zeros(SIZE, np.uint8) for _ in range(plan.blocks)]
        wrong = 0
        a_layer = SIZE // 4

        def ready(told: LayerReady) -> None:
            nonlocal wrong
            at = slice(told.layer * a_layer, (told.layer + 1) * a_layer)
            for depth in range(told.blocks):
                wrong += not np.array_equal(into[depth][at], self.raw(plan.keys[depth])[at])

        result = await self.client.get(plan, [into], on_layer=ready if layerwise else None, timeout_s=TIMEOUT_S)
        for depth in range(result.blocks):
            if result.tiers[0][depth] is not None:
                wrong += not np.array_equal(into[depth], self.raw(plan.keys[depth]))
        return result.blocks, wrong


def cut() -> None:
    """Every connection of this process is cut, in both directions."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            mine = socket.socket(fileno=os.dup(int(name)))
            try:
                if mine.family != socket.AF_UNIX or mine.getpeername():  # not what the loop wakes itself with
                    mine.shutdown(socket.SHUT_RDWR)
            finally:
                mine.close()


def held_here() -> dict[str, int]:
    """Descriptors, threads, mapped memory of other processes."""
    with open("/proc/self/maps", encoding="ascii") as maps:
        mapped = sum("memfd:kvstore" in line for line in maps)
    return {"fds": len(os.listdir("/proc/self/fd")), "threads": threading.active_count(), "mapped": mapped}


async def main(coordinator: str, path: str, where: str) -> None:
    system = real_system(2)
    if where == "far":
        system = replace(system, host="elsewhere")
    config = ClientConfig(
        coordinators=(coordinator,), workers=(path,) if path else (), staging_bytes=8 << 20, connect_timeout_s=1.0
    )

    async def connected() -> KVClient:
        return await KVClient.connect(config, system)

    first = await connected()  # what a process needs once, it has from now on
    await first.close()
    barrier = threading.Barrier(2)
    await asyncio.gather(*(system.pool.run(barrier.wait) for _ in range(2)))  # all byte movers run
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    before = held_here()
    worker = Worker(await connected())
    print(json.dumps({"ready": os.getpid()}), flush=True)
    while line := await reader.readline():
        order = json.loads(line)
        if order["kind"] == "end":
            break
        done = await worker.run(order)  # an exception ends the process: the proof sees that
        print(json.dumps({"wrong": 0, **done}), flush=True)
    await worker.client.close()
    for _ in range(100):  # gRPC lets go of its sockets a moment later
        gc.collect()
        after = held_here()
        if all(after[what] <= before[what] for what in before):
            break
        await asyncio.sleep(0.02)
    print(json.dumps({"before": before, "after": after, "counters": dict(worker.client.counters)}), flush=True)
    system.pool.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
