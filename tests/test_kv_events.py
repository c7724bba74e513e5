"""An engine's events: both encodings, hostile bytes, and pages that become blocks when all of them are there."""

from __future__ import annotations

from itertools import count
from random import Random

import pytest

from kvstore.directory.engine_cache import EngineCache
from kvstore.directory.kv_events import Cleared, Dropped, Event, Stored, parse
from kvstore.directory.msgpack import unpack
from kvstore.directory.runs import Added, Change, Removed
from kvstore.errors import Corrupt, UsageError
from kvstore.keys import chain
from kvstore.spec import ModelSpec, Shard
from tests.cluster_model import FULL, FULL_SLIDING, TOKENS
from tests.packed import pack

PAGE = 2  # tokens; two pages a block
MAP = {
    "type": "BlockStored", "block_hashes": [b"\1" * 32, b"\2" * 32], "parent_block_hash": None,
    "token_ids": [1, 2, 3, 4], "block_size": 2, "lora_id": None, "medium": "GPU", "lora_name": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "value",
    [None, True, False, 0, 127, 128, 255, 256, 65535, 65536, 1 << 32, (1 << 64) - 1, -1, -33, -(1 << 40), 1.5,
     "", "é" * 9, "x" * 200, b"", b"\0" * 200, [], [1, [2, [3]]], list(range(300)), {"a": [None], 3: b"x"},
     {str(n): n for n in range(40)}],
)  # fmt: skip
def test_messagepack_comes_back(value: object) -> None:
    assert unpack(pack(value)) == value


def test_messagepack_in_its_rarer_forms() -> None:
    assert unpack(b"\xe0") == -32 and unpack(b"\xd0\x80") == -128 and unpack(b"\xd1\xff\xfe") == -2
    assert unpack(b"\xd2\xff\xff\xff\xff") == -1 and unpack(b"\xca\x3f\x80\x00\x00") == 1.0
    assert unpack(b"\xda\x00\x01a") == "a" and unpack(b"\xdb\x00\x00\x00\x01a") == "a"
    assert unpack(b"\xc5\x00\x01a") == b"a" and unpack(b"\xc6\x00\x00\x00\x01a") == b"a"
    assert unpack(b"\xdd\x00\x00\x00\x01\x05") == [5] and unpack(b"\xdf\x00\x00\x00\x01\x05\x06") == {5: 6}


@pytest.mark.parametrize(
    "bad",
    [b"", b"\xc1", b"\xd4\x01\x02", b"\x92\x01", b"\xdd\xff\xff\xff\xff", b"\xc4\x05ab", b"\xa2\xff\xff",
     b"\x81\x90\x01", b"\x01\x02", b"\x91" * 40 + b"\x01", b"\xcb\x00"],
)  # fmt: skip
def test_what_is_no_messagepack_is_corrupt(bad: bytes) -> None:
    with pytest.raises(Corrupt):
        unpack(bad)


def test_maps_and_older_arrays_say_the_same() -> None:
    stored = Stored((b"\1" * 32, b"\2" * 32), None, (1, 2, 3, 4), 2, "GPU", True)
    assert parse(pack({"ts": 1.5, "events": [MAP], "data_parallel_rank": 0})) == [stored]
    array = ["BlockStored", [b"\1" * 32, b"\2" * 32], None, [1, 2, 3, 4], 2, None]  # before media were named
    assert parse(pack([1.5, [array]])) == [stored]
    assert parse(pack([1.5, [[*array, "GPU"]], 3])) == [stored]
    both = [["BlockRemoved", [7, 1 << 63]], ["AllBlocksCleared"], ["BlockRemoved", [8], "CPU"]]
    gone = [Dropped((7, 1 << 63), "GPU"), Cleared(), Dropped((8,), "CPU")]
    assert parse(pack([0, both])) == gone
    tagged = [{"type": "BlockRemoved", "block_hashes": [7, 1 << 63], "medium": None}, {"type": "AllBlocksCleared"}]
    assert (
        parse(pack({"ts": 0, "events": [*tagged, {"type": "BlockRemoved", "block_hashes": [8], "medium": "CPU"}]}))
        == gone
    )


def test_later_versions_fields_and_kinds_are_passed_over() -> None:
    later = MAP | {"group_idx": 1, "kv_cache_spec_kind": "sliding_window", "new": [1]}
    events = parse(pack({"ts": 1, "events": [later, {"type": "Sneezed"}, ["Sneezed", 1]], "new": 1}))
    assert [(e.group, e.kind) for e in events if isinstance(e, Stored)] == [(1, "sliding_window")] and len(events) == 1
    for extra in ({"lora_id": 3}, {"lora_name": "a"}, {"extra_keys": [None, ["salt"]]}):
        assert [e.plain for e in parse(pack({"events": [MAP | extra]})) if isinstance(e, Stored)] == [False]
    assert [
        e.plain for e in parse(pack({"events": [MAP | {"extra_keys": [None, None]}]})) if isinstance(e, Stored)
    ] == [True]


@pytest.mark.parametrize(
    "bad",
    [5, [1], {"ts": 1}, {"events": 3}, {"events": [3]}, {"events": [MAP | {"token_ids": [1]}]}, {"events": [[]]},
     {"events": [MAP | {"block_size": 0}]}, {"events": [MAP | {"block_hashes": ["x", "y"]}]},
     {"events": [MAP | {"token_ids": ["a", "b", "c", "d"]}]}, {"events": [{"type": "BlockRemoved"}]}],
)  # fmt: skip
def test_what_is_no_batch_is_corrupt(bad: object) -> None:
    with pytest.raises(Corrupt):
        parse(pack(bad))


