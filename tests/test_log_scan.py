"""What a segment's index says, page after page: records before their words, freed ones, places outside the data."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvstore.header import Header
from kvstore.spec import Shard
from kvstore.tiers.recovery import FoundSegment, scan_segment
from kvstore.tiers.segment import data_name, index_name
from kvstore.tiers.segment_index import FREED_A_PAGE, Word, open_page, pack_entry, pages_of, word_of_shard
from tests.contracts.records import NAMESPACE, header_of, small_spec
from tests.memdisk import MemoryDisk

SPEC = small_spec()
WORDS: list[Word] = [
    ("namespace", NAMESPACE),
    ("spec", SPEC.canonical_json()),
    word_of_shard(Shard.whole(SPEC)),
]
DATA_BYTES = 1 << 20
Page = tuple[list[Word], list[bytes], list[int]]


def record(depth: int) -> Header:
    raw = bytes(8192)
    return replace(header_of(NAMESPACE, SPEC, Shard.whole(SPEC), 0, depth, raw), chunk_count=1, stored_length=4000)


def entry(depth: int, offset: int | None = None, **changes: int) -> bytes:
    header = record(depth)
    return pack_entry(replace(header, **changes), 4096 * depth if offset is None else offset, header.stored_length)


def scan(*pages: Page) -> tuple[FoundSegment, dict[str, int]]:
    disk, sequence, content = MemoryDisk(), 1, open_page(7, 99, DATA_BYTES)
    for words, entries, freed in pages:
        more, sequence = pages_of(7, 99, sequence, words, entries, freed)
        content += more
    for name, held in ((data_name(7), bytes(DATA_BYTES)), (index_name(7), content)):
        disk.replace(name, held)
    counters: dict[str, int] = {}
    found = scan_segment(disk, 7, counters)
    assert found is not None
    found.segment.validate()
    assert found.segment.blocks == len(found.records)
    return found, {name: count for name, count in counters.items() if count}


def depths(found: FoundSegment) -> list[int]:
    return [record.header.depth for record in found.records]


def test_records_in_their_order_over_many_pages() -> None:
    found, counters = scan((WORDS, [entry(depth) for depth in range(60)], []), ([], [entry(60)], []))
    assert depths(found) == list(range(61)) and counters == {}
    assert [(r.segment, r.offset, r.nbytes, r.namespace) for r in found.records[:2]] == [
        (7, 0, 4000, NAMESPACE),
        (7, 4096, 4000, NAMESPACE),
    ]
    assert found.records[5].header == record(5) and found.specs == [SPEC]


@pytest.mark.parametrize("late", range(3))
def test_a_record_before_any_of_its_words_is_not_described(late: int) -> None:
    early = [word for at, word in enumerate(WORDS) if at != late]
    found, counters = scan((early, [entry(0), entry(1)], []), ([WORDS[late]], [entry(2)], []))
    assert depths(found) == [2] and counters == {"undescribed_records": 2}


def test_what_was_freed_is_gone_and_may_be_written_again() -> None:
    found, _ = scan((WORDS, [entry(depth) for depth in range(4)], [4096, 8192]), ([], [entry(9, 8192)], [4096]))
    assert depths(found) == [0, 3, 9]
    assert [record.offset for record in found.records] == [0, 3 * 4096, 8192]
    many = [4096 * depth for depth in range(FREED_A_PAGE + 3)]
    assert depths(scan((WORDS, [entry(depth) for depth in range(40)], many))[0]) == []


def test_the_last_entry_of_a_place_counts() -> None:
    found, _ = scan((WORDS, [entry(1)], []), ([], [entry(2, 4096)], []))
    assert depths(found) == [2] and found.segment.blocks == 1


@pytest.mark.parametrize(
    "bad",
    [
        entry(1, 4097),
        entry(1, DATA_BYTES - 3999),
        entry(1, (1 << 64) - 4096),
        pack_entry(record(1), 4096, 3999),
        entry(1, raw_length=0),
        entry(1, chunk_count=1 << 21),
    ],
)
def test_an_entry_that_does_not_hold_is_lost_alone(bad: bytes) -> None:
    found, counters = scan((WORDS, [entry(0), bad, entry(2)], []))
    assert depths(found) == [0, 2] and counters == {"lost_records": 1}
