"""Store the KV of a prompt, look it up, load it back: the library in one file.

kvstore up                                  # prints the coordinators' addresses
python examples/put_get.py 127.0.0.1:PORT
"""

from __future__ import annotations

import asyncio
import os
import sys

from kvstore import Group, KVClient, ModelSpec, chain
from kvstore.config import ClientConfig
from kvstore.layout import block_bytes
from kvstore.spec import Shard

SPEC = ModelSpec(model="examples/put-get", dtype="float16", groups=(Group(layers=4, kv_heads=2, k_dim=64, v_dim=64),))


async def main(coordinator: str) -> None:
    async with await KVClient.connect(ClientConfig(coordinators=(coordinator,))) as client:
        prompt = chain(SPEC, list(range(640)))  # ten blocks of 64 tokens; token ids as your tokenizer gives them
        kv = [os.urandom(block_bytes(SPEC, Shard.whole(SPEC))) for _ in prompt.keys]

        stored = await client.put(SPEC, prompt, kv)
        print("stored:", {state: stored.states.count(state) for state in sorted(set(stored.states))})

        longer = chain(SPEC, [*range(640), *range(5000, 5300)])  # another prompt that begins with the same tokens
        plan = await client.match(SPEC, longer)
        print(f"held: {plan.tokens} of {len(longer) * SPEC.block_tokens} tokens, {plan.tiers()}")

        got = await client.get(plan)
        equal = sum(bytes(block) == kv[depth] for depth, block in enumerate(got.buffers[0][: got.blocks]))
        print(f"loaded: {got.blocks} blocks, {equal} of them equal to what was stored")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    asyncio.run(main(sys.argv[1]))
