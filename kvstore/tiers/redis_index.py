"""A namespace's index in Redis: what is there, in which order it leaves, what changed, and who announces it.

The index is shared by all workers of the namespace and is a hint: a value proves itself when it is read.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from kvstore.catalog import Catalog
from kvstore.directory.runs import Added, Change, Removed
from kvstore.errors import BadRequest, DataError, Overloaded, TierDown
from kvstore.header import Header
from kvstore.seams import System
from kvstore.spec import ModelSpec, Shard, namespace_digest
from kvstore.tiers.redis_link import Command, ReplyError
from kvstore.tiers.redis_scripts import ELECT, ENTER, MARK, REMOVE, RESIGN, Script
from kvstore.types import KEY_BYTES, Tier

PAGE = 512
"""Entries asked for in one step of a scan."""

CHANGES_MAX = 4096
"""Changes taken in one call."""

STREAM_MAX = 65_536
"""Changes that Redis keeps; who is further behind takes a snapshot."""

Call = Callable[..., Awaitable[list[Any]]]


@dataclass
class Space:
    """One namespace as this process sees it."""

    name: str
    digest: bytes
    incarnation: bytes = b""  # of the index; empty: not entered, or found gone
    described: dict[bytes, None] = field(default_factory=dict)  # digests whose word this index has
    used: int = 0
    blocks: int = 0
    raw_bytes: int = 0
    mark: tuple[bytes, int, bytes] | None = None  # incarnation, number and stream id up to which changes were taken

    @classmethod
    def of(cls, namespace: str) -> Space:
        return cls(namespace, namespace_digest(namespace))

    def key(self, name: str) -> bytes:
        """A key of this namespace; the braces keep them all in one slot."""
        return b"kv:{%s}:%s" % (self.digest.hex().encode(), name.encode())

    @cached_property
    def values(self) -> bytes:
        """What a value's key is, before the id."""
        return self.key("b:")

    @cached_property
    def keys(self) -> list[bytes]:
        """What every script of the index takes."""
        return [self.key(name) for name in ("meta", "index", "order", "changes", "words")]

    def count(self, totals: Sequence[int]) -> None:
        """Take over what a script said at the end of its reply."""
        self.used, self.blocks, self.raw_bytes = totals