class Engine:
    """Prompts as an engine caches them: chained pages with hashes of its own; what it tells, and what blocks it has."""

    def __init__(self, spec: ModelSpec, seed: int = 0) -> None:
        self.spec = spec
        self.rng = Random(seed)
        self.ids: dict[tuple[int, ...], int] = {}
        self.numbers = count(1000)
        self.held: dict[tuple[int, ...], None] = {}  # prefixes whose last page is there

    def page(self, prefix: tuple[int, ...]) -> int:
        return self.ids.setdefault(prefix, next(self.numbers))

    def store(self, tokens: tuple[int, ...], start: int = 0) -> Stored:
        ends = range(start + PAGE, len(tokens) + 1, PAGE)
        self.held.update({tokens[:end]: None for end in ends})
        pages = tuple(self.page(tokens[:end]) for end in ends)
        parent = self.page(tokens[:start]) if start else None
        return Stored(pages, parent, tokens[start : start + PAGE * len(pages)], PAGE, "GPU", True)

    def drop(self, prefixes: list[tuple[int, ...]]) -> Dropped:
        for prefix in prefixes:
            del self.held[prefix]
        return Dropped(tuple(map(self.page, prefixes)), "GPU")

    def keys(self) -> set[bytes]:
        """Of the blocks whose pages are all there."""
        found = set()
        for prefix in self.held:
            whole = len(prefix) % TOKENS == 0
            if whole and all(
                prefix[:end] in self.held for end in range(len(prefix) - TOKENS + PAGE, len(prefix), PAGE)
            ):
                found.add(chain(self.spec, list(prefix)).keys[-1])
        return found


def applied(known: set[tuple[bytes, bytes]], changes: list[Change]) -> None:
    for change in changes:
        name = (change.shard, change.key)
        assert (name in known) == isinstance(change, Removed), "told twice"
        known.symmetric_difference_update({name})


def test_pages_become_blocks_when_all_are_there() -> None:
    engine, cache = Engine(FULL), EngineCache(FULL)
    tokens = tuple(range(10))
    changes = cache.take([engine.store(tokens)])
    keys = chain(FULL, list(tokens)).keys
    assert [c.key for c in changes] == keys and len(keys) == 2
    first = changes[0]
    assert isinstance(first, Added) and (first.parent, first.group, first.depth) == (FULL.root, keys[0], 0)
    assert cache.take([engine.drop([tokens[:2]])]) == [Removed(Shard.whole(FULL).digest, keys[0])]
    assert [c.key for c in cache.take([engine.store(tokens[:2])])] == [keys[0]]
    assert {a.key for a in cache.blocks()} == engine.keys() == set(keys)
    assert [c.key for c in cache.take([Cleared()])] == keys and cache.blocks() == []


@pytest.mark.parametrize("spec", [FULL, FULL_SLIDING])
@pytest.mark.parametrize("seed", range(6))
def test_any_events_leave_the_blocks_that_the_engine_has(spec: ModelSpec, seed: int) -> None:
    engine, cache = Engine(spec, seed), EngineCache(spec)
    known: set[tuple[bytes, bytes]] = set()
    for _ in range(150):
        if engine.rng.random() < 0.6 or not engine.held:
            base = engine.rng.choice([*engine.held, ()])
            more = tuple(engine.rng.randrange(3) for _ in range(engine.rng.choice((2, 4, 6, 10))))
            here = tuple(base) + more
            event: Event = engine.store(here, len(base) if engine.rng.random() < 0.7 else 0)
        else:
            event = engine.drop(
                engine.rng.sample(sorted(engine.held), min(len(engine.held), engine.rng.randrange(1, 4)))
            )
        applied(known, cache.take([event]))
        assert {key for _, key in known} == engine.keys()
        assert len(known) == len(engine.keys()) * len(spec.groups)
        assert {(a.shard, a.key) for a in cache.blocks()} == known
    assert not cache.counters
    applied(known, cache.clear())
    assert not known


def test_what_cannot_be_keyed_is_counted_and_left_out() -> None:
    engine, cache = Engine(FULL), EngineCache(FULL, pages_max=3)
    tokens = tuple(range(12))
    assert cache.take([Stored((1,), None, (1, 2), 2, "GPU", False)]) == []
    assert cache.take([Stored((5,), None, (1, 2, 3), 3, "GPU", True)]) == []
    assert cache.take([Stored((1,), 77, (1, 2), 2, "GPU", True)]) == []
    assert cache.counters == {"pages_not_keyed": 2, "pages_without_beginning": 1}
    assert cache.take([Stored((1,), None, (1, 2), 2, "CPU", True)]) == []
    assert cache.take([Stored((1,), None, (1, 2), 2, "GPU", True, 1, "mamba"), Dropped((1,), "GPU", 1)]) == []
    assert len(cache.take([engine.store(tokens)])) == 1 and cache.counters["pages_beyond_bound"] == 1
    with pytest.raises(UsageError):
        EngineCache(ModelSpec("m", FULL.groups, block_tokens=TOKENS, engine_hash="sha256"))
