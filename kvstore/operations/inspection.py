"""What `kvstore inspect` shows: a worker's SSD folder, or the copies of a block that running workers have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.errors import Corrupt, DataError, UsageError
from kvstore.format import ENTRY_BYTES, ENTRY_DTYPE, Record
from kvstore.header import Header
from kvstore.machine.disk import FolderDisk
from kvstore.seams import Disk
from kvstore.tiers.found import Found
from kvstore.tiers.recovery import FoundLog, scan_log
from kvstore.tiers.segment import data_name
from kvstore.types import Tier
from kvstore.wire import worker_pb2
from kvstore.wireform import shard_from_wire

DAMAGED_MAX = 20
"""Damaged records told one by one."""


def inspect_folder(folder: str, key: str = "") -> dict[str, Any]:
    """Everything about the log in `folder`; with `key` (hexadecimal, or its beginning) also those blocks in full.

    Blocking. UsageError for a folder without a log. While a worker writes there, its newest records may look damaged.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"{folder} is no folder: give a worker's SSD folder, or a block's key, 32 hexadecimal digits")
    disk = FolderDisk(folder)
    log = scan_log(disk, clean=False)
    if not log.last_id:
        raise UsageError(f"{folder} holds no segment log: give the SSD folder of a worker")
    damaged, blocks = [], []
    models: Counter[str] = Counter()
    namespaces: Counter[str] = Counter()
    names = {spec.root: spec.model for segment in log.segments for spec in segment.specs}
    for found, record, error in _records(disk, log):
        models[names[found.header.root]] += 1
        namespaces[found.namespace] += 1
        if error:
            damaged.append({"segment": found.segment, "offset": found.offset, "why": error})
        if key and found.header.key.hex().startswith(key.lower()):
            blocks.append(_block(found, record, error))
    return _summary(folder, log) | {
        "models": dict(models),
        "namespaces": dict(namespaces),
        "damaged": len(damaged),
        "damage": damaged[:DAMAGED_MAX],
        **({"blocks": blocks} if key else {}),
    }


def _summary(folder: str, log: FoundLog) -> dict[str, Any]:
    records = [found for segment in log.segments for found in segment.records]
    return {
        "folder": folder,
        "segments": len(log.segments),
        "records": len(records),
        "stored_bytes": sum(found.nbytes for found in records),
        "raw_bytes": sum(found.header.raw_length for found in records),
        "skipped": {name: count for name, count in log.counters.items() if count},
    }


def _records(disk: Disk, log: FoundLog) -> Iterator[tuple[Found, Record | None, str]]:
    """Each record, read and verified: with what is wrong, or nothing."""
    for segment in log.segments:
        if not segment.records:
            continue
        file = disk.open(data_name(segment.records[0].segment))
        try:
            for found in segment.records:
                buffer = bytearray(found.nbytes)
                record = None
                try:
                    file.pread_into(found.offset, memoryview(buffer))
                    record = Record.parse(buffer)
                    record.verify()
                    same = record.header == found.header
                    yield found, record, "" if same else "another block's record lies there"
                except DataError as error:
                    yield found, record, str(error)
        finally:
            file.close()


def _block(found: Found, record: Record | None, error: str) -> dict[str, Any]:
    return {
        **_header(found.header),
        "namespace": found.namespace,
        "segment": found.segment,
        "offset": found.offset,
        "ok": not error,
        "why": error,
        "chunks": _chunks(b"" if record is None else record.table.tobytes()),
    }


def _header(header: Header) -> dict[str, Any]:
    fields = ("key", "parent", "root", "group", "shard")
    return {
        **{name: getattr(header, name).hex() for name in fields},
        "depth": header.depth,
        "tokens": header.tokens,
        "copy_id": f"{header.copy_id:016x}",
        "computed_on": header.computed_on.name.lower(),
        "stored": header.stored.name.lower(),
        "raw_bytes": header.raw_length,
        "stored_bytes": header.stored_length,
    }


def _chunks(table: bytes) -> list[dict[str, int]]:
    rows = np.frombuffer(table, ENTRY_DTYPE)
    names = [name for name in ENTRY_DTYPE.names or () if name != "reserved"]
    return [dict(zip(names, row, strict=True)) for row in rows[names].tolist()]


def copies_of(worker: str, reply: worker_pb2.InspectReply) -> list[dict[str, Any]]:
    """What a worker said of one block, a line per copy. Corrupt where its headers or tables are none."""
    found = []
    for block in reply.blocks:
        shard = shard_from_wire(block.shard)
        for copy in block.copies:
            if len(copy.table) % ENTRY_BYTES:
                raise Corrupt(f"worker {worker} sent a chunk table of {len(copy.table)} bytes")
            found.append(
                {
                    "worker": worker,
                    "tier": Tier(copy.tier).name.lower(),
                    **_header(Header.unpack(copy.header)),
                    "layers": [shard.layer_first, shard.layer_count],
                    "heads": [shard.head_first, shard.head_count],
                    "segment": copy.segment,
                    "offset": copy.offset,
                    "bytes": copy.length,
                    "raw": copy.raw,
                    "pins": block.pins,
                    "secondary": block.secondary,
                    "moving": block.moving,
                    "ok": not copy.error,
                    "why": copy.error,
                    "chunks": _chunks(copy.table),
                }
            )
    return found
