"""Asking the running service about itself: what coordinators and workers say, and the object `status` prints."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import Message

from kvstore.errors import Incompatible, KVStoreError
from kvstore.transport.base import Credentials, Method, Transport
from kvstore.transport.methods import CAPABILITIES, COORDINATOR, PROTOCOL_VERSION, WORKER
from kvstore.types import Tier
from kvstore.views import sums
from kvstore.wire import common_pb2, coordinator_pb2, worker_pb2


@dataclass(frozen=True, slots=True)
class Observer:
    """One question at a time to any address; each on a connection of its own, within `timeout_s`."""

    transport: Transport
    credentials: Credentials
    timeout_s: float = 2.0

    async def ask(self, address: str, method: Method, request: Message, timeout_s: float | None = None) -> Any:
        """The reply. Raises what the transport raises, a KVStoreError."""
        channel = await self.transport.connect(address, self.credentials)
        try:
            return await channel.unary(method, request, timeout_s=timeout_s or self.timeout_s)
        finally:
            await channel.close()

    async def coordinator_hello(self, address: str) -> common_pb2.HelloReply:
        reply: common_pb2.HelloReply = await self.ask(address, COORDINATOR["Hello"], hello())
        return reply

    async def worker_hello(self, address: str) -> common_pb2.HelloReply:
        reply: common_pb2.HelloReply = await self.ask(address, WORKER["Hello"], hello())
        return reply

    async def coordinator_status(self, address: str) -> coordinator_pb2.CoordinatorStatus:
        request = common_pb2.StatusRequest()
        reply: coordinator_pb2.CoordinatorStatus = await self.ask(address, COORDINATOR["Status"], request)
        return reply

    async def worker_status(self, address: str) -> common_pb2.WorkerStatus:
        reply: common_pb2.WorkerStatus = await self.ask(address, WORKER["Status"], common_pb2.StatusRequest())
        return reply

    async def members(self, address: str) -> coordinator_pb2.MembersReply:
        request = coordinator_pb2.MembersRequest()
        reply: coordinator_pb2.MembersReply = await self.ask(address, COORDINATOR["Members"], request)
        return reply

    async def probe(self, address: str, timeout_s: float) -> worker_pb2.ProbeReply:
        """Writes and reads through every tier of one worker."""
        reply: worker_pb2.ProbeReply = await self.ask(address, WORKER["Probe"], worker_pb2.ProbeRequest(), timeout_s)
        return reply

    async def inspect(self, address: str, key: bytes, redis: bool, timeout_s: float) -> worker_pb2.InspectReply:
        """Every copy of a block that one worker reaches."""
        request = worker_pb2.InspectRequest(key=key, redis=redis)
        reply: worker_pb2.InspectReply = await self.ask(address, WORKER["Inspect"], request, timeout_s)
        return reply

    async def purge(self, address: str, what: worker_pb2.PurgeRequest, timeout_s: float) -> int:
        """Blocks dropped by one worker. Incompatible where it does not know models by name."""
        if what.model and "purge.model.v1" not in (await self.worker_hello(address)).capabilities:
            raise Incompatible("the worker is older than purge by model: update it, or purge by --root")
        reply: worker_pb2.PurgeReply = await self.ask(address, WORKER["Purge"], what, timeout_s)
        return reply.blocks

    async def drain(self, address: str, timeout_s: float) -> worker_pb2.DrainReply:
        """Begin a drain that takes at most `timeout_s`, 0: as configured; or how far it is."""
        request = worker_pb2.DrainRequest(timeout_ms=int(timeout_s * 1000))
        reply: worker_pb2.DrainReply = await self.ask(address, WORKER["Drain"], request)
        return reply


def hello() -> common_pb2.HelloRequest:
    """The greeting of a tool."""
    return common_pb2.HelloRequest(protocol=PROTOCOL_VERSION, capabilities=CAPABILITIES, software="kvstore-cli")


@dataclass(slots=True)
class View:
    """What the coordinators said, each or its error."""

    statuses: dict[str, coordinator_pb2.CoordinatorStatus] = field(default_factory=dict)
    errors: dict[str, KVStoreError] = field(default_factory=dict)

    def workers(self) -> dict[str, common_pb2.WorkerStatus]:
        """Worker id -> its last report, from the coordinator that knows its highest epoch. Redis is no worker."""
        found: dict[str, common_pb2.WorkerStatus] = {}
        for status in self.statuses.values():
            for worker in status.workers:
                known = found.get(worker.member.id)
                if known is None or _rank(worker) > _rank(known):
                    found[worker.member.id] = worker
        return {id: found[id] for id in sorted(found) if not id.startswith("redis:")}


def _rank(worker: common_pb2.WorkerStatus) -> tuple[int, bool, bool]:
    return worker.member.epoch, worker.member.state == "alive", len(worker.tiers) > 0


async def look(observer: Observer, coordinators: Sequence[str]) -> View:
    """Ask every coordinator at once. Never raises a KVStoreError."""

    async def one(address: str) -> coordinator_pb2.CoordinatorStatus | KVStoreError:
        try:
            return await observer.coordinator_status(address)
        except KVStoreError as error:
            return error

    view = View()
    answers = await asyncio.gather(*(one(address) for address in coordinators))
    for address, answer in zip(coordinators, answers, strict=True):
        if isinstance(answer, KVStoreError):
            view.errors[address] = answer
        else:
            view.statuses[address] = answer
    return view


def status_object(view: View, coordinators: Sequence[str]) -> dict[str, Any]:
    """The object of `kvstore status --json`. `ratio` is raw over stored bytes, null for an empty tier. Pure."""
    return {
        "coordinators": [_coordinator(address, view) for address in coordinators],
        "workers": [_worker(worker) for worker in view.workers().values()],
        "namespaces": [_namespace(entry) for entry in sums(view.workers().values())],
    }


def _namespace(entry: common_pb2.NamespaceStatus) -> dict[str, Any]:
    """One namespace over all workers; `quota` null where it has none."""
    return {
        "namespace": entry.namespace,
        "blocks": entry.blocks,
        "tiers": {Tier(use.tier).name.lower(): {"used": use.used, "quota": use.quota or None} for use in entry.tiers},
        "pinned": entry.pinned_bytes,
        "staging": entry.staging_bytes,
        "puts_over_quota": entry.puts_over_quota,
        "blocks_over_quota": entry.blocks_over_quota,
    }


def _coordinator(address: str, view: View) -> dict[str, Any]:
    status = view.statuses.get(address)
    if status is None:
        return {"address": address, "id": None, "state": "unreachable", "detail": str(view.errors[address])}
    return {
        "address": address,
        "id": status.self.id,
        "boot_id": status.self.boot_id,
        "state": "complete" if status.complete else "filling",
        "blocks": status.directory_blocks,
        "pid": status.pid,
    }


def _worker(worker: common_pb2.WorkerStatus) -> dict[str, Any]:
    member = worker.member
    return {
        "id": member.id,
        "epoch": member.epoch,
        "node": member.node,
        "state": member.state,
        "tiers": {Tier(tier.tier).name.lower(): tier_object(tier) for tier in worker.tiers},
    }


def tier_object(tier: common_pb2.TierStatus) -> dict[str, Any]:
    """One tier of one worker as JSON. Pure."""
    return {
        "used": tier.used,
        "capacity": tier.capacity,
        "blocks": tier.blocks,
        "ratio": round(tier.raw_bytes / tier.used, 3) if tier.used else None,
        "state": tier.state,
        "detail": tier.detail,
        "codecs": {use.codec: codec_object(use) for use in tier.codecs},
    }


def codec_object(use: common_pb2.CodecUse) -> dict[str, Any]:
    """What one codec made of a tier's chunks since the start. Pure."""
    return {
        "chunks": use.chunks,
        "raw_bytes": use.raw_bytes,
        "ratio": round(use.raw_bytes / use.stored_bytes, 3) if use.stored_bytes else None,
        "encode_s": round(use.encode_s, 3),
        "decode_s": round(use.decode_s, 3),
    }
