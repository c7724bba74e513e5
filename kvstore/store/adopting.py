"""Taking in a block that another worker has, as it is stored there: a put without a client."""

from __future__ import annotations

from collections.abc import Collection

from kvstore.errors import KVStoreError, Overloaded
from kvstore.header import Header, check_header
from kvstore.spec import ModelSpec, Shard, namespace_digest
from kvstore.store.movement import Movement
from kvstore.store.putting import PutOutcome, Putting
from kvstore.store.stack import Stack


class Adopting:
    """One per store. `data` was verified by whoever read it (`kvstore.client.pulling`)."""

    def __init__(self, stack: Stack, movement: Movement, putting: Putting) -> None:
        self.stack, self.movement, self.putting = stack, movement, putting

    async def adopt(
        self,
        namespace: str,
        spec: ModelSpec,
        shard: Shard,
        header: Header,
        data: memoryview,
        purges: Collection[bytes],
    ) -> PutOutcome:
        """Keep a copy: a record in host, raw bytes as a put. Never raises for a tier; `data` may be reused then.
        `purges`: what its holder had done when it gave the copy; one from before a purge is refused."""
        if not header.chunk_count:
            return await self.putting.put(namespace, spec, shard, header, data, purges)
        why = self._objection(namespace, spec, shard, header, data)
        if why:
            return self._end("refused", why=why)
        stack = self.stack
        if self.holds(namespace, header):
            return self._end("held")
        try:
            stack.catalog.learn_namespace(namespace)
            stack.catalog.learn_spec(spec)
            stack.catalog.learn_shard(shard)
        except Overloaded as error:
            return self._end("dropped", why=str(error))
        place = await self.movement.room.wait(stack.HOST, namespace, len(data), stack.config.put_wait_s)
        if place is None:
            if stack.quota.over(namespace, stack.HOST, len(data)) > 0:
                stack.quota.dropped[namespace] += 1
            return self._end("dropped", why="no room in the host tier, or within the namespace's quota of it")
        place = await stack.host.fill(namespace, header, place, [data])
        try:
            if stack.purges.fences(namespace, spec.root, spec, purges):  # now, where nothing comes in between any more
                stack.host.free(namespace, header, place)
                return self._end("refused", why="purged here since, and not where it came from")
            if self.holds(namespace, header):  # put here meanwhile
                stack.host.free(namespace, header, place)
                return self._end("held")
            row = stack.residency.find(namespace, header.shard, header.key)
            if row is not None:
                stack.counters["replaced"] += 1
                stack.remove(row)
            stack.admit(namespace, header, stack.HOST, place)
            return self._end("committed", stack.changes.outbox(namespace).head)
        finally:
            self.movement.nudge()

    def holds(self, namespace: str, header: Header) -> bool:
        """Whether a copy as good is there. Pure."""
        row = self.stack.residency.find(namespace, header.shard, header.key)
        return row is not None and self.stack.residency.fidelity(row) >= header.fidelity

    def _objection(self, namespace: str, spec: ModelSpec, shard: Shard, header: Header, data: memoryview) -> str:
        """Why these bytes can't be this block; empty when they can."""
        try:
            shard.check(spec)
            check_header(header, spec, shard)
        except KVStoreError as error:
            return str(error)
        if header.namespace != namespace_digest(namespace):
            return "the header names another namespace"
        least = self.stack.codec_rules(namespace).least
        if header.fidelity < least:
            return f"the namespace takes nothing below {least.name.lower()}"
        if len(data) != header.stored_length:
            return f"a record of {header.stored_length} bytes, not {len(data)}"
        if header.raw_length > self.stack.config.block_bytes_max:
            return f"at most {self.stack.config.block_bytes_max} bytes (block_bytes_max) are taken"
        return ""

    def _end(self, state: str, seq: int = 0, why: str = "") -> PutOutcome:
        self.stack.counters[f"adopted_{state}"] += 1
        return PutOutcome(state, seq, why)
