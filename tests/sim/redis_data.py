"""What the simulated Redis keeps, and the commands on it that the Redis tier uses. RESP2's own values as replies."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable
from typing import Any

from kvstore.tiers.redis_scripts import (
    ELECT,
    ENTER,
    EVICT_MAX,
    INDEX_BYTES,
    MARK,
    PUT,
    REMOVE,
    RESIGN,
    TOUCH,
    VALUE_EXTRA_BYTES,
    Script,
)

Hash = dict[bytes, bytes]
Stream = list[tuple[tuple[int, int], list[bytes]]]

_RAW, _STORED = struct.Struct("<Q"), struct.Struct("<Q")


class Data:
    """Keys with their expiry. `now_ms` is passed in. Deterministic: everything is kept in order."""

    def __init__(self) -> None:
        self.values: dict[bytes, Any] = {}
        self.expires: dict[bytes, int] = {}
        self.scripts: dict[str, None] = {}
        self._scans: dict[int, list[bytes]] = {}
        self._scan = 0

    def snapshot(self) -> Data:
        """What a dump file keeps: everything but the scripts and scans."""
        kept = Data()
        kept.values, kept.expires = copy.deepcopy(self.values), dict(self.expires)
        return kept

    @property
    def used(self) -> int:
        """Bytes of the values, about."""
        return sum(len(value) for value in self.values.values() if isinstance(value, bytes))

    def get(self, key: bytes, now_ms: int) -> Any:
        if key in self.expires and self.expires[key] <= now_ms:
            self.unlink(key)
        return self.values.get(key)

    def set(self, key: bytes, value: bytes, expires: int | None) -> None:
        self.unlink(key)
        self.values[key] = value
        if expires is not None:
            self.expires[key] = expires

    def unlink(self, *keys: bytes) -> None:
        for key in keys:
            self.values.pop(key, None)
            self.expires.pop(key, None)

    def made(self, key: bytes, now_ms: int, kind: Callable[[], Any]) -> Any:
        """The collection at a key, an empty one where there is none."""
        found = self.get(key, now_ms)
        if found is None:
            found = self.values[key] = kind()
        return found

    def expire(self, key: bytes, ttl_ms: int, now_ms: int) -> None:
        if self.get(key, now_ms) is not None:
            self.expires[key] = now_ms + ttl_ms

    def rename(self, key: bytes, new: bytes) -> None:
        value, expires = self.values[key], self.expires.get(key)
        self.unlink(key, new)
        self.set(new, value, expires)

    def empty(self, key: bytes) -> None:
        """A collection without an element is no key."""
        if key in self.values and not self.values[key]:
            self.unlink(key)

    def scan(self, key: bytes, cursor: int, count: int, now_ms: int) -> list[Any]:
        """A page of a hash. What was there all the while comes; a cursor is good once."""
        found: Hash = self.get(key, now_ms) or {}
        names = list(found) if cursor == 0 else self._scans.pop(cursor, [])
        page, rest = names[:count], names[count:]
        following = 0
        if rest:
            self._scan += 1
            following = self._scan
            self._scans[following] = rest
        pairs = [part for name in page if name in found for part in (name, found[name])]
        return [b"%d" % following, pairs]

    def run(self, digest: str, keys: list[bytes], arguments: list[bytes], now_ms: int) -> Any:
        """KeyError for a script that nobody has loaded."""
        if digest not in self.scripts:
            raise KeyError(digest)
        return TWINS[digest](Run(self, keys, now_ms), arguments)


class Run:
    """One script's run: the helpers that the scripts of the index share."""

    def __init__(self, data: Data, keys: list[bytes], now_ms: int) -> None:
        self.data, self.keys, self.now = data, keys, now_ms

    def field(self, key: bytes, name: bytes) -> bytes | None:
        found: Hash = self.data.get(key, self.now) or {}
        return found.get(name)

    def put(self, key: bytes, **fields: bytes) -> None:
        self.data.made(key, self.now, dict).update({name.encode(): value for name, value in fields.items()})

    def add(self, key: bytes, name: bytes, by: int) -> int:
        total = int(self.field(key, name) or b"0") + by
        self.data.made(key, self.now, dict)[name] = b"%d" % total
        return total

    @property
    def meta(self) -> bytes:
        return self.keys[0]

    @property
    def index(self) -> Hash:
        found: Hash = self.data.made(self.keys[1], self.now, dict)
        return found

    @property
    def order(self) -> dict[bytes, int]:
        found: dict[bytes, int] = self.data.made(self.keys[2], self.now, dict)
        return found

    def oldest(self) -> list[bytes]:
        return sorted(self.order, key=lambda id: (self.order[id], id))

    def total(self) -> int:
        return int(self.field(self.meta, b"bytes") or b"0")

    def totals(self) -> list[int]:
        return [self.total(), len(self.index), int(self.field(self.meta, b"raw") or b"0")]

    def count(self, nbytes: int, raw: int) -> None:
        self.add(self.meta, b"bytes", nbytes)
        self.add(self.meta, b"raw", raw)

    def tell(self, operation: bytes, what: bytes) -> None:
        number = self.add(self.meta, b"changes", 1)
        stream: Stream = self.data.made(self.keys[3], self.now, list)
        last = stream[-1][0] if stream else (0, 0)
        name = (self.now, 0) if self.now > last[0] else (last[0], last[1] + 1)
        stream.append((name, [b"n", b"%d" % number, operation, what]))

    def forget(self, id: bytes, entry: bytes, prefix: bytes) -> None:
        del self.index[id]
        self.order.pop(id, None)
        self.count(-cost(entry), -raw(entry))
        self.data.unlink(prefix + id)
        self.tell(b"del", id)

    def keep(self, ttl_ms: int) -> None:
        for key in self.keys[:5]:
            self.data.expire(key, ttl_ms, self.now)

    def done(self) -> None:
        for key in self.keys[1:4]:
            self.data.empty(key)


