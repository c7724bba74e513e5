"""Pins: blocks kept where they are for somebody who will open them. They end by release, by age, or with the store.

Unlike a hold a pin belongs to no connection and passes no memory: it may be made in one process and of use in another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.errors import Overloaded
from kvstore.store.stack import Stack
from kvstore.types import Fidelity

PINS_MAX = 4096
"""Of one namespace at a time."""


@dataclass(slots=True)
class Pin:
    """One caller's pin."""

    expires: float
    rows: list[int] = field(default_factory=list)  # pinned once each
    bytes: int = 0  # raw


class Pins:
    """All pins of a store, by (namespace, name). Synchronous."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._pins: dict[tuple[str, bytes], Pin] = {}
        self._bytes: dict[str, int] = {}
        self._count: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._pins)

    def pinned_bytes(self, namespace: str) -> int:
        return self._bytes.get(namespace, 0)

    def pin(
        self,
        namespace: str,
        name: bytes,
        root: bytes,
        wanted: Sequence[tuple[bytes, bytes]],
        least: Fidelity,
        ttl_s: float,
    ) -> list[bool | None]:
        """Per (shard digest, key): True pinned, None not here, False over the namespace's bound. Replaces a pin of that
        name. Overloaded beyond PINS_MAX. Mutates."""
        self.unpin(namespace, name)
        if self._count.get(namespace, 0) >= PINS_MAX:
            raise Overloaded(f"{PINS_MAX} pins in one namespace: release some")
        residency, config = self._stack.residency, self._stack.config
        bound = min(config.pinned_bytes, config.host_bytes // 2)  # pins alone must not fill a worker
        bound = min(bound, self._stack.quota.of(namespace).pinned_bytes or bound)
        pin = Pin(self._expiry(ttl_s))
        states: list[bool | None] = []
        for shard, key in wanted:
            row = residency.find(namespace, shard, key)
            if row is None or residency.fidelity(row) < least or residency.header(row).root != root:
                states.append(None)
                continue
            size = residency.header(row).raw_length
            room = self.pinned_bytes(namespace) + pin.bytes + size <= bound
            if room:
                residency.pin(row)
                pin.rows.append(row)
                pin.bytes += size
            states.append(room)
        if pin.rows:
            self._pins[namespace, name] = pin
            self._bytes[namespace] = self.pinned_bytes(namespace) + pin.bytes
            self._count[namespace] = self._count.get(namespace, 0) + 1
            self._stack.counters["pins_made"] += 1
        return states

    def renew(self, namespace: str, name: bytes, ttl_s: float) -> bool:
        """Whether the pin was there; it lives `ttl_s` from now. Mutates."""
        pin = self._pins.get((namespace, name))
        if pin is None:
            return False
        pin.expires = self._expiry(ttl_s)
        return True

    def unpin(self, namespace: str, name: bytes) -> bool:
        """Let go; whether the pin was there. Mutates; idempotent."""
        pin = self._pins.pop((namespace, name), None)
        if pin is None:
            return False
        self._stack.counters["pins_ended"] += 1
        for row in pin.rows:
            self._stack.residency.unpin(row)
        for table, less in ((self._bytes, pin.bytes), (self._count, 1)):
            table[namespace] -= less
            if not table[namespace]:
                del table[namespace]
        return True

    def expire(self) -> int:
        """End those that are too old; how many. Mutates."""
        now = self._stack.system.clock.monotonic()
        late = [at for at, pin in self._pins.items() if pin.expires <= now]
        for namespace, name in late:
            self.unpin(namespace, name)
        return len(late)

    def end_all(self) -> None:
        for namespace, name in list(self._pins):
            self.unpin(namespace, name)

    def _expiry(self, ttl_s: float) -> float:
        return self._stack.system.clock.monotonic() + min(ttl_s, self._stack.config.pin_max_s)
