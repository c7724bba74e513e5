"""Replay: the payload betrays any wrong byte, tier sizes follow the trace, and a whole run ends with nothing wrong."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest

from kvstore.cli.main import main
from kvstore.client.kv_client import KVClient
from kvstore.config import ClientConfig, StoreConfig, load_config
from kvstore.errors import UsageError
from kvstore.fleet.local_cluster import LocalCluster
from kvstore.keys import chain
from kvstore.layout import block_bytes
from kvstore.operations.payload import BLOCK_BYTES_STEP, Payload, replay_spec, tokens_of
from kvstore.operations.replay import TIERS
from kvstore.operations.replay_sizes import TierSizes, choose_sizes, store_settings
from kvstore.operations.reuse import distances, sizes
from kvstore.operations.trace import TRACE_BLOCK_TOKENS, Request, footprint
from kvstore.spec import Shard


def conversations(count: int, turns: int, seed: int = 1) -> list[Request]:
    """Chats in random turns, all behind one system prompt of two blocks; each turn adds three blocks."""
    rng = Random(seed)
    prompts: list[list[int]] = [[0, 1] for _ in range(count)]
    left = [turns] * count
    fresh = 2
    requests: list[Request] = []
    while any(left):
        chat = rng.choice([i for i, n in enumerate(left) if n])
        left[chat] -= 1
        prompts[chat] = [*prompts[chat], *range(fresh, fresh + 3)]
        fresh += 3
        requests.append(Request(float(len(requests)), len(prompts[chat]) * 512, 10, tuple(prompts[chat])))
    return requests


def write_trace(path: Path, requests: list[Request]) -> Path:
    with path.open("w") as file:
        for r in requests:
            line = {"timestamp": r.timestamp_ms, "input_length": r.input_tokens, "output_length": r.output_tokens}
            file.write(json.dumps(line | {"hash_ids": list(r.hash_ids)}) + "\n")
    return path


# --- payload -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [BLOCK_BYTES_STEP, 16 << 10, 3 * BLOCK_BYTES_STEP, 2 << 20])
def test_a_block_of_the_replay_has_the_size_asked_for(nbytes: int) -> None:
    spec = replay_spec(nbytes)
    assert block_bytes(spec, Shard.whole(spec)) == nbytes
    assert spec.block_tokens == TRACE_BLOCK_TOKENS


@pytest.mark.parametrize("nbytes", [0, -2048, BLOCK_BYTES_STEP - 1, 1000])
def test_other_sizes_are_refused(nbytes: int) -> None:
    with pytest.raises(ValueError, match="multiple"):
        replay_spec(nbytes)


def test_the_payload_is_a_function_of_the_key_and_every_byte_counts() -> None:
    payload, rng = Payload(16 << 10), Random(3)
    key, other = rng.randbytes(16), rng.randbytes(16)
    block = payload.make(key)
    assert payload.check(key, block)
    assert np.array_equal(block, Payload(16 << 10).make(key))
    assert not payload.check(other, block)
    for _ in range(200):
        position, bit = rng.randrange(block.nbytes), 1 << rng.randrange(8)
        block[position] ^= bit
        assert not payload.check(key, block)
        block[position] ^= bit
    assert payload.check(key, block)
    assert not payload.check(key, block[:-2])
    assert not payload.check(key, np.zeros_like(block))
    assert not payload.check(key, np.roll(block, 16))


def test_tokens_of_blocks_are_a_function_of_the_id() -> None:
    tokens = tokens_of((7, 8, (1 << 64) - 1))
    assert tokens.shape == (3 * TRACE_BLOCK_TOKENS,) and tokens.dtype == np.uint32
    assert np.array_equal(tokens[:512], tokens_of((7,)))
    spec = replay_spec(16 << 10)
    keys = chain(spec, tokens_of((1, 2, 3))).keys
    assert chain(spec, tokens_of((1, 2, 4))).keys[:2] == keys[:2]
    assert len({*keys, *chain(spec, tokens_of((9, 2, 3))).keys}) == 6


# --- sizes -------------------------------------------------------------------------------------------------------


def test_reuse_distances_are_those_of_an_lru_stack() -> None:
    requests = conversations(12, 6)
    stack: list[int] = []
    expected = []
    for request in requests:
        for block in reversed(request.hash_ids):
            if block in stack:
                expected.append(float(stack.index(block)))
                stack.remove(block)
            stack.insert(0, block)
    asked = footprint(requests)
    assert distances(requests, asked.accesses) == sorted(expected)
    assert len(expected) == asked.reusable


def test_a_sample_of_a_long_trace_has_about_the_same_distances() -> None:
    requests = conversations(60, 12)
    exact = distances(requests, footprint(requests).accesses)
    sampled = distances(requests, 240_000)  # says it is longer than it is: a quarter is sampled
    assert 0.1 < len(sampled) / len(exact) < 0.5
    assert sampled[len(sampled) // 2] == pytest.approx(exact[len(exact) // 2], rel=0.3)


def test_tiers_are_sized_so_that_each_would_serve_its_share() -> None:
    requests = conversations(40, 10)
    asked = footprint(requests)
    found = distances(requests, asked.accesses)
    hot, host, ssd = sizes(found, (1, 1, 1))
    bounds = [0, hot, hot + host, hot + host + ssd, float("inf")]
    shares = [sum(low <= d < high for d in found) / len(found) for low, high in pairwise(bounds)]
    assert all(share > 0.1 for share in shares), shares
    assert sizes([], (10, 20)) == [10, 20]
    assert sizes(found, (1e6, 7, 1)) == [1e6, 7, 1]
    floor, host, ssd = sizes(found, (2 * hot, 1, 1))  # a floor leaves less, and the others share it
    left = [d for d in found if d > floor]
    assert floor == 2 * hot
    assert sum(d < floor + host for d in left) / len(left) == pytest.approx(1 / 3, abs=0.15)
    assert sum(d < floor + host + ssd for d in left) / len(left) == pytest.approx(2 / 3, abs=0.15)


def test_sizes_given_are_kept_and_shares_are_of_what_is_asked_for() -> None:
    requests, spec = conversations(10, 5), replay_spec(16 << 10)
    asked = footprint(requests)
    chosen = choose_sizes(requests, asked, spec, StoreConfig(), TierSizes("1MiB", "50%", None, "8MiB"))
    assert chosen[0] == 1 << 20 and chosen[3] == 8 << 20
    assert chosen[1] == asked.distinct * (16 << 10) // 2
    settings = store_settings(chosen, 2, StoreConfig())
    assert settings["hot_bytes"] == 1 << 19
    for bad in ("lots", "0", "-5%", "%", "0%"):
        with pytest.raises(UsageError, match="size"):
            choose_sizes(requests, asked, spec, StoreConfig(), TierSizes(hot=bad))


# --- whole runs --------------------------------------------------------------------------------------------------


def test_a_run_over_a_fresh_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four processes, four tiers, every byte checked, nothing left behind."""
    requests = conversations(30, 5)
    asked = footprint(requests)
    trace = write_trace(tmp_path / "trace.jsonl", requests)
    status = main(["replay", str(trace), "--json", "--concurrency", "4"])
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert status == 0, captured.err
    assert set(result) == {
        "requests", "blocks", "stored", "wrong", "hits", "misses", "second_half", "seconds", "get_ms_p50", "get_ms_p99",
    }  # fmt: skip
    assert result["wrong"] == 0
    assert (result["requests"], result["blocks"]) == (asked.requests, asked.accesses)
    hits = sum(result["hits"].values())
    assert list(result["hits"]) == list(TIERS)
    assert asked.reusable * 0.7 <= hits <= asked.reusable * 1.1
    assert all(count >= 0.02 * hits for count in result["hits"].values()), result["hits"]
    assert result["misses"] <= asked.accesses - 0.7 * asked.reusable
    assert 0 < result["second_half"]["blocks"] < asked.accesses
    assert sum(result["second_half"]["hits"].values()) < hits


