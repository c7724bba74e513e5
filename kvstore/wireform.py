"""Lookups, members and tokens as messages and back. What comes from a wire is checked here: BadRequest or Corrupt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from kvstore.client.plan import HitPlan, PlanRun
from kvstore.directory.answers import Match
from kvstore.directory.membership import Member
from kvstore.errors import BadRequest, Corrupt
from kvstore.histogram import BOUNDS_S, Histogram
from kvstore.spec import ModelSpec, Shard
from kvstore.types import KEY_BYTES, CommitToken, Fidelity, Keys, Tier
from kvstore.wanted import Wanted
from kvstore.wire import common_pb2, worker_pb2

AFTER_MAX = 16
SHARDS_MAX = 1024
"""Rectangles one call may name."""


def shard_to_wire(shard: Shard) -> common_pb2.Shard:
    return common_pb2.Shard(
        group=shard.group,
        layer_first=shard.layer_first,
        layer_count=shard.layer_count,
        head_first=shard.head_first,
        head_count=shard.head_count,
    )


def shard_from_wire(message: common_pb2.Shard) -> Shard:
    """BadRequest where a number is out of bounds."""
    return _shard(message.group, message.layer_first, message.layer_count, message.head_first, message.head_count)


_shard = lru_cache(maxsize=4096)(Shard)  # models have few, and every lookup names them


def member_to_wire(member: Member) -> common_pb2.Member:
    return common_pb2.Member(
        id=member.id,
        epoch=member.epoch,
        address=member.address,
        socket=member.socket,
        host=member.host,
        node=member.node,
        state=member.state,
        slow_start=member.slow_start,
    )


def latency_to_wire(what: str, histogram: Histogram, tier: Tier | None = None) -> common_pb2.Latency:
    return common_pb2.Latency(
        what=what,
        tier=int(tier or 0),  # type: ignore[arg-type]
        bounds_s=BOUNDS_S,
        counts=histogram.counts,
        sum_s=histogram.sum_s,
    )


def member_from_wire(message: common_pb2.Member) -> Member:
    return Member(
        message.id,
        message.epoch,
        message.address,
        message.socket,
        message.host,
        message.node,
        message.state,
        message.slow_start,
    )


def token_to_wire(token: CommitToken) -> common_pb2.CommitToken:
    return common_pb2.CommitToken(worker=token.worker, epoch=token.epoch, seq=token.seq)


def token_from_wire(message: common_pb2.CommitToken) -> CommitToken:
    return CommitToken(message.worker, message.epoch, message.seq)


def least_from_wire(value: int) -> Fidelity:
    """Unspecified means exact. BadRequest for a value that is none."""
    if value == 0:
        return Fidelity.EXACT
    try:
        return Fidelity(value)
    except ValueError:
        raise BadRequest(f"fidelity {value} is unknown: give 1 (compact), 2 (near) or 3 (exact)") from None


def digest_from_wire(name: str, value: bytes) -> bytes:
    if len(value) != KEY_BYTES:
        raise BadRequest(f"{name} has {len(value)} bytes: give {KEY_BYTES}")
    return value


def keys_from_wire(packed: bytes, keys_max: int) -> Keys:
    """BadRequest unless a whole number of keys, at most `keys_max`."""
    if len(packed) > keys_max * KEY_BYTES:
        raise BadRequest(f"{len(packed) // KEY_BYTES} keys in one call: at most {keys_max}, ask in several")
    try:
        return Keys(packed)
    except ValueError as error:
        raise BadRequest(str(error)) from None


def wanted_from_wire(messages: Sequence[worker_pb2.ShardKeys], keys_max: int) -> Wanted:
    """The blocks that a Get or Open names, in its order. BadRequest."""
    if len(messages) > SHARDS_MAX:
        raise BadRequest(f"{len(messages)} shards in one call: at most {SHARDS_MAX}, ask in several")
    groups: list[tuple[bytes, Keys]] = []
    runs: list[tuple[Shard, int]] = []
    for message in messages:
        shard, keys = shard_from_wire(message.shard), keys_from_wire(message.keys, keys_max)
        keys_max -= len(keys)
        groups.append((shard.digest, keys))
        runs.append((shard, len(keys)))
    return Wanted(groups, runs)


# --- lookups -------------------------------------------------------------------------------------------------------


def match_to_wire(match: Match, member: Callable[[str], common_pb2.Member | None]) -> common_pb2.MatchReply:
    """Runs of a lookup; those of holders that `member` does not know are left out."""
    reply = common_pb2.MatchReply(blocks=match.blocks)
    holders: dict[str, int] = {}
    shards: list[Shard] = []
    for run in match.runs:
        holder = holders.get(run.holder)
        if holder is None:
            known = member(run.holder)
            if known is None:
                continue
            holder = holders[run.holder] = len(holders)
            reply.holders.append(known)
        if not shards or run.shard is not shards[-1]:  # runs of a stored shard come one after the other
            shards.append(run.shard)
            reply.shards.append(shard_to_wire(run.shard))
        reply.runs.add(
            holder=holder,
            shard=len(shards) - 1,
            tier=int(run.tier),
            fidelity=int(run.fidelity),
            first_depth=run.first_depth,
            count=run.count,
            stored_bytes=run.stored_bytes,
        )
    return reply


def plan_from_wire(
    reply: common_pb2.MatchReply, spec: ModelSpec, keys: Sequence[bytes], shards: Iterable[Shard], least: Fidelity
) -> HitPlan:
    """Corrupt where the reply does not hold together."""
    try:
        stored = [shard_from_wire(message) for message in reply.shards]
        holders = [member_from_wire(message) for message in reply.holders]
        runs = tuple(
            PlanRun(
                holders[run.holder].id,
                stored[run.shard],
                Tier(run.tier),
                Fidelity(run.fidelity),
                run.first_depth,
                run.count,
                run.stored_bytes,
            )
            for run in reply.runs
        )
        for shard in stored:
            shard.check(spec)
    except (BadRequest, IndexError, ValueError) as error:
        raise Corrupt(f"the answer to a lookup does not hold together: {error}") from None
    if reply.blocks > len(keys) or any(run.first_depth + run.count > reply.blocks for run in runs):
        raise Corrupt("the answer to a lookup names more blocks than were asked for")
    return HitPlan(
        spec=spec,
        keys=tuple(keys[: reply.blocks]),
        shards=tuple(shards),
        least=least,
        runs=runs,
        holders={holder.id: holder for holder in holders},
        not_applied=tuple(token_from_wire(token) for token in reply.not_applied),
        complete=reply.complete,
    )
