"""Records that an index names, many in columns: one segment's, and all that a start kept. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from kvstore.header import HEADER_BYTES, Header
from kvstore.header_columns import Columns, Mask
from kvstore.tiers.base import Recovered
from kvstore.tiers.segment_index import ENTRIES
from kvstore.types import Location


@dataclass(frozen=True, slots=True)
class Found:
    """A record that an index names; its data is verified when it is read."""

    segment: int
    offset: int
    nbytes: int
    header: Header
    namespace: str


class FoundRecords(Sequence[Found]):
    """Of one segment, in the order they were indexed; `entries` is (n,) of ENTRIES, `names` by namespace digest."""

    def __init__(self, segment: int, entries: Columns, names: Mapping[bytes, str]) -> None:
        self.segment, self.entries, self.names = segment, entries, names

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, at: int) -> Found: ...
    @overload
    def __getitem__(self, at: slice) -> FoundRecords: ...
    def __getitem__(self, at: int | slice) -> Found | FoundRecords:
        if isinstance(at, slice):
            return FoundRecords(self.segment, self.entries[at], self.names)
        entry = self.entries[at]
        header = Header.unpack(entry.tobytes()[:HEADER_BYTES], checked=True)
        namespace = self.names[header.namespace]
        return Found(self.segment, int(entry["offset"]), int(entry["nbytes"]), header, namespace)

    def __iter__(self) -> Iterator[Found]:
        return map(self.__getitem__, range(len(self)))

    def only(self, mask: Mask) -> FoundRecords:
        return FoundRecords(self.segment, self.entries[mask], self.names)


class RecoveredRecords(Sequence[Recovered]):
    """What a log kept, over all segments: (n,) of ENTRIES with the segment of each."""

    def __init__(self, found: Sequence[FoundRecords]) -> None:
        self.names = {digest: name for records in found for digest, name in records.names.items()}
        self.entries: Columns = np.frombuffer(b"".join(records.entries.tobytes() for records in found), ENTRIES)
        self.segments = np.repeat([records.segment for records in found], [len(records) for records in found])

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, at: int) -> Recovered: ...
    @overload
    def __getitem__(self, at: slice) -> list[Recovered]: ...
    def __getitem__(self, at: int | slice) -> Recovered | list[Recovered]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        entry = self.entries[at]
        header = Header.unpack(entry.tobytes()[:HEADER_BYTES], checked=True)
        location = Location(int(self.segments[at]), int(entry["offset"]), int(entry["nbytes"]))
        return Recovered(self.names[header.namespace], header, location)
