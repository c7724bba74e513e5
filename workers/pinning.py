"""The calls that pin blocks for later readers: the same on the local socket and by gRPC."""

from __future__ import annotations

from collections.abc import Iterable

from kvstore.errors import BadRequest
from kvstore.transport.base import CallContext
from kvstore.types import KEY_BYTES
from kvstore.usewire import hint_from_wire, use_from_wire
from kvstore.wire import worker_pb2
from kvstore.wireform import digest_from_wire, least_from_wire, wanted_from_wire
from workers.node import Node

PINS_A_CALL = 1024

STATES = {True: worker_pb2.BLOCK_FOUND, False: worker_pb2.BLOCK_DROPPED, None: worker_pb2.BLOCK_MISSING}


class PinCalls:
    """One coroutine per call."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def pin(self, request: worker_pb2.PinRequest, context: CallContext) -> worker_pb2.PinReply:
        """Pin what is here, and what Redis has where asked for. BadRequest, Overloaded, DeadlineExceeded."""
        node, store = self._node, self._node.store
        name, root = digest_from_wire("pin", request.pin), digest_from_wire("root", request.root)
        wanted = wanted_from_wire(request.blocks, node.config.worker.keys_max)
        least = least_from_wire(request.least)
        ttl_s = min(request.ttl_ms / 1000, node.config.store.pin_max_s)
        node.asked_bytes(root, wanted)
        states = store.pins.pin(context.namespace, name, root, wanted, least, ttl_s)
        if request.redis and None in states:
            timeout_s = request.deadline_ms / 1000 if request.deadline_ms else None
            now = node.now(root, wanted)
            hold = await node.open(context.namespace, root, now, least, redis=True, timeout_s=timeout_s)
            try:
                states = store.pins.pin(context.namespace, name, root, wanted, least, ttl_s)
            finally:
                store.release(hold.id)
        reply = worker_pb2.PinReply(epoch=node.identity.epoch, ttl_ms=int(ttl_s * 1000))
        reply.states.extend(STATES[state] for state in states)
        return reply

    async def renew(self, request: worker_pb2.RenewRequest, context: CallContext) -> worker_pb2.RenewReply:
        """Which of the pins are known, each with its new life."""
        pins = self._node.store.pins
        known = [pins.renew(context.namespace, name, request.ttl_ms / 1000) for name in _names(request.pins)]
        return worker_pb2.RenewReply(known=known)

    async def unpin(self, request: worker_pb2.UnpinRequest, context: CallContext) -> worker_pb2.UnpinReply:
        """Idempotent."""
        for name in _names(request.pins):
            self._node.store.pins.unpin(context.namespace, name)
        return worker_pb2.UnpinReply()

    async def hint(self, request: worker_pb2.HintRequest, context: CallContext) -> worker_pb2.HintReply:
        """What a caller knows of a prompt's blocks, told to the eviction policy. BadRequest."""
        digest_from_wire("root", request.root)
        wanted = wanted_from_wire(request.blocks, self._node.config.worker.keys_max)
        use = use_from_wire(request.use) if request.HasField("use") else None
        here = self._node.store.advise(context.namespace, wanted, use, hint_from_wire(request))
        return worker_pb2.HintReply(blocks=here)


def _names(names: Iterable[bytes]) -> list[bytes]:
    listed = list(names)
    if len(listed) > PINS_A_CALL:
        raise BadRequest(f"{len(listed)} pins in one call: at most {PINS_A_CALL}, ask in several")
    if any(len(name) != KEY_BYTES for name in listed):
        raise BadRequest(f"a pin's name has {KEY_BYTES} bytes: send what Pin was given")
    return listed
