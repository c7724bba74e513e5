"""Whatever breaks in the service, the engine says what it says without it: no error, no hang."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import redis as redis_client

from kvstore.bench.engine_models import prompt
from kvstore.bench.engine_process import transfer_config
from kvstore.fleet.local_cluster import LocalCluster
from kvstore.store.arena import table_bytes
from kvstore.types import Tier
from tests.engines.cases import note, prompts, same, seed_store, whole_blocks
from tests.engines.harness import (
    PATIENT,
    VICTIM,
    Engine,
    addresses,
    looked_up,
    service,
    stored_under,
    wait_until,
)

ANSWERS_IN_S = 60.0
"""A hang would last longer, on a machine that is busy too."""


def bounded(engine: Engine, asked: list[list[int]]) -> dict[str, Any]:
    began = time.monotonic()
    answer = engine.run(asked, logprobs=1)
    assert time.monotonic() - began < ANSWERS_IN_S
    assert "errors" not in answer["counters"]
    return answer


def test_service_absent_from_the_start(one: Engine, models: dict[str, Path]) -> None:
    asked = prompts(100)
    reference = one.build(models["llama"]).run(asked, logprobs=1)
    one.build(models["llama"], {"coordinators": "127.0.0.1:9", "workers": "/nonexistent/kvstore.sock"})
    answer = bounded(one, asked)
    same(answer, reference)
    assert "tokens_loaded" not in answer["counters"]
    note("service absent from the start", asked, answer["counters"])


def test_coordinator_killed(one: Engine, two: Engine, models: dict[str, Path]) -> None:
    """The second replica is up; then the coordinator goes. Blocks on this host are found without it."""
    asked = prompts(110)
    with service() as cluster:
        extra = addresses(cluster)
        reference = seed_store(one, models["llama"], cluster, asked)
        two.build(models["llama"], extra).run([prompt(200, 1)], 1)
        assert cluster.coordinator is not None
        cluster.coordinator.process.kill()
        answer = bounded(two, asked)
        same(answer, reference)
        assert answer["counters"]["tokens_loaded"] == whole_blocks(asked)
        note("coordinator killed", asked, answer["counters"])
        two.build(models["llama"])


def test_worker_killed_between_match_and_load(one: Engine, models: dict[str, Path], tmp_path: Path) -> None:
    asked = prompts(120)
    victim = tmp_path / "victim"
    with service() as cluster, Engine(env={VICTIM: str(victim)}) as second:
        extra = addresses(cluster)
        reference = seed_store(one, models["llama"], cluster, asked)
        patient = {**extra, **PATIENT}
        second.build(models["llama"], transfer=transfer_config(patient, "KillsBeforeLoading", "tests.engines.faulty"))
        victim.write_text(str(cluster.workers[0].process.pid))
        answer = bounded(second, asked)
        assert Path(f"{victim}.done").exists(), "nothing was matched: the case shows nothing"
        same(answer, reference)
        assert answer["counters"]["tokens_failed"] > 0
        note("worker killed between match and load", asked, answer["counters"])


def flip(path: Path) -> int:
    """Change a byte in every 4 KiB of a file after its first; returns how many."""
    content = bytearray(path.read_bytes())
    places = range(8192 + 777, len(content), 4096)
    with path.open("r+b") as file:
        for place in places:
            file.seek(place)
            file.write(bytes([content[place] ^ 0xFF]))
    return len(places)


def test_blocks_corrupted_on_ssd(one: Engine, two: Engine, models: dict[str, Path]) -> None:
    """The worker starts again and knows its blocks from the log only; then their bytes change."""
    asked = prompts(130)
    with service(store={"host_bytes": "128MiB", "ssd_direct": "false"}) as cluster:
        extra = addresses(cluster)
        reference = seed_store(one, models["llama"], cluster, asked)
        others = [prompt(1900, seed) for seed in range(500, 500 + FILL)]
        one.run(others, 1)
        cluster_settles(cluster)
        restart(cluster)
        segments = [
            path for path in Path(cluster.folder).rglob("*") if path.is_file() and path.stat().st_size > 1 << 20
        ]
        assert sum(flip(path) for path in segments) > 0, "nothing lies on the SSD: the case shows nothing"
        answer = bounded(two.build(models["llama"], extra), asked)
        same(answer, reference)
        assert answer["counters"].get("tokens_loaded", 0) < whole_blocks(asked)
        note("blocks corrupted on SSD", asked, answer["counters"])


@pytest.mark.parametrize("tier", ["hot", "host"])
def test_blocks_corrupted_in_memory(one: Engine, two: Engine, models: dict[str, Path], tier: str) -> None:
    """Raw blocks in the hot tier, encoded ones in host memory: the worker goes on and does not know."""
    asked = prompts(150 if tier == "hot" else 151)
    with service(store={"host_bytes": "128MiB", "hot_bytes": "8MiB"}) as cluster:
        reference = seed_store(one, models["llama"], cluster, asked)
        under = stored_under(one)
        wanted = {Tier[tier.upper()]: sum(len(ids) // 64 for ids in asked)}
        if tier == "host":
            one.run([prompt(1900, seed) for seed in range(800, 806)], 1)

        def there() -> bool:
            plans = looked_up(cluster, *under, asked)
            return wanted == dict(sum((Counter(plan.tiers()) for plan in plans), Counter()))

        wait_until(there, what=f"all blocks lying in {tier}")
        assert flip_memory(cluster.workers[0].process.pid) > 0, "no memory was found: the case shows nothing"
        answer = bounded(two.build(models["llama"], addresses(cluster)), asked)
        same(answer, reference)
        assert answer["counters"].get("tokens_loaded", 0) < whole_blocks(asked)
        assert answer["counters"]["tokens_failed"] > 0
        note(f"blocks corrupted in {tier}", asked, answer["counters"])


def flip_memory(pid: int) -> int:
    """Change a byte in every 4 KiB of a process's block memory, but for the generation tables; returns how many."""
    changed = 0
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            place, rights, *_ = line.split()
            if "/memfd:" not in line or not rights.startswith("rw"):
                continue
            begin, end = (int(part, 16) for part in place.split("-"))
            for at in range(begin + table_bytes(end - begin) + 777, end, 4096):
                memory.seek(at)
                [byte] = memory.read(1)
                memory.seek(at)
                memory.write(bytes([byte ^ 0xFF]))
                changed += 1
    return changed


