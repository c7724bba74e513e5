"""Two processes share KV through the service: one stores, another one, started anew, finds it and checks every byte.

kvstore up                                  # prints the coordinators' addresses
python examples/two_processes.py 127.0.0.1:PORT
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import numpy as np

from kvstore import CommitToken, Group, KVClient, ModelSpec, chain
from kvstore.config import ClientConfig
from kvstore.layout import block_bytes
from kvstore.spec import Shard

SPEC = ModelSpec(
    model="examples/two-processes", dtype="float16", groups=(Group(layers=8, kv_heads=4, k_dim=64, v_dim=64),)
)
TOKENS = list(range(100_000, 100_000 + 40 * 64))


def kv_of(depth: int) -> bytes:
    """Stands for what a model computes: the same bytes in both processes."""
    return np.random.default_rng(depth).bytes(block_bytes(SPEC, Shard.whole(SPEC)))


async def store(coordinator: str) -> list[list[object]]:
    """Put all blocks; the commits, for whoever must see them."""
    async with await KVClient.connect(ClientConfig(coordinators=(coordinator,))) as client:
        prompt = chain(SPEC, TOKENS)
        stored = await client.put(SPEC, prompt, [kv_of(depth) for depth in range(len(prompt))])
        return [[token.worker, token.epoch, token.seq] for token in stored.tokens]


async def load(coordinator: str, commits: list[tuple[str, int, int]]) -> None:
    async with await KVClient.connect(ClientConfig(coordinators=(coordinator,))) as client:
        # `after`: the answer waits, up to 100 ms, until the coordinator has heard of these commits
        plan = await client.match(SPEC, chain(SPEC, TOKENS), after=[CommitToken(*commit) for commit in commits])
        got = await client.get(plan)
        wrong = sum(bytes(block) != kv_of(depth) for depth, block in enumerate(got.buffers[0][: got.blocks]))
        print(f"reader: {plan.blocks} blocks found, {got.blocks} loaded, {wrong} wrong")


def main(coordinator: str, role: str = "") -> None:
    if role == "writer":
        print(json.dumps(asyncio.run(store(coordinator))))
    elif role == "reader":
        asyncio.run(load(coordinator, json.load(sys.stdin)))
    else:
        me = [sys.executable, __file__, coordinator]
        commits = subprocess.run([*me, "writer"], check=True, capture_output=True, text=True).stdout
        print(f"writer: committed as {commits.strip()}")
        subprocess.run([*me, "reader"], check=True, input=commits, text=True)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