def cost(entry: bytes) -> int:
    return int(_STORED.unpack_from(entry, 136)[0]) + VALUE_EXTRA_BYTES + INDEX_BYTES


def raw(entry: bytes) -> int:
    return int(_RAW.unpack_from(entry, 128)[0])


def fidelity(entry: bytes) -> int:
    return min(entry[120], entry[121])


def enter(run: Run, given: list[bytes]) -> Any:
    found = run.field(run.meta, b"incarnation")
    if found is None:
        found = given[0]
        run.data.unlink(*run.keys[1:5])
        for name in (b"bytes", b"raw", b"changes"):
            (run.data.get(run.meta, run.now) or {}).pop(name, None)
        run.put(run.meta, incarnation=found, format=b"1")
    run.put(run.meta, name=given[1])
    return [found, *run.totals()]


def put(run: Run, given: list[bytes]) -> Any:
    data, sent, id, entry = run.data, run.keys[5], given[1], given[2]
    capacity, ttl, prefix = int(given[3]), int(given[4]), given[6]
    if run.field(run.meta, b"incarnation") != given[0]:
        data.unlink(sent)
        return [b"enter", *run.totals()]
    if any(run.field(run.keys[4], digest) is None for digest in given[7:]):
        data.unlink(sent)
        return [b"enter", *run.totals()]
    if data.get(sent, run.now) is None:
        return [b"lost", *run.totals()]
    old = run.index.get(id)
    if old is not None and data.get(prefix + id, run.now) is not None and fidelity(old) >= fidelity(entry):
        data.unlink(sent)
        if id in run.order:
            run.order[id] = run.now
        data.expire(prefix + id, ttl, run.now)
        return [b"held", *run.totals()]
    needed = cost(entry) - (cost(old) if old is not None else 0)
    stale = [name for name in run.oldest() if run.order[name] <= run.now - ttl][:16]
    for victim in stale:
        if victim != id and victim in run.index:
            run.forget(victim, run.index[victim], prefix)
    evicted = 0
    while run.total() + needed > capacity:
        victims = [name for name in run.oldest()[:2] if name != id]
        if not victims or evicted >= EVICT_MAX:
            data.unlink(sent)
            return [b"full", *run.totals()]
        if victims[0] in run.index:
            run.forget(victims[0], run.index[victims[0]], prefix)
        else:
            run.order.pop(victims[0], None)
        evicted += 1
    data.rename(sent, prefix + id)
    data.expire(prefix + id, ttl, run.now)
    run.index[id] = entry
    run.order[id] = run.now
    run.count(needed, raw(entry) - (raw(old) if old is not None else 0))
    run.tell(b"add", entry)
    run.keep(2 * ttl)
    return [b"kept", *run.totals()]


def touch(run: Run, given: list[bytes]) -> Any:
    ttl, prefix = int(given[0]), given[1]
    for id in given[2:]:
        if id in run.order:
            run.order[id] = run.now
        run.data.expire(prefix + id, ttl, run.now)
    run.keep(2 * ttl)
    return [len(given) - 2, *run.totals()]


def remove(run: Run, given: list[bytes]) -> Any:
    removed = 0
    for id, copy_id in zip(given[2::2], given[3::2], strict=True):
        entry = run.index.get(id)
        if entry is not None and copy_id in (b"", entry[112:120]):
            run.forget(id, entry, given[1])
            removed += 1
    return [removed, *run.totals()]


def elect(run: Run, given: list[bytes]) -> Any:
    meta, lease = run.keys
    worker, lease_ms, least = given
    found = run.field(meta, b"incarnation")
    if found is None:
        return b""
    holder = run.field(lease, b"worker")
    if holder not in (None, worker):
        return None
    if holder is not None and run.field(lease, b"incarnation") == found:
        run.data.expire(lease, int(lease_ms), run.now)
        return run.field(lease, b"epoch")
    epoch = max(run.add(meta, b"epoch", 1), int(least))
    run.put(meta, epoch=b"%d" % epoch)
    run.data.unlink(lease)
    run.put(lease, worker=worker, incarnation=found, epoch=b"%d" % epoch)
    run.data.expire(lease, int(lease_ms), run.now)
    return b"%d" % epoch


def resign(run: Run, given: list[bytes]) -> Any:
    if run.field(run.keys[0], b"worker") != given[0]:
        return 0
    run.data.unlink(run.keys[0])
    return 1


def mark(run: Run, given: list[bytes]) -> Any:
    meta, changes = run.keys
    stream: Stream = run.data.get(changes, run.now) or []
    last = b"%d-%d" % stream[-1][0] if stream else b"0-0"
    return [run.field(meta, b"incarnation") or b"", int(run.field(meta, b"changes") or b"0"), last]


def _whole(twin: Callable[[Run, list[bytes]], Any]) -> Callable[[Run, list[bytes]], Any]:
    def run(state: Run, given: list[bytes]) -> Any:
        reply = twin(state, given)
        state.done()
        return reply

    return run


TWINS: dict[str, Callable[[Run, list[bytes]], Any]] = {
    Script(source).digest: _whole(twin) if whole else twin
    for source, twin, whole in (
        (ENTER, enter, True), (PUT, put, True), (TOUCH, touch, True), (REMOVE, remove, True),
        (ELECT, elect, False), (RESIGN, resign, False), (MARK, mark, False),
    )
}  # fmt: skip
"""What each script does, in Python. tests/test_sim_redis.py holds them against a real Redis."""
