"""What lies in the SSD folder of a worker: segments, models, blocks, and whether every record verifies. Read only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvstore.disk import FolderDisk
from kvstore.errors import DataError, UsageError
from kvstore.format import Record
from kvstore.seams import Disk
from kvstore.tiers.found import Found
from kvstore.tiers.recovery import FoundLog, scan_log
from kvstore.tiers.segment import data_name

DAMAGED_MAX = 20
"""Damaged records told one by one."""


def inspect_folder(folder: str, key: str = "") -> dict[str, Any]:
    """Everything about the log in `folder`; with `key` (hexadecimal, or its beginning) also those blocks in full.

    Blocking. UsageError for a folder without a log. While a worker writes there, its newest records may look damaged.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"{folder} is no folder: give the SSD folder of a worker")
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
    header = found.header
    fields = ("key", "parent", "root", "group", "shard")
    table: list[dict[str, int]] = []
    if record is not None:
        assert record.table.dtype.names is not None
        table = [dict(zip(record.table.dtype.names, row, strict=True)) for row in record.table.tolist()]
    return {
        **{name: getattr(header, name).hex() for name in fields},
        "namespace": found.namespace,
        "depth": header.depth,
        "tokens": header.tokens,
        "copy_id": f"{header.copy_id:016x}",
        "computed_on": header.computed_on.name.lower(),
        "stored": header.stored.name.lower(),
        "raw_bytes": header.raw_length,
        "stored_bytes": header.stored_length,
        "segment": found.segment,
        "offset": found.offset,
        "ok": not error,
        "why": error,
        "chunks": [{name: value for name, value in row.items() if name != "reserved"} for row in table],
    }
