"""A client in another language, with the proto files alone: examples/node puts, matches, gets; bytes are compared."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from kvstore.spec import Group, ModelSpec, Shard
from kvstore.wireform import shard_to_wire
from tests.service_cluster import MiniCluster, blocks_of, found
from tests.service_helpers import payload, prompt

ROOT = Path(__file__).parent.parent
SPEC = ModelSpec("node", (Group(layers=3, kv_heads=4, k_dim=64, v_dim=64),), dtype="float32", block_tokens=16)
WHOLE = Shard.whole(SPEC)
SIZE = SPEC.group_bytes(SPEC.groups[0])


def bytes_of(key: bytes) -> bytes:
    """What examples/node/client.js puts under a key."""
    return b"".join(hashlib.sha256(key + n.to_bytes(4, "little")).digest() for n in range(-(-SIZE // 32)))[:SIZE]


async def run(*argv: str, cwd: Path) -> str:
    """What it said on stdout; AssertionError with all of it when it fails."""
    process = await asyncio.create_subprocess_exec(
        *argv, cwd=cwd, env=dict(os.environ), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(120):
        out, err = await process.communicate()
    assert process.returncode == 0, f"{' '.join(argv)}: {out.decode()}{err.decode()}"
    return out.decode()


async def test_node_puts_matches_and_gets(tmp_path: Path) -> None:
    missing = [name for name in ("node", "npm") if shutil.which(name) is None]
    if missing:
        pytest.fail(f"{' and '.join(missing)} not found: install Node.js 18 or later, this proof needs it")
    folder = tmp_path / "node"
    shutil.copytree(ROOT / "examples" / "node", folder)
    await run("npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", cwd=folder)
    async with MiniCluster(tmp_path) as cluster:
        await cluster.coordinator()
        await cluster.worker("a")
        client = await cluster.client()
        theirs, ours = prompt(41, 5, SPEC), prompt(42, 7, SPEC)
        assert (await client.put(SPEC, ours, blocks_of(ours))).states == ["committed"] * 7
        await found(client, ours, 7)
        shard = shard_to_wire(WHOLE)
        orders = {
            "spec": SPEC.canonical_json(),
            "shard": {name.name: value for name, value in shard.ListFields()},
            "block_bytes": SIZE,
            "tokens": SPEC.block_tokens,
            "put": _tokens(41, 5),
            "get": _tokens(42, 7),
        }
        file = folder / "orders.json"
        file.write_text(json.dumps(orders))
        argv = ("node", "client.js", str(ROOT / "proto"), cluster.addresses[0], str(file))
        said = json.loads(await run(*argv, cwd=folder))
        assert said["keys"] == [key.hex() for key in theirs.keys]  # the same keys from the same tokens
        assert (said["stored"], said["found"], said["same"], said["matched"]) == (5, 5, 5, 7)
        got = Path(f"{file}.got").read_bytes()
        assert got == b"".join(payload(SPEC, WHOLE, key).tobytes() for key in ours.keys)
        plan = await found(client, theirs, 5)  # and what Node put is read by others
        result = await client.get(plan)
        assert result.blocks == 5
        for have, key in zip(result.buffers[0], theirs.keys, strict=True):
            assert have.tobytes() == bytes_of(key)


def _tokens(seed: int, blocks: int) -> list[int]:
    """As `tests.service_helpers.prompt` draws them."""
    drawn = np.random.default_rng(seed).integers(0, 1 << 31, blocks * SPEC.block_tokens, dtype=np.uint32)
    return [int(token) for token in drawn]