FILL = 60
"""Prompts that push the first ones out of memory."""


def cluster_settles(cluster: LocalCluster) -> None:
    """Waits until segments on the SSD stop growing."""
    sizes: list[int] = []

    def still() -> bool:
        sizes.append(sum(path.stat().st_size for path in Path(cluster.folder).rglob("*") if path.is_file()))
        return len(sizes) > 20 and len(set(sizes[-20:])) == 1

    wait_until(still, 60, "spilling to end")


def restart(cluster: LocalCluster) -> None:
    import asyncio

    asyncio.run(cluster.restart_worker(0))


@pytest.mark.parametrize("fault", ["corrupted", "stopped"])
def test_redis(one: Engine, two: Engine, models: dict[str, Path], fault: str) -> None:
    """Blocks in Redis only: changed there, or Redis is gone."""
    asked = prompts(140 if fault == "corrupted" else 141)
    small = {"host_bytes": "24MiB", "hot_bytes": "8MiB", "ssd_bytes": "8MiB", "segment_bytes": "4MiB"}
    small |= {"ssd_segment_bytes": "2MiB", "staging_bytes": "8MiB", "staging_total_bytes": "64MiB"}
    with service(redis=True, store=small) as cluster:
        extra = addresses(cluster)
        reference = seed_store(one, models["llama"], cluster, asked)
        one.run([prompt(1900, seed) for seed in range(700, 700 + FILL // 2)], 1)
        cluster_settles(cluster)
        assert cluster.redis is not None
        if fault == "corrupted":
            assert corrupt_redis(cluster.redis.url) > 0, "nothing lies in Redis: the case shows nothing"
        else:
            cluster.redis.stop()
        answer = bounded(two.build(models["llama"], extra), asked)
        same(answer, reference)
        note(f"Redis {fault}", asked, answer["counters"])


def corrupt_redis(url: str) -> int:
    changed = 0
    with redis_client.Redis.from_url(url) as client:
        for key in client.scan_iter(count=1000):
            if client.type(key) == b"string" and (size := client.strlen(key)) > 4096:
                byte = client.getrange(key, size // 2, size // 2)
                client.setrange(key, size // 2, bytes([byte[0] ^ 0xFF]))
                changed += 1
    return changed