class RedisIndex:
    """Commands on the index. Raises TierDown where Redis is out of reach or refuses."""

    def __init__(self, system: System, catalog: Catalog, call: Call) -> None:
        self.system = system
        self.catalog = catalog
        self.spaces: dict[str, Space] = {}
        self.strange = 0  # entries that do not hold or are not described: skipped
        self._call = call

    def space(self, namespace: str) -> Space:
        found = self.spaces.get(namespace)
        if found is None:
            found = self.spaces[namespace] = Space.of(namespace)
        return found

    async def run(
        self, source: str, keys: Sequence[bytes], arguments: Sequence[Any], before: Sequence[Command] = ()
    ) -> Any:
        """One script's reply, in one round trip with the commands `before` it. TierDown where Redis refuses any."""
        script = Script(source)
        command = [script.digest, len(keys), *keys, *arguments]
        replies = await self._call(*before, ["EVALSHA", *command])
        if isinstance(replies[-1], ReplyError) and replies[-1].code == "NOSCRIPT":
            replies[-1:] = (await self._call(["SCRIPT", "LOAD", source], ["EVALSHA", *command]))[1:]
        for reply in replies:
            if isinstance(reply, ReplyError):
                raise TierDown(f"Redis refuses: {reply}") from reply
        return replies[-1]

    async def enter(self, space: Space) -> None:
        """Know the index's incarnation; begins one where there is none."""
        reply = await self.run(ENTER, space.keys, [self._draw(), space.name])
        if reply[0] != space.incarnation:
            space.described.clear()
        space.incarnation = reply[0]
        space.count(reply[1:])

    def _draw(self) -> str:
        return self.system.token_hex(16)

    # What is there

    async def find(self, space: Space, wanted: Sequence[tuple[bytes, bytes]]) -> list[Header | None]:
        """The entries of (shard, key) pairs, None where there is none. A hint: only the value proves itself."""
        if not wanted:
            return []
        ids = [shard + key for shard, key in wanted]
        (entries,) = await self._call(["HMGET", space.key("index"), *ids])
        if isinstance(entries, ReplyError):
            raise TierDown(f"Redis refuses: {entries}")
        headers = [self._header(space, id, entry) for id, entry in zip(ids, entries, strict=True)]
        await self._learn_for(space, [header for header in headers if header is not None])
        return [header if header is None or self._described(header) else None for header in headers]

    def _header(self, space: Space, id: bytes | None, entry: bytes | None) -> Header | None:
        """An entry that holds and is this namespace's (and this id's, where one is given)."""
        if entry is None:
            return None
        try:
            header = Header.unpack(entry)
        except DataError:
            self.strange += 1
            return None
        if header.namespace != space.digest or (id is not None and header.shard + header.key != id):
            self.strange += 1
            return None
        return header

    def _described(self, header: Header) -> bool:
        return self.catalog.spec(header.root) is not None and self.catalog.shard(header.shard) is not None

    async def remove(self, space: Space, blocks: Sequence[tuple[bytes, bytes]]) -> int:
        """Remove (id, copy_id as in the header, or empty for whatever copy); how many were there."""
        arguments = [part for block in blocks for part in block]
        removed, *totals = await self.run(REMOVE, space.keys, [STREAM_MAX, space.values, *arguments])
        space.count(totals)
        return int(removed)

    async def purge(self, space: Space, root: bytes | None) -> int:
        """Remove everything, or everything of one model; how many blocks. Page by page."""
        removed = 0
        async for headers in self._pages(space):
            ids = [header.shard + header.key for header in headers if root is None or header.root == root]
            if ids:
                removed += await self.remove(space, [(id, b"") for id in ids])
        return removed

    async def _pages(self, space: Space) -> AsyncIterator[list[Header]]:
        """All entries, a bounded number at a time; some may come twice."""
        cursor: bytes | int = 0
        while True:
            (reply,) = await self._call(["HSCAN", space.key("index"), cursor, "COUNT", PAGE])
            if isinstance(reply, ReplyError):
                raise TierDown(f"Redis refuses: {reply}")
            cursor, pairs = reply
            found = [self._header(space, pairs[i], pairs[i + 1]) for i in range(0, len(pairs), 2)]
            yield [header for header in found if header is not None]
            if int(cursor) == 0:
                return

    # The dictionary

    def words(self, space: Space, header: Header) -> list[str | bytes]:
        """Fields and values that the dictionary needs before this header is used; empty when it has them."""
        fields: list[str | bytes] = []
        spec, shard = self.catalog.spec(header.root), self.catalog.shard(header.shard)
        if spec is not None and spec.root not in space.described:
            fields += [spec.root, json.dumps(["spec", spec.canonical_json()], ensure_ascii=False)]
        if shard is not None and shard.digest not in space.described:
            rectangle = [shard.group, shard.layer_first, shard.layer_count, shard.head_first, shard.head_count]
            fields += [shard.digest, json.dumps(["shard", rectangle])]
        return fields

    def described(self, header: Header) -> list[bytes]:
        """The digests of a block that Redis must have words of, once `words` were sent. Pure."""
        known = self.catalog.spec(header.root), self.catalog.shard(header.shard)
        return [digest for digest, what in zip((header.root, header.shard), known, strict=True) if what is not None]

    async def _learn_for(self, space: Space, headers: Sequence[Header]) -> None:
        """Read the words of digests that nobody here knows. A word proves itself: its digest is its name."""
        unknown: dict[bytes, None] = {}
        for header in headers:
            if self.catalog.spec(header.root) is None:
                unknown[header.root] = None
            if self.catalog.shard(header.shard) is None:
                unknown[header.shard] = None
        digests = list(unknown)
        for start in range(0, len(digests), PAGE):
            some = digests[start : start + PAGE]
            (found,) = await self._call(["HMGET", space.key("words"), *some])
            if isinstance(found, ReplyError):
                raise TierDown(f"Redis refuses: {found}")
            for digest, word in zip(some, found, strict=True):
                if word is None or not self._learn(digest, word):
                    self.strange += 1

    def _learn(self, digest: bytes, word: bytes) -> bool:
        try:
            kind, value = json.loads(word)
            if kind == "spec":
                spec = ModelSpec.from_json(value)
                return spec.root == digest and bool(self.catalog.learn_spec(spec))
            shard = Shard(*value)
            return kind == "shard" and shard.digest == digest and bool(self.catalog.learn_shard(shard))
        except (ValueError, TypeError, BadRequest, Overloaded):
            return False

    # Announcing it

    async def elect(self, space: Space, worker: str, lease_s: float, above: int = 0) -> int | None:
        """The epoch under which `worker` announces this index for `lease_s`, None while another one does.

        Renewed by the same worker it stays; it is drawn anew, greater than any before, when the lease had ended or the
        index is another incarnation. An index that was lost or set back no longer knows those before: then the clock is
        higher, or `above`, what coordinators told of, where an elected one's clock was ahead.
        """
        least, lease_ms = str(max(self.system.clock.wall_ns(), above + 1)), int(lease_s * 1000)
        for _ in range(3):
            reply = await self.run(ELECT, [space.key("meta"), space.key("lease")], [worker, lease_ms, least])
            if reply != b"":
                return None if reply is None else int(reply)
            await self.enter(space)
        raise TierDown("Redis loses the index again and again: it is emptied, or evicts")

    async def resign(self, space: Space, worker: str) -> None:
        """End the lease, if it is this worker's."""
        await self.run(RESIGN, [space.key("lease")], [worker])

    async def snapshot(self, space: Space) -> list[Added]:
        """What the index holds; `changes` goes on from here."""
        await self.enter(space)  # an index without an incarnation could not be followed
        incarnation, number, last = await self.run(MARK, [space.key("meta"), space.key("changes")], [])
        found: dict[bytes, Added] = {}
        async for headers in self._pages(space):
            await self._learn_for(space, headers)
            for header in headers:
                if self._described(header):
                    found[header.shard + header.key] = added(header)
        space.mark = (incarnation, number, last)
        return list(found.values())

    async def changes(self, space: Space) -> list[Change] | None:
        """What changed since the snapshot or the last call, at most CHANGES_MAX; None when that is not known any more
        (no snapshot yet, too far behind, another incarnation, an older dump): take a snapshot."""
        if space.mark is None:
            return None
        incarnation, number, last = space.mark
        keys = [space.key("meta"), space.key("changes")]
        now = await self.run(MARK, keys, [])  # before the stream is read: what it counts is in the stream
        if now[1] < number:  # the index went back in time: Redis came up again with an older dump
            space.mark = None
            return None
        (reply,) = await self._call(["XREAD", "COUNT", CHANGES_MAX, "STREAMS", keys[1], last])
        if isinstance(reply, ReplyError):
            raise TierDown(f"Redis refuses: {reply}")
        entries = reply[0][1] if reply else []
        changes: list[Change] = []
        headers: list[Header] = []
        for position, entry in entries:
            if int(entry[1]) != number + 1:
                space.mark = None
                return None
            number, last = number + 1, position
            change = self._change(space, entry[2], entry[3], headers)
            if change is not None:
                changes.append(change)
        if now[0] != incarnation or (len(entries) < CHANGES_MAX and now[1] > number):
            space.mark = None
            return None
        await self._learn_for(space, headers)
        space.mark = (incarnation, number, last)
        return [c for c in changes if isinstance(c, Removed) or self.catalog.spec(c.root) is not None]

    def _change(self, space: Space, operation: bytes, what: bytes, headers: list[Header]) -> Change | None:
        if operation == b"del" and len(what) == 2 * KEY_BYTES:
            return Removed(what[:KEY_BYTES], what[KEY_BYTES:])
        header = self._header(space, None, what)
        if header is None:
            return None
        headers.append(header)
        return added(header)


def added(header: Header) -> Added:
    """An index entry as it is announced."""
    return Added(
        header.root,
        header.shard,
        header.key,
        header.parent,
        header.group,
        header.depth,
        Tier.REDIS,
        header.fidelity,
        header.stored_length,
    )
