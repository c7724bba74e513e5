"""Announcements as messages and back: runs, deltas, snapshot parts, dictionary entries. BadRequest for malformed ones.

Lookups, members and shards have their forms in `kvstore.wireform`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from kvstore.directory.announce import Delta, SnapshotChunk
from kvstore.directory.runs import RemovedRun, Run, RunChange
from kvstore.errors import BadRequest
from kvstore.spec import ModelSpec, Shard
from kvstore.types import KEY_BYTES, Fidelity, Keys, Tier, pack_keys
from kvstore.wire import common_pb2, coordinator_pb2
from kvstore.wireform import digest_from_wire, shard_from_wire, shard_to_wire

_TIERS = {int(tier): tier for tier in Tier}  # a tenth of what the enum's own lookup costs, for each run
_FIDELITIES = {int(fidelity): fidelity for fidelity in Fidelity}


def tier_from_wire(value: int) -> Tier:
    """BadRequest for a value that is none."""
    found = _TIERS.get(value)
    if found is None:
        raise BadRequest(f"tier {value} is unknown: give 1 (hot), 2 (host), 3 (ssd) or 4 (redis)")
    return found


def fidelity_from_wire(value: int) -> Fidelity:
    """What a block has: unlike in a request, unspecified is BadRequest."""
    found = _FIDELITIES.get(value)
    if found is None:
        raise BadRequest(f"fidelity {value} is unknown: give 1 (compact), 2 (near) or 3 (exact)")
    return found


def run_to_wire(run: Run) -> common_pb2.Run:
    return common_pb2.Run(
        root=run.root,
        shard=run.shard,
        tier=int(run.tier),  # type: ignore[arg-type]
        fidelity=int(run.fidelity),  # type: ignore[arg-type]
        parent=run.parent,
        first_depth=run.first_depth,
        keys=pack_keys(run.keys),
        group=run.group,
        stored_bytes=run.stored_bytes,
    )


def run_from_wire(message: common_pb2.Run) -> Run:
    root, shard, parent, group = message.root, message.shard, message.parent, message.group
    if not len(root) == len(shard) == len(parent) == len(group) == KEY_BYTES:
        for name in ("root", "shard", "parent", "group"):
            digest_from_wire(name, getattr(message, name))
    return Run(
        root,
        shard,
        tier_from_wire(message.tier),
        fidelity_from_wire(message.fidelity),
        parent,
        message.first_depth,
        _keys(message.keys),
        group,
        message.stored_bytes,
    )


def change_to_wire(change: RunChange) -> coordinator_pb2.Change:
    if isinstance(change, Run):
        return coordinator_pb2.Change(added=run_to_wire(change))
    return coordinator_pb2.Change(removed=common_pb2.RemovedRun(shard=change.shard, keys=pack_keys(change.keys)))


def change_from_wire(message: coordinator_pb2.Change) -> RunChange:
    kind = message.WhichOneof("change")
    if kind == "added":
        return run_from_wire(message.added)
    if kind == "removed":
        return RemovedRun(digest_from_wire("shard", message.removed.shard), _keys(message.removed.keys))
    raise BadRequest("a change that neither adds nor removes: give one of them")


def delta_to_wire(
    namespace: str, delta: Delta, dictionary: Iterable[common_pb2.DictionaryEntry] = ()
) -> coordinator_pb2.Delta:
    return coordinator_pb2.Delta(
        namespace=namespace,
        first_seq=delta.first_seq,
        last_seq=delta.last_seq,
        dictionary=dictionary,
        changes=map(change_to_wire, delta.changes),
    )


def delta_from_wire(message: coordinator_pb2.Delta) -> Delta:
    return Delta(message.first_seq, message.last_seq, tuple(map(change_from_wire, message.changes)))


def chunk_to_wire(
    namespace: str, chunk: SnapshotChunk, dictionary: Iterable[common_pb2.DictionaryEntry] = ()
) -> coordinator_pb2.SnapshotChunk:
    return coordinator_pb2.SnapshotChunk(
        namespace=namespace,
        resume_seq=chunk.resume_seq,
        first=chunk.index == 0,
        last=chunk.last,
        dictionary=dictionary,
        runs=map(run_to_wire, chunk.runs),
        snapshot=chunk.snapshot,
        index=chunk.index,
    )


def chunk_from_wire(message: coordinator_pb2.SnapshotChunk) -> SnapshotChunk:
    runs = tuple(map(run_from_wire, message.runs))
    return SnapshotChunk(message.snapshot, message.index, message.last, message.resume_seq, runs)


def spec_to_wire(spec: ModelSpec) -> common_pb2.DictionaryEntry:
    return common_pb2.DictionaryEntry(spec_json=spec.canonical_json())


def entry_from_wire(message: common_pb2.DictionaryEntry) -> ModelSpec | Shard:
    kind = message.WhichOneof("entry")
    if kind == "spec_json":
        return ModelSpec.from_json(message.spec_json)
    if kind == "shard":
        return shard_from_wire(message.shard)
    raise BadRequest("a dictionary entry that is neither a spec nor a shard: give one of them")


class Names(Protocol):
    """What digests stand for: a catalog, or a directory."""

    def spec(self, root: bytes, /) -> ModelSpec | None: ...

    def shard(self, digest: bytes, /) -> Shard | None: ...


class Introduced:
    """What one stream's dictionary has said already. A new stream needs a new one."""

    def __init__(self, catalog: Names) -> None:
        self._catalog = catalog
        self._said: dict[bytes, None] = {}

    def entries(self, changes: Sequence[RunChange]) -> list[common_pb2.DictionaryEntry]:
        """Entries that must go with these changes. Digests the catalog does not know are left out. Mutates."""
        entries = []
        for change in changes:
            if isinstance(change, RemovedRun):
                continue
            if change.root not in self._said and (spec := self._catalog.spec(change.root)) is not None:
                self._said[change.root] = None
                entries.append(spec_to_wire(spec))
            if change.shard not in self._said and (shard := self._catalog.shard(change.shard)) is not None:
                self._said[change.shard] = None
                entries.append(common_pb2.DictionaryEntry(shard=shard_to_wire(shard)))
        return entries


def _keys(packed: bytes) -> Keys:
    if len(packed) % KEY_BYTES or not packed:
        raise BadRequest(f"a run of {len(packed)} bytes of keys: give one or more keys of {KEY_BYTES} bytes")
    return Keys(packed)
