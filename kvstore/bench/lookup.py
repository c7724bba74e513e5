"""`kvstore bench lookup`: a lookup beside an answer of the same size, keys, and how soon a commit can be seen.

A coordinator and a worker are child processes, and so is the echo: the coordinator's server stack, which answers every
Match with the same message.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np

from kvstore.bench.data_baselines import Child
from kvstore.bench.lookup_busy import measure_busy
from kvstore.bench.report import Report
from kvstore.bench.transfer_blocks import client, plan_of
from kvstore.client.kv_client import KVClient
from kvstore.client.view import View
from kvstore.config import Config, override
from kvstore.directory.runs import Run
from kvstore.fleet.local_cluster import LocalCluster
from kvstore.keys import Chain, Tokens, chain
from kvstore.machine.system import RealClock
from kvstore.spec import Group, ModelSpec, Shard
from kvstore.transport.base import Channel, Credentials
from kvstore.transport.methods import COORDINATOR
from kvstore.transport.rpc import GrpcTransport
from kvstore.types import KEY_BYTES, Fidelity, Keys, Tier, pack_keys
from kvstore.wire import common_pb2, coordinator_pb2
from kvstore.wireform import shard_to_wire

BLOCKS = 1024
PROMPT_TOKENS = 131_072
LOOKUPS, LOOKUPS_LONG = 300, 2000
COMMITS, COMMITS_LONG = 100, 400
KEYED = 15
SPEC = ModelSpec(model="bench/lookup", groups=(Group(layers=1, kv_heads=1, k_dim=4, v_dim=4),), block_tokens=64)
TIMEOUT_S = 5.0
VIEW_ENTRIES = 1_000_000
VIEW_LOOKUPS = 2000
VIEW_PROMPTS = 64  # asked in turn, so that none is in a cache because it was asked last


def main(argv: Sequence[str]) -> Report:
    """`kvstore bench lookup`'s own flags."""
    parser = argparse.ArgumentParser(prog="kvstore bench lookup", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, within 40 s")
    arguments = parser.parse_args(argv)
    report = Report("lookup")
    measure_keys(report)
    measure_view(report)
    asyncio.run(_run(report, quick=arguments.quick))
    return report


def measure_keys(report: Report) -> None:
    """Keys of a long prompt, from an array and from a list of ids. Mutates the report."""
    now = RealClock().monotonic
    array = np.random.Generator(np.random.PCG64(1)).integers(0, 1 << 31, PROMPT_TOKENS, np.uint32)
    given: dict[str, Tokens] = {"array": array, "list": array.tolist()}
    for name, tokens in given.items():
        took = []
        for _ in range(KEYED):
            begin = now()
            made = chain(SPEC, tokens)
            took.append((now() - begin) * 1e3)
            assert len(made) == PROMPT_TOKENS // SPEC.block_tokens
        report.result(f"keys_of_{name}", took, "ms")
        report.target(f"keys_of_{name}", at_most=4)


def measure_view(report: Report) -> None:
    """A lookup in a view of a million blocks, as a client with `watch` makes it. Mutates the report."""
    now = RealClock().monotonic
    rng = np.random.Generator(np.random.PCG64(2))
    whole = Shard.whole(SPEC)
    view = View(1 << 20, 0)
    view.take(coordinator_pb2.WatchReply(member=coordinator_pb2.WatchMember(member=common_pb2.Member(id="w", epoch=1))))
    view.directory.learn_spec(SPEC)
    view.directory.learn_shard(whole)
    prompts = []
    for number in range(VIEW_ENTRIES // BLOCKS):
        keys = Keys(rng.bytes(BLOCKS * KEY_BYTES))
        view.directory.add("w", Run(SPEC.root, whole.digest, Tier.HOT, Fidelity.EXACT, SPEC.root, 0, keys, keys[0], 1))
        if number % (VIEW_ENTRIES // BLOCKS // VIEW_PROMPTS) == 0:
            prompts.append(Chain(SPEC, list(keys)))
    took = []
    for prompt in prompts:
        assert len(prompt.packed) == BLOCKS  # as `chain` leaves it
    for turn in range(VIEW_LOOKUPS):
        prompt = prompts[turn % len(prompts)]
        begin = now()
        plan = view.match(SPEC, prompt.keys, prompt.packed, (whole,), Fidelity.EXACT)
        took.append((now() - begin) * 1e6)
        assert plan.blocks == BLOCKS
    report.result("local_view_p50", took, "us")
    report.results["local_view_p99"] = {"value": float(np.quantile(took, 0.99)), "unit": "us", "n": len(took)}
    report.target("local_view_p50", at_most=60)


def config() -> Config:
    return override(Config(), {"store": {"host_bytes": 256 << 20, "hot_bytes": 128 << 20}})


async def _run(report: Report, *, quick: bool) -> None:
    async with LocalCluster(config(), workers=1, redis=False) as cluster:
        by = await client(cluster.client_config(0))
        other = await client(cluster.client_config())
        try:
            prompt = await _stored(by)
            await _lookups(report, cluster, by, prompt, quick=quick)
            await _visible(report, by, other, COMMITS if quick else COMMITS_LONG)
        finally:
            for made in (by, other):
                await made.close()
                made.system.pool.close()


async def _stored(by: KVClient) -> Chain:
    """A prompt of `BLOCKS` blocks that the coordinator knows."""
    prompt = chain(SPEC, np.arange(BLOCKS * SPEC.block_tokens, dtype=np.uint32))
    raw = bytes(SPEC.group_bytes(SPEC.groups[0]))
    states = (await by.put(SPEC, prompt, [raw] * BLOCKS)).states
    assert states == ["committed"] * BLOCKS
    await plan_of(by, prompt)
    for _ in range(200):
        if (await by.match(SPEC, prompt)).complete:
            return prompt
        await asyncio.sleep(0.05)  # until then a client asks this host's worker too
    raise AssertionError("the coordinator never knew everything")


async def _lookups(report: Report, cluster: LocalCluster, by: KVClient, prompt: Chain, *, quick: bool) -> None:
    """`KVClient.match`, the bare call behind it, and the echo, in turns. Mutates the report."""
    transport = GrpcTransport(RealClock())
    request = common_pb2.MatchRequest(
        root=SPEC.root,
        keys=pack_keys(prompt.keys),
        shards=[shard_to_wire(Shard.whole(SPEC))],
    )
    assert cluster.coordinator is not None
    ours = await transport.connect(cluster.coordinator.address, Credentials())
    reply = await ours.unary(COORDINATOR["Match"], request, timeout_s=TIMEOUT_S)
    canned = Path(cluster.folder) / "reply"
    canned.write_bytes(reply.SerializeToString())
    child = await Child.start(cluster.folder, "echo", str(canned))
    theirs = await transport.connect(child.address, Credentials())

    async def match() -> int:
        return (await by.match(SPEC, prompt)).blocks

    def call(channel: Channel) -> Callable[[], Awaitable[int]]:
        async def made() -> int:
            return int((await channel.unary(COORDINATOR["Match"], request, timeout_s=TIMEOUT_S)).blocks)

        return made

    count = LOOKUPS if quick else LOOKUPS_LONG
    seconds = await _in_turns({"echo": call(theirs), "match_rpc": call(ours), "match_client": match}, count)
    asked = Path(cluster.folder) / "request"
    asked.write_bytes(request.SerializeToString())
    await measure_busy(report, str(asked), cluster.coordinator.address, child.address, quick=quick)
    child.close()
    await theirs.close()
    await ours.close()
    for name, took in seconds.items():
        report.result(f"{name}_p50", [s * 1e3 for s in took], "ms")
        report.results[f"{name}_p99"] = {"value": float(np.quantile(took, 0.99)) * 1e3, "unit": "ms", "n": len(took)}
    report.ratio("match_rpc_vs_echo", "match_rpc_p50", "echo_p50", at_most=1.2)
    report.ratio("match_client_vs_echo", "match_client_p50", "echo_p50")


async def _in_turns(turns: dict[str, Callable[[], Awaitable[int]]], count: int) -> dict[str, list[float]]:
    now = RealClock().monotonic
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(-10, count):
        for name, ask in turns.items():
            begin = now()
            blocks = await ask()
            took = now() - begin
            assert blocks == BLOCKS, f"{name}: {blocks} of {BLOCKS} blocks"
            if turn >= 0:
                seconds[name].append(took)
    return seconds


async def _visible(report: Report, by: KVClient, other: KVClient, count: int) -> None:
    """From a put's answer to the first Match of another client that has the block, and with the put's token shown.

    Mutates the report.
    """
    now = RealClock().monotonic
    raw = bytes(SPEC.group_bytes(SPEC.groups[0]))
    seen: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(count):
        for shown, took in seen.items():
            tokens = np.full(SPEC.block_tokens, 1_000_000 + 2 * turn + shown, np.uint32)
            prompt = chain(SPEC, tokens)
            done = await by.put(SPEC, prompt, [raw])
            assert done.states == ["committed"]
            begin = now()
            while not (await other.match(SPEC, prompt, after=done.tokens if shown else ())).blocks:
                assert now() - begin < TIMEOUT_S, "a commit never showed"
            took.append((now() - begin) * 1e3)
    for shown, name in ((False, "visible"), (True, "visible_after_token")):
        report.result(f"{name}_p50", seen[shown], "ms")
        report.results[f"{name}_p99"] = {"value": float(np.quantile(seen[shown], 0.99)), "unit": "ms", "n": count}
    report.target("visible_p99", at_most=100)
    report.target("visible_after_token_p99", at_most=100)
