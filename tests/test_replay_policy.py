"""A live replay has the hits that the same policy has offline, where all tiers together hold as much."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from kvstore.cli.main import main
from kvstore.config import KIB
from kvstore.operations.eviction_replay import Replay, block_trace
from kvstore.operations.trace import Request
from kvstore.policies.base import make_policy
from tests.test_replay import write_trace

BLOCK = 16 * KIB
RECORD = 20 * KIB  # such a block below hot, in whole pages
TURN_BLOCKS = 8
HOT, HOST, SSD = 60, 60, 200
"""Blocks that each tier holds: host the longest prompt, which is loaded as a whole; Redis: none to speak of."""


def agents(sessions: int, seed: int = 5) -> list[Request]:
    """Sessions that go on soon after a tool call and never after an answer, beside prompts that come once: recency
    tells little of them, the finish reason nearly all."""
    rng, events, block = Random(seed), list[tuple[float, tuple[int, ...], str]](), 0
    for _ in range(sessions):
        now, ids = rng.uniform(0, 5000), tuple[int, ...]()
        for _ in range(rng.choice((1, 1, 1, 6))):
            ids += tuple(range(block, block + TURN_BLOCKS))
            block += TURN_BLOCKS
            events.append((now, ids, "tool_use"))
            now += rng.uniform(20, 120)
        events[-1] = (events[-1][0], ids, "end_turn")
    return [Request(time * 1000, 512 * len(ids), 50, ids, finish) for time, ids, finish in sorted(events)]


def write(path: Path, requests: list[Request]) -> Path:
    write_trace(path, requests)
    lines = map(json.loads, path.read_text().splitlines())
    told = [json.dumps(line | {"finish": r.finish}) for line, r in zip(lines, requests, strict=True)]
    path.write_text("\n".join(told) + "\n")
    return path


def live(requests: list[Request], folder: Path, policy: str, capsys: pytest.CaptureFixture[str]) -> float:
    """Percent of the second half's blocks that were hits."""
    path, config = write(folder / "trace.jsonl", requests), folder / "kvstore.toml"
    config.write_text(f'[store]\npolicy = "{policy}"\n')
    sizes = {"hot": HOT * BLOCK, "host": HOST * RECORD, "ssd": SSD * RECORD, "redis": BLOCK}
    flags = [f"--{tier}-bytes={nbytes}" for tier, nbytes in sizes.items()]
    command = ["replay", str(path), "--json", "--workers", "1", "--concurrency", "1", "--codec", "raw"]
    status = main([*command, "--config", str(config), *flags])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    half = json.loads(captured.out)["second_half"]
    return 100 * sum(half["hits"].values()) / float(half["blocks"])


def offline(requests: list[Request], policy: str, blocks: int) -> float:
    return Replay(block_trace(requests), make_policy(policy), blocks).run().percent


def test_live_and_offline_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiers are 80 to 100 % full, and what lies in host may lie on SSD besides: between the two bounds, within two
    points. A policy that is told nothing, or of other times, would not be: recency alone stays far below."""
    make_policy("default")  # its loops are compiled before the worker needs them: until then LRU decides
    requests = agents(250)
    least, most = (HOT + SSD) * 8 // 10, HOT + HOST + SSD
    found = live(requests, tmp_path, "default", capsys)
    assert offline(requests, "default", least) - 2 <= found <= offline(requests, "default", most) + 2
    assert found > offline(requests, "lru", least) + 5
