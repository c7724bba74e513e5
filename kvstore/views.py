"""What a caller may see of a status: nothing of one namespace shows in another."""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.transport.base import CallContext
from kvstore.wire import common_pb2


def visible_status(status: common_pb2.WorkerStatus, context: CallContext) -> common_pb2.WorkerStatus:
    """A copy: whole for role node; for a client the states of the tiers and its own namespace. Pure."""
    seen = common_pb2.WorkerStatus()
    seen.CopyFrom(status)
    if context.role == "node":
        return seen
    del seen.namespaces[:]
    seen.namespaces.extend(entry for entry in status.namespaces if entry.namespace == context.namespace)
    del seen.tiers[:]
    seen.tiers.extend(
        common_pb2.TierStatus(tier=tier.tier, state=tier.state, capacity=tier.capacity) for tier in status.tiers
    )
    for name in ("counters", "latencies", "lag", "saved_tokens", "coordinators"):
        seen.ClearField(name)
    return seen


def sums(workers: Iterable[common_pb2.WorkerStatus]) -> list[common_pb2.NamespaceStatus]:
    """Each namespace that these (cut already) statuses name, over all of them; quotas are summed too. Pure."""
    found: dict[str, common_pb2.NamespaceStatus] = {}
    for worker in workers:
        for entry in worker.namespaces:
            total = found.setdefault(entry.namespace, common_pb2.NamespaceStatus(namespace=entry.namespace))
            for name in ("blocks", "pinned_bytes", "staging_bytes", "puts_over_quota", "blocks_over_quota"):
                setattr(total, name, getattr(total, name) + getattr(entry, name))
            for use in entry.tiers:
                known = next((known for known in total.tiers if known.tier == use.tier), None)
                if known is None:
                    known = total.tiers.add(tier=use.tier)
                known.used += use.used
                known.quota += use.quota
    return list(found.values())
