"""`kvstore inspect`: a block of a running worker in every tier and in Redis; the folder that the worker left."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest

from kvstore.cli.main import main
from kvstore.client.kv_client import KVClient
from kvstore.config import ClientConfig, load_config
from kvstore.fleet.local_cluster import LocalCluster
from kvstore.keys import Chain, chain
from kvstore.operations.payload import Payload, replay_spec, tokens_of

BLOCK = 64 << 10
TRIES = 500
SMALL = {"store": {"hot_bytes": "1MiB", "host_bytes": "2MiB", "ssd_bytes": "4MiB", "ssd_segment_bytes": "512KiB"}}


async def fill(config: ClientConfig, prompt: Chain) -> None:
    """More than memory holds, in prompts of their own length."""
    payload = Payload(BLOCK)
    async with await KVClient.connect(config) as client:
        for first in range(0, len(prompt), 4):
            blocks = [payload.make(key) for key in prompt.keys[first : first + 4]]
            for _ in range(TRIES):  # what is dropped while memory is full is put again
                if "dropped" not in (await client.put(prompt.spec, prompt, blocks, first)).states:
                    break


def check_live(cluster: LocalCluster, prompt: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    """Every block of a prompt, by its key, on the running worker."""
    client = cluster.client_config(0)
    flags = ["--coordinators", ",".join(client.coordinators), "--json"]
    tiers: Counter[str] = Counter()
    for key in prompt.keys:
        assert main(["inspect", key.hex(), *flags]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["damaged"] == 0 and report["failed"] == {} and report["workers"] == 1
        for copy in report["copies"]:
            tiers[copy["tier"]] += 1
            assert copy["ok"] and copy["key"] == key.hex() and prompt.keys[copy["depth"]] == key
            assert bool(copy["chunks"]) != copy["raw"] and copy["raw_bytes"] == BLOCK
    assert set(tiers) == {"hot", "host", "ssd", "redis"}
    assert main(["inspect", prompt.keys[0].hex(), *flags[:-1]]) == 0
    assert "every one verifies" in capsys.readouterr().out
    assert main(["inspect", "00" * 16, *flags]) == 1
    assert json.loads(capsys.readouterr().out)["copies"] == []
    assert main(["inspect", "0011", *flags]) == 2
    assert "32 hexadecimal digits" in capsys.readouterr().err


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = chain(replay_spec(BLOCK), tokens_of(tuple(range(120))))
    cluster = LocalCluster(load_config(env={}, overrides=SMALL), workers=1, ssd_folder=str(tmp_path))
    try:
        asyncio.run(cluster.start())
        asyncio.run(fill(cluster.client_config(0), prompt))
        check_live(cluster, prompt, capsys)
    finally:
        cluster.stop()
    folder = str(tmp_path / "worker-0")

    assert main(["inspect", folder, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["records"] > 10 and report["damaged"] == 0 and report["skipped"] == {}
    assert report["models"] == {"kvstore/replay-1": report["records"]}
    assert report["namespaces"] == {"default": report["records"]}
    assert report["raw_bytes"] == report["records"] * BLOCK > report["stored_bytes"] * 1.3

    held = [key for key in prompt.keys if main(["inspect", folder, "--json", "--key", key.hex()]) == 0]
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    blocks = {block["key"]: block for found in shown for block in found["blocks"]}
    assert len(held) == len(prompt) and len(blocks) == report["records"]
    block = next(iter(blocks.values()))
    assert block["ok"] and block["raw_bytes"] == BLOCK and block["chunks"]
    assert prompt.keys[block["depth"]].hex() == block["key"]
    assert main(["inspect", folder, "--key", block["key"]]) == 0
    assert block["copy_id"] in capsys.readouterr().out

    path = tmp_path / "worker-0" / f"{block['segment']:08d}.data"
    with path.open("r+b") as file:
        file.seek(block["offset"] + block["stored_bytes"] - 1)
        last = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([last[0] ^ 1]))
    assert main(["inspect", folder, "--json"]) == 1
    damaged = json.loads(capsys.readouterr().out)
    assert damaged["damaged"] == 1 and damaged["damage"][0]["offset"] == block["offset"]
    assert main(["inspect", folder]) == 1
    assert "1 damaged" in capsys.readouterr().out
