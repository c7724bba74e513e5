"""The client against workers that lie: a miss, never wrong bytes, never an exception."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvstore.auth import Authenticator, load_policy
from kvstore.client.kv_client import KVClient
from kvstore.client.plan import HitPlan
from kvstore.config import ClientConfig
from kvstore.directory.membership import Member
from kvstore.errors import BadRequest, UsageError
from kvstore.format import Header, encode_raw_parts
from kvstore.keys import chain
from kvstore.layout import block_bytes
from kvstore.machine.system import real_system
from kvstore.spec import Shard
from kvstore.transport import frames
from kvstore.transport.base import CallContext
from kvstore.transport.rpc import GrpcTransport
from kvstore.types import Fidelity, Tier
from kvstore.wire import common_pb2, coordinator_pb2, worker_pb2
from kvstore.wireform import member_to_wire, shard_to_wire
from tests.service_helpers import FULL, payload, prompt

WHOLE = Shard.whole(FULL)


# --- arguments -----------------------------------------------------------------------------------------------------


@pytest.fixture
async def lonely() -> AsyncIterator[KVClient]:
    """A client whose coordinator does not exist."""
    system = real_system(1)
    config = ClientConfig(coordinators=("127.0.0.1:1",), connect_timeout_s=0.3, match_timeout_s=0.3)
    async with await KVClient.connect(config, system, GrpcTransport(system.clock)) as client:
        yield client
    system.pool.close()


async def test_only_wrong_arguments_raise(lonely: KVClient) -> None:
    prefix = prompt(1, 4)
    plan = await lonely.match(FULL, prefix)
    assert plan.blocks == 0 and not plan.complete
    result = await lonely.get(plan)
    assert result.blocks == 0 and result.buffers == [[]]
    put = await lonely.put(FULL, prefix, [payload(FULL, WHOLE, key) for key in prefix.keys])
    assert put.states == ["dropped"] * 4 and put.tokens == []
    assert (await lonely.match(FULL, [1, 2])).blocks == 0  # less than a block: nobody is asked
    size = block_bytes(FULL, WHOLE)
    full_plan = HitPlan(FULL, tuple(prefix.keys), (WHOLE,))
    wrong: list[Any] = [
        lonely.match(FULL, prefix, []),
        lonely.match(FULL, prefix, [Shard(0, 0, 9, 0, 1)]),
        lonely.match(replace(FULL, model="other"), prefix),
        lonely.match(FULL, [-1] * 8),
        lonely.put(FULL, prefix, [bytes(size)], first=4),
        lonely.put(FULL, prefix, [bytes(size - 1)]),
        lonely.put(FULL, prefix, [np.zeros((size, 2), np.uint8)[:, 0]]),
        lonely.put(FULL, prefix, [object()]),
        lonely.get(full_plan, []),
        lonely.get(full_plan, [[bytearray(size)] * 3]),
        lonely.get(full_plan, [[bytes(size)] * 4]),
        lonely.get(full_plan, [[bytearray(size - 1)] * 4]),
    ]
    for call in wrong:
        with pytest.raises(UsageError) as error:
            await call
        assert "\n" not in str(error.value)
    with pytest.raises(BadRequest):
        await KVClient.connect(ClientConfig())


async def test_a_dead_coordinator_costs_one_wait_not_one_a_call(lonely: KVClient) -> None:
    await lonely.match(FULL, prompt(1, 4))
    before = lonely.counters["errors_Unavailable"] + lonely.counters["errors_DeadlineExceeded"]
    for seed in range(50):
        assert (await lonely.match(FULL, prompt(seed, 4))).blocks == 0
    assert lonely.counters["errors_Unavailable"] + lonely.counters["errors_DeadlineExceeded"] <= before + 2


# --- liars ---------------------------------------------------------------------------------------------------------


class Liar:
    """A coordinator that names one worker for everything, and that worker."""

    def __init__(self) -> None:
        self.address = ""
        self.frames: Any = None  # (blocks asked for) -> frames
        self.reply: Any = None  # MatchRequest -> MatchReply
        self.gets = 0
        self.endless = False

    async def hello(self, request: common_pb2.HelloRequest, context: CallContext) -> common_pb2.HelloReply:
        return common_pb2.HelloReply(protocol=1)

    async def members(self, request: coordinator_pb2.MembersRequest, context: CallContext) -> Any:
        return coordinator_pb2.MembersReply()

    async def match(self, request: common_pb2.MatchRequest, context: CallContext) -> common_pb2.MatchReply:
        if self.reply is not None:
            made: common_pb2.MatchReply = self.reply(request)
            return made
        blocks = len(request.keys) // 16
        return common_pb2.MatchReply(
            blocks=blocks,
            complete=True,
            holders=[member_to_wire(Member("liar", 1, self.address))],
            shards=[shard_to_wire(WHOLE)],
            runs=[common_pb2.HolderRun(tier=common_pb2.TIER_HOT, fidelity=common_pb2.FIDELITY_EXACT, count=blocks)],
        )

    async def get(self, request: worker_pb2.GetRequest, context: CallContext) -> AsyncIterator[bytes]:
        self.gets += 1
        keys = request.blocks[0].keys
        for frame in self.frames([keys[at : at + 16] for at in range(0, len(keys), 16)]):
            yield frame
        if self.endless:
            await asyncio.sleep(3600)


@pytest.fixture
async def liar() -> AsyncIterator[tuple[Liar, KVClient]]:
    async with AsyncExitStack() as stack:
        system = real_system(2)
        stack.callback(system.pool.close)
        transport = GrpcTransport(system.clock)
        made = Liar()
        server = await transport.serve(
            "127.0.0.1:0", {"Coordinator": made, "Worker": made}, Authenticator(load_policy())
        )
        stack.push_async_callback(server.close, 0.1)
        made.address = server.address
        client = await KVClient.connect(ClientConfig(coordinators=(server.address,)), system, transport)
        stack.push_async_callback(client.close)
        yield made, client


PREFIX = prompt(3, 4)


def header_of(depth: int, **changes: Any) -> tuple[Header, bytes, np.ndarray]:
    """(header, table, raw bytes) of a block as an honest worker would send it, but for the changes."""
    raw = payload(FULL, WHOLE, PREFIX.keys[depth])
    header = Header.new(
        changes.pop("namespace", "default"),
        FULL,
        WHOLE,
        key=PREFIX.keys[depth],
        parent=PREFIX.parent(depth),
        group=PREFIX.group(depth),
        depth=depth,
    )
    made, table = encode_raw_parts(header, raw.data, FULL, WHOLE)
    return replace(made, **changes), table, raw


def stream(**changes: Any) -> Any:
    """The frames of an honest worker but for the changes to every header."""

    def make(keys: list[bytes]) -> list[bytes]:
        depths = [PREFIX.keys.index(key) for key in keys]
        first, rest = worker_pb2.GetHeader(), []
        for block, depth in enumerate(depths):
            header, table, raw = header_of(depth, **changes)
            first.blocks.append(
                worker_pb2.BlockInfo(state=worker_pb2.BLOCK_FOUND, header=header.pack(), tier=common_pb2.TIER_HOT)
            )
            part = worker_pb2.GetHeader(parts=[worker_pb2.ChunkPart(block=block, table=table)])
            rest.append(frames.encode(part.SerializeToString(), [raw.data]))
        return [frames.encode(first.SerializeToString(), ()), *rest]

    return make


def mangled(change: Any) -> Any:
    """An honest stream whose frames went through `change`."""
    return lambda keys: change(stream()(keys))


def flip(data: bytes, at: int) -> bytes:
    """One bit of one byte changed."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


