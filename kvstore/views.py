"""What a caller may see of a status: nothing of one namespace shows in another."""

from __future__ import annotations

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
    seen.counters.clear()
    return seen