@pytest.mark.parametrize(
    ("content", "flags", "why"),
    [
        ('{"timestamp": 0}\n', [], "line 1: input_length is missing"),
        ("", [], "holds no request"),
        (None, [], "cannot read the trace"),
        ("ok", ["--hot-bytes", "many"], "'many' is no size"),
        ("ok", ["--requests", "0"], "--requests"),
        ("ok", ["--block-bytes", "1000"], "multiple"),
        ("ok", ["--coordinators", "127.0.0.1:1"], "no service answers at 127.0.0.1:1"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, flags: list[str], why: str
) -> None:
    path = tmp_path / "trace.jsonl"
    if content == "ok":
        write_trace(path, conversations(2, 2))
    elif content is not None:
        path.write_text(content)
    try:
        status = main(["replay", str(path), *flags])
    except SystemExit as error:  # argparse
        status = int(str(error.code))
    captured = capsys.readouterr()
    assert status == 2
    assert why in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_wrong_bytes_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The negative control: somebody stored other bytes under the keys of one prompt, and every block of it is told."""
    requests = conversations(3, 3)
    trace = write_trace(tmp_path / "trace.jsonl", requests)
    small = {"store": {"host_bytes": "16MiB", "ssd_bytes": "16MiB", "ssd_segment_bytes": "1MiB"}}
    cluster = LocalCluster(load_config(env={}, overrides=small), workers=1, redis=False)
    try:
        asyncio.run(cluster.start())
        config = cluster.client_config(0)
        command = ["replay", str(trace), "--json", "--concurrency", "1", "--coordinators", config.coordinators[0]]
        asyncio.run(poison(config, requests[0]))
        assert main(command) == 1
        result = json.loads(capsys.readouterr().out)
        shared = sum(len(set(r.hash_ids) & set(requests[0].hash_ids)) for r in requests)
        assert result["wrong"] == shared > 0
        assert main(["purge", "--json", "--coordinators", config.coordinators[0]]) == 0
        assert json.loads(capsys.readouterr().out)["blocks"] == footprint(requests).distinct
        assert main(command) == 0  # the same service without the poison
        result = json.loads(capsys.readouterr().out)
        assert result["wrong"] == 0
        assert sum(result["hits"].values()) == footprint(requests).reusable
        assert result["hits"]["hot"] == footprint(requests).reusable  # there is room for all of it
        assert result["stored"] == footprint(requests).distinct
    finally:
        cluster.stop()


async def poison(config: ClientConfig, request: Request) -> None:
    """Store other bytes under the keys of that prompt."""
    spec = replay_spec(16 << 10)
    prompt = chain(spec, tokens_of(request.hash_ids))
    async with await KVClient.connect(config) as client:
        stored = await client.put(spec, prompt, [np.full(16 << 10, 7, np.uint8) for _ in prompt.keys])
        assert stored.states == ["committed"] * len(prompt)