async def test_the_honest_stream_is_delivered(liar: tuple[Liar, KVClient]) -> None:
    """The control of the lies below."""
    server, client = liar
    server.frames = stream()
    result = await client.get(await client.match(FULL, PREFIX))
    assert result.blocks == 4
    assert all(np.array_equal(result.buffers[0][d], payload(FULL, WHOLE, PREFIX.keys[d])) for d in range(4))


LIES: dict[str, Any] = {
    "another key": stream(key=bytes(16)),
    "another namespace": stream(namespace="theirs"),
    "another model": stream(root=bytes(16)),
    "another shard": stream(shard=bytes(16)),
    "less fidelity": stream(computed_on=Fidelity.COMPACT),
    "another copy": stream(copy_id=1),
    "a longer block": stream(raw_length=1 << 20, stored_length=1 << 20),
    "a flipped bit of data": mangled(lambda out: [out[0], *(flip(frame, len(frame) - 9) for frame in out[1:])]),
    "a flipped bit of a table": mangled(lambda out: [out[0], *(flip(frame, 40) for frame in out[1:])]),
    "no frames": mangled(lambda out: []),
    "only headers": mangled(lambda out: out[:1]),
    "no header": mangled(lambda out: out[1:]),
    "frames cut short": mangled(lambda out: [out[0], *(frame[:-5] for frame in out[1:])]),
    "garbage": lambda keys: [b"\xff" * 100],
    "too many blocks": mangled(
        lambda out: [
            frames.encode(worker_pb2.GetHeader(blocks=[worker_pb2.BlockInfo()] * 99).SerializeToString(), ()),
            *out[1:],
        ]
    ),
    "blocks of others": mangled(
        lambda out: [
            out[0],
            frames.encode(worker_pb2.GetHeader(parts=[worker_pb2.ChunkPart(block=77)]).SerializeToString(), ()),
        ]
    ),
}


@pytest.mark.parametrize("lie", sorted(LIES))
async def test_a_lie_is_a_miss(liar: tuple[Liar, KVClient], lie: str) -> None:
    server, client = liar
    server.frames = LIES[lie]
    plan = await client.match(FULL, PREFIX)
    assert plan.blocks == 4
    result = await client.get(plan)
    assert result.blocks == 0 and result.tiers == [[None] * 4] and result.bytes == 0
    assert client.counters["misses"] == 4
    again = await client.match(FULL, PREFIX)
    assert again.blocks == 0 and server.gets == 1  # remembered: not asked again at once


async def test_one_bad_block_costs_that_block_only(liar: tuple[Liar, KVClient]) -> None:
    server, client = liar
    server.frames = mangled(lambda out: [*out[:3], flip(out[3], len(out[3]) - 9), *out[4:]])
    result = await client.get(await client.match(FULL, PREFIX))
    assert result.blocks == 2 and result.tiers[0] == [Tier.HOT, Tier.HOT, None, Tier.HOT]
    assert (await client.match(FULL, PREFIX)).blocks == 2
    server.frames = mangled(lambda out: [flip(out[0], 30), *out[1:]])  # the header of the first one
    result = await client.get(await client.match(FULL, PREFIX))
    assert result.blocks == 0 and result.tiers[0] == [None, Tier.HOT]


async def test_a_stream_that_hangs_ends_at_the_deadline_with_what_came(liar: tuple[Liar, KVClient]) -> None:
    server, client = liar
    server.frames, server.endless = mangled(lambda out: out[:3]), True
    plan = await client.match(FULL, PREFIX)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    result = await client.get(plan, timeout_s=0.5)
    assert loop.time() - begun < 2.0
    assert result.blocks == 2
    assert (await client.match(FULL, PREFIX)).blocks == 2


ODD_ANSWERS: dict[str, Any] = {
    "more blocks than asked": lambda r: common_pb2.MatchReply(blocks=99, complete=True),
    "a run outside": lambda r: common_pb2.MatchReply(
        blocks=1, complete=True, holders=[common_pb2.Member(id="x")], shards=[shard_to_wire(WHOLE)],
        runs=[common_pb2.HolderRun(tier=common_pb2.TIER_HOT, fidelity=common_pb2.FIDELITY_EXACT, count=9)],
    ),
    "a holder nobody named": lambda r: common_pb2.MatchReply(
        blocks=1, complete=True, shards=[shard_to_wire(WHOLE)],
        runs=[common_pb2.HolderRun(holder=3, tier=common_pb2.TIER_HOT, fidelity=common_pb2.FIDELITY_EXACT, count=1)],
    ),
    "an odd tier": lambda r: common_pb2.MatchReply(
        blocks=1, complete=True, holders=[common_pb2.Member(id="x")], shards=[shard_to_wire(WHOLE)],
        runs=[common_pb2.HolderRun(tier=9, fidelity=common_pb2.FIDELITY_EXACT, count=1)],  # type: ignore[arg-type]
    ),
    "an odd shard": lambda r: common_pb2.MatchReply(
        blocks=1, complete=True, holders=[common_pb2.Member(id="x")], shards=[common_pb2.Shard(layer_count=99)],
        runs=[common_pb2.HolderRun(tier=common_pb2.TIER_HOT, fidelity=common_pb2.FIDELITY_EXACT, count=1)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("answer", sorted(ODD_ANSWERS))
async def test_an_odd_answer_to_a_lookup_is_a_miss(liar: tuple[Liar, KVClient], answer: str) -> None:
    server, client = liar
    server.reply = ODD_ANSWERS[answer]
    plan = await client.match(FULL, PREFIX)
    assert plan.blocks == 0 and client.counters["errors_Corrupt"] == 1


async def test_a_plan_without_holders_is_a_miss(liar: tuple[Liar, KVClient]) -> None:
    server, client = liar
    server.reply = lambda r: common_pb2.MatchReply(blocks=4, complete=True)
    result = await client.get(await client.match(FULL, PREFIX))
    assert result.blocks == 0 and server.gets == 0


async def test_a_miss_allocates_nothing(liar: tuple[Liar, KVClient], monkeypatch: pytest.MonkeyPatch) -> None:
    server, client = liar
    server.reply = lambda r: common_pb2.MatchReply(complete=True)

    def allocate(*args: object, **kwargs: object) -> None:
        raise AssertionError("memory was allocated for a miss")

    monkeypatch.setattr(np, "empty", allocate)
    plan = await client.match(FULL, chain(FULL, list(range(400))))
    assert (await client.get(plan)).blocks == 0
